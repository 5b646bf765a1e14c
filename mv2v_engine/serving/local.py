"""One worker process on this machine, started again whenever it ends."""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mv2v_engine.serving.config import ServingConfig
from mv2v_engine.serving.protocol import (
    MAX_LINE,
    decode,
    encode,
    run_message,
    session_fields,
    setup_message,
)
from mv2v_engine.serving.records import JobRecord, SessionRecord

log = logging.getLogger("mv2v_engine.serving")

_LOADING = "the engine is being loaded"
# pauses before a worker that ended before it was ready is started again
_PAUSES = (0.5, 2.0, 10.0, 30.0)
# that a worker has to end once its stdin is closed, beyond the grace of the turn
_EXIT_SECONDS = 5.0

Event = dict[str, Any]


class LocalBackend:
    """`Backend` over one process, which makes one turn at a time."""

    capacity = 1

    def __init__(self, config: ServingConfig) -> None:
        self.config = config
        self.about: dict[str, Any] | None = None
        self.ready, self.reason, self.restarts = False, _LOADING, 0
        self.pid: int | None = None
        self._jobs: dict[str, asyncio.Queue[Event]] = {}
        self._answers: dict[int, asyncio.Future[Event]] = {}
        self._calls = itertools.count()
        self._process: Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._is_stopping = self._is_broken = False
        self._changed: Callable[[], None] = lambda: None

    def watch(self, changed: Callable[[], None]) -> None:
        """As `Backend`."""
        self._changed = changed

    async def start(self) -> None:
        """As `Backend`."""
        self._supervisor = asyncio.create_task(self._supervise(), name="worker")

    async def stop(self, grace: float) -> None:
        """As `Backend`: stdin is closed, and what does not end then is killed."""
        self._is_stopping = True
        was_ready = self.ready
        self.ready, self.reason = False, "the service is stopping"
        if self._supervisor is None:
            return
        process = self._process
        if process is None:
            # between two workers
            self._supervisor.cancel()
        elif was_ready:
            _close_stdin(process)
        else:
            # it loads, and has written nothing
            _kill(process)
        done, _ = await asyncio.wait([self._supervisor], timeout=grace + _EXIT_SECONDS)
        if not done and process is not None:
            log.error("the worker did not end within %g s; it is killed", grace + _EXIT_SECONDS)
            _kill(process)
            await asyncio.wait([self._supervisor])

    async def run(
        self, job: JobRecord, session: SessionRecord, folder: Path
    ) -> AsyncIterator[Event]:
        """As `Backend`."""
        events: asyncio.Queue[Event] = asyncio.Queue()
        self._jobs[job.id] = events
        try:
            if not self._send(run_message(job, session, folder)):
                yield self._crashed()
                return
            while True:
                event = await events.get()
                yield event
                if event["type"] in ("done", "failed", "cancelled"):
                    return
        finally:
            self._jobs.pop(job.id, None)

    def cancel(self, job_id: str) -> None:
        """As `Backend`."""
        if job_id in self._jobs:
            self._send({"type": "cancel", "job": job_id})

    async def publish(self, session: SessionRecord, folder: Path, number: int) -> Event:
        """As `Backend`."""
        call = next(self._calls)
        answer: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        self._answers[call] = answer
        message = {
            "type": "publish",
            "call": call,
            "session": session_fields(session),
            "folder": str(folder),
            "number": number,
        }
        try:
            return await answer if self._send(message) else self._crashed()
        finally:
            self._answers.pop(call, None)

    async def release(self, session_id: str) -> None:
        """As `Backend`: the worker touches a session's folder only while it works for it."""
        self._send({"type": "release", "session": session_id})

    def _send(self, message: Event) -> bool:
        """Whether there is a ready worker to take it."""
        process = self._process
        if process is None or process.stdin is None or process.stdin.is_closing():
            return False
        if not self.ready and not self._is_stopping:
            return False
        process.stdin.write(encode(message))
        return True

    async def _supervise(self) -> None:
        early = 0
        while not self._is_stopping:
            try:
                was_ready = await self._live()
            except OSError as error:
                was_ready, self.reason = False, f"no worker can be started: {error}"
                log.error("%s", self.reason)
            if self._is_stopping:
                return
            early = 0 if was_ready else early + 1
            if early:
                await asyncio.sleep(_PAUSES[min(early, len(_PAUSES)) - 1])
            self.restarts += 1
            self._changed()

    async def _live(self) -> bool:
        """One worker's life; whether it was ready."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "mv2v_engine.serving.worker",
            stdin=PIPE,
            stdout=PIPE,
            limit=MAX_LINE,
            # Ctrl-C at the terminal is for the server, which gives the turn its grace
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None
        self._process, self.pid, self._is_broken = process, process.pid, False
        was_ready, began = False, time.monotonic()
        try:
            process.stdin.write(encode(setup_message(self.config)))
            async for line in process.stdout:
                message = decode(line)
                self._receive(message)
                if message["type"] == "ready" and not was_ready:
                    was_ready = True
                    log.info("the worker is ready after %.1f s", time.monotonic() - began)
        finally:
            self.ready = False
            _kill(process)
            code = await process.wait()
            self._process = self.pid = None
            self._ended(code)
        return was_ready

    def _receive(self, message: Event) -> None:
        kind = message["type"]
        if kind == "event":
            events = self._jobs.get(message["job"])
            if events is not None:
                events.put_nowait(message["event"])
        elif kind == "answer":
            answer = self._answers.get(message["call"])
            if answer is not None and not answer.done():
                answer.set_result(message["answer"])
        elif kind == "ready":
            self.about = message["about"]
            self.ready, self.reason = not self._is_stopping, ""
            self._changed()
        elif kind == "broken":
            self.reason, self._is_broken = message["message"], True
            log.error("the engine cannot be loaded: %s", self.reason)

    def _ended(self, code: int) -> None:
        """The process is gone: so is what it was asked for."""
        if not self._is_stopping and not self._is_broken:
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
            self.reason = f"the worker ended {how}; it is started again"
            log.error("%s", self.reason)
        for events in self._jobs.values():
            events.put_nowait(self._crashed())
        for answer in self._answers.values():
            if not answer.done():
                answer.set_result(self._crashed())
        self._changed()

    def _crashed(self) -> Event:
        why = self.reason or "the worker is not running"
        message = f"{why}; the session is as it was, ask for the turn again"
        return {"type": "failed", "code": "worker_crashed", "message": message}


def _close_stdin(process: Process) -> None:
    if process.stdin is not None:
        process.stdin.close()


def _kill(process: Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()
