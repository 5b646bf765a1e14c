"""One worker process on this machine, started again whenever it ends.

One that has work and says nothing for too long hangs, and is ended. One that never becomes ready
is given up after some tries, each later than the one before it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mv2v_engine.serving.config import ServingConfig
from mv2v_engine.serving.store.records import JobRecord, SessionRecord
from mv2v_engine.serving.store.streams import StreamRecord
from mv2v_engine.serving.work.protocol import (
    MAX_LINE,
    decode,
    encode,
    run_message,
    session_fields,
    setup_message,
    stream_fields,
)

log = logging.getLogger("mv2v_engine.serving")

WORKER = (sys.executable, "-m", "mv2v_engine.serving.work.worker")
_LOADING = "the engine is being loaded"
# pauses before a worker that ended before it was ready is started again; then it is given up
_PAUSES = (0.5, 2.0, 10.0, 30.0)
# seconds that a worker gets to exit after its input closes, beyond the grace of the turn
_EXIT_SECONDS = 5.0

Event = dict[str, Any]


class LocalBackend:
    """`Backend` over one process, which says how many turns it makes at once.

    command: what is started, and speaks as `protocol` says.
    """

    def __init__(self, config: ServingConfig, command: Sequence[str] = WORKER) -> None:
        self.config, self.command = config, tuple(command)
        self.about: dict[str, Any] | None = None
        self.ready, self.reason, self.restarts, self.capacity = False, _LOADING, 0, 1
        self.pid: int | None = None
        self._jobs: dict[str, asyncio.Queue[Event]] = {}
        self._blocks: set[str] = set()
        self._answers: dict[int, asyncio.Future[Event]] = {}
        self._calls = itertools.count()
        self._process: Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._is_stopping = self._is_broken = self._is_stalled = False
        self.is_lost, self.refusal = False, ""
        # when the worker last said something, or was given work while it had none
        self._heard = time.monotonic()
        self._changed: Callable[[], None] = lambda: None

    def watch(self, changed: Callable[[], None]) -> None:
        """See `Backend`."""
        self._changed = changed

    async def start(self) -> None:
        """See `Backend`."""
        self._supervisor = asyncio.create_task(self._supervise(), name="worker")

    async def stop(self, grace: float) -> None:
        """See `Backend`: stdin is closed, and what does not end then is killed."""
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
            assert process.stdin is not None
            process.stdin.close()
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
        """See `Backend`."""
        events: asyncio.Queue[Event] = asyncio.Queue()
        self._begin_work()
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
        """See `Backend`."""
        if job_id in self._jobs or job_id in self._blocks:
            self._send({"type": "cancel", "job": job_id})

    async def publish(self, session: SessionRecord, folder: Path, number: int) -> Event:
        """See `Backend`."""
        session_words = session_fields(session)
        return await self._call(
            {"type": "publish", "session": session_words, "folder": str(folder), "number": number}
        )

    async def block(self, record: StreamRecord, folder: Path, number: int) -> Event:
        """See `Backend`."""
        self._blocks.add(record.id)
        try:
            asked = stream_fields(record, number)
            return await self._call({"type": "block", "stream": asked, "folder": str(folder)})
        finally:
            self._blocks.discard(record.id)

    async def check(self, prompt: str) -> Event:
        """See `Backend`."""
        return await self._call({"type": "check", "prompt": prompt})

    async def _call(self, message: Event) -> Event:
        """The worker's answer; that it crashed, if it is gone before."""
        call = message["call"] = next(self._calls)
        answer: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        self._begin_work()
        self._answers[call] = answer
        try:
            return await answer if self._send(message) else self._crashed()
        finally:
            self._answers.pop(call, None)

    async def release(self, session_id: str) -> None:
        """See `Backend`: the worker touches a session's folder only while it works for it."""
        self._send({"type": "release", "session": session_id})

    @property
    def _has_work(self) -> bool:
        return bool(self._jobs or self._answers)

    def _begin_work(self) -> None:
        if not self._has_work:
            self._heard = time.monotonic()

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
            if self._is_stopping or self.refusal:
                return
            early = 0 if was_ready else early + 1
            if early > len(_PAUSES):
                self._give_up(early)
                return
            if early:
                await asyncio.sleep(_PAUSES[early - 1])
            self.restarts += 1
            self._changed()

    def _give_up(self, tries: int) -> None:
        self.reason = (
            f"no worker became ready in {tries} tries, and none is started any more; the last one: "
            f"{self.reason}; mend that and start the service again"
        )
        self.is_lost = True
        log.error("%s", self.reason)
        self._changed()

    async def _live(self) -> bool:
        """One worker's life; whether it was ready."""
        process = await asyncio.create_subprocess_exec(
            *self.command,
            stdin=PIPE,
            stdout=PIPE,
            limit=MAX_LINE,
            # Ctrl-C at the terminal is for the server, which gives the turn its grace
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None
        self._process, self.pid = process, process.pid
        self._is_broken = self._is_stalled = False
        was_ready, began, is_over = False, time.monotonic(), False
        try:
            process.stdin.write(encode(setup_message(self.config)))
            while line := await self._line(process.stdout):
                message = decode(line)
                self._receive(message)
                if message["type"] == "ready" and not was_ready:
                    was_ready = True
                    log.info("the worker is ready after %.1f s", time.monotonic() - began)
            is_over = not self._is_stalled
        finally:
            self.ready = False
            code = await _end(process, _EXIT_SECONDS if is_over else 0.0)
            self._process = self.pid = None
            self._ended(code)
        return was_ready

    async def _line(self, stdout: asyncio.StreamReader) -> bytes:
        """The worker's next line; none when it has ended, or hangs."""
        patience = self.config.stall_seconds
        while True:
            # an idle worker is looked at, too: work may come while its line is waited for
            left = None if patience is None else patience / 4
            if patience is not None and self.ready and self._has_work:
                left = self._heard + patience - time.monotonic()
                if left <= 0:
                    self._is_stalled = True
                    return b""
            try:
                line = await asyncio.wait_for(stdout.readline(), left)
            except asyncio.TimeoutError:
                continue
            self._heard = time.monotonic()
            return line

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
            self.about, self.capacity = message["about"], message["capacity"]
            self.ready, self.reason = not self._is_stopping, ""
            self._changed()
        elif kind == "broken":
            self.reason, self._is_broken = message["message"], True
            # what could be had before may be had again
            if message["is_final"] and self.about is None:
                self.refusal = self.reason
            else:
                log.error("the engine cannot be loaded: %s", self.reason)

    def _ended(self, code: int) -> None:
        """The process is gone: so is what it was asked for."""
        if self._is_stalled:
            self.reason = (
                f"the worker said nothing for {self.config.stall_seconds:g} s and was ended; it is "
                "started again"
            )
            log.error("%s", self.reason)
        elif not self._is_stopping and not self._is_broken:
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
            self.reason = f"the worker ended {how}; it is started again"
            log.error("%s", self.reason)
        for events in self._jobs.values():
            events.put_nowait(self._crashed())
        for answer in self._answers.values():
            if not answer.done():
                answer.set_result(self._crashed())
        self._is_stalled = False
        self._changed()

    def _crashed(self) -> Event:
        why = self.reason or "the worker is not running"
        message = f"{why}; the session is as it was, ask for the turn again"
        code = "timeout" if self._is_stalled else "worker_crashed"
        return {"type": "failed", "code": code, "message": message}


async def _end(process: Process, patience: float) -> int:
    """The exit code of a process that has so many seconds to end by itself."""
    # killing what has just ended would take its exit code away
    with suppress(asyncio.TimeoutError):
        return await asyncio.wait_for(process.wait(), patience)
    _kill(process)
    return await process.wait()


def _kill(process: Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()
