"""A service in a process of its own, driven by JSON lines, so that it can be killed at any moment.

The child is the service without HTTP, with its real worker. A call is a line on its stdin, its
answer one on its stdout; calls run beside each other. Once stdin ends the child stops as a service
stops.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import shutil
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mv2v_engine.config import Alpha
from mv2v_engine.progress import host_bytes
from mv2v_engine.serving.config import Limits, ServingConfig
from mv2v_engine.serving.errors import ApiError
from mv2v_engine.serving.service import Service
from mv2v_engine.serving.store.records import JobRecord, ProbedVideo, SessionRecord
from mv2v_engine.serving.work.local import LocalBackend
from mv2v_engine.video.io import probe_video

ROOT = Path(__file__).resolve().parents[1]
_MAX_LINE = 64 << 20


class Gone(Exception):
    """The process ended before it answered."""


class Refused(Exception):
    """The service refused; code: of the `ApiError`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class ServiceProcess:
    """The parent's side. settings: of `ServingConfig`, as JSON."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self._process: Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = itertools.count()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start it; returns once it has recovered its store. Raises Gone."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(Path(__file__).resolve()),
            json.dumps(self.settings, default=str),
            stdin=PIPE,
            stdout=PIPE,
            limit=_MAX_LINE,
            cwd=ROOT,
        )
        assert self._process.stdout is not None
        if not await self._process.stdout.readline():
            raise Gone("the service did not start")
        self._reading = asyncio.create_task(self._read(self._process))

    async def call(self, name: str, **arguments: Any) -> Any:
        """Raises Refused, Gone."""
        process, number = self._process, next(self._numbers)
        assert process is not None and process.stdin is not None
        if self._reading is None or self._reading.done() or process.stdin.is_closing():
            raise Gone(name)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        line = json.dumps({"number": number, "call": name, "arguments": arguments}, default=str)
        process.stdin.write(line.encode() + b"\n")
        found = await answer
        if "code" in found:
            raise Refused(found["code"], found["message"])
        return found["result"]

    def kill(self) -> None:
        """Kill this process, as a power cut would."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def ended(self) -> int:
        """Its exit code, once it has ended."""
        assert self._process is not None and self._reading is not None
        await self._reading
        return await self._process.wait()

    async def stop(self) -> int:
        """Stop it gracefully."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.close()
        return await self.ended()

    async def _read(self, process: Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            found = json.loads(line)
            answer = self._answers.pop(found["number"], None)
            if answer is not None and not answer.done():
                answer.set_result(found)
        waiting, self._answers = self._answers, {}
        for answer in waiting.values():
            if not answer.done():
                answer.set_exception(Gone("the service ended"))


class KillingBackend(LocalBackend):
    """kills: the process dies between the worker's last word of a turn and its row."""

    kills = False

    async def run(
        self, job: JobRecord, session: SessionRecord, folder: Path
    ) -> AsyncIterator[dict[str, Any]]:
        async for event in super().run(job, session, folder):
            if self.kills and event["type"] == "done":
                os.kill(os.getpid(), signal.SIGKILL)
            yield event


class Calls:
    """What the parent may ask for; every method is a call."""

    def __init__(self, service: Service, backend: KillingBackend) -> None:
        self.service, self.backend = service, backend

    async def ready(self) -> None:
        while not self.service.ready:
            await asyncio.sleep(0.05)

    async def create(self, clip: str, key: str) -> str:
        upload = await self.service.upload_path()
        await asyncio.to_thread(shutil.copyfile, clip, upload)
        return (await self.service.create_session("", upload, "clip", key=key)).id

    async def submit(self, session: str, key: str, request: dict[str, Any]) -> str:
        job, _ = await self.service.submit("", session, request, key=key)
        return job.id

    async def reach(self, job: str, kind: str) -> str:
        """The kind of event that was waited for, or of the last one."""
        event = None
        async for event in await self.service.events("", job):
            if event.kind == kind:
                break
        assert event is not None
        return event.kind

    async def wait(self, job: str) -> dict[str, Any]:
        """The job, once it has ended."""
        async for _ in await self.service.events("", job):
            pass
        return asdict(await self.service.job("", job))

    async def cancel(self, job: str) -> str:
        return (await self.service.cancel("", job)).state

    async def delete(self, session: str) -> None:
        await self.service.delete_session("", session)

    async def branch(self, session: str, number: int) -> str:
        return (await self.service.branch("", session, number)).id

    async def turns(self, session: str) -> list[dict[str, Any]]:
        return [asdict(turn) for turn in await self.service.turns("", session)]

    async def published(self, session: str, number: int) -> str:
        """A turn's video, once it is there."""
        while not (await self.service.turn("", session, number)).is_published:
            await asyncio.sleep(0.05)
        return str(await self.service.turn_file("", session, number, "video"))

    async def kill_at_done(self) -> None:
        self.backend.kills = True

    async def about(self) -> dict[str, Any]:
        worker = self.backend.pid
        return {
            "worker": worker,
            "restarts": self.backend.restarts,
            "server_bytes": host_bytes(),
            "worker_bytes": None if worker is None else host_bytes(worker),
        }


async def probe(owner: str, path: Path, limits: Limits, alpha: Alpha) -> ProbedVideo:
    """In this process, for the clips are the test's own."""
    info = await asyncio.to_thread(probe_video, path)
    seconds = info.num_frames / info.fps
    return ProbedVideo(info.num_frames, info.width, info.height, info.fps, seconds)


async def serve(settings: dict[str, Any]) -> None:
    """Be the child."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    config = ServingConfig(**{**settings, "store": Path(settings["store"])})
    backend = KillingBackend(config)
    service = Service(config, backend, probe)
    await service.start()
    calls, tasks = Calls(service, backend), set[asyncio.Task[None]]()
    reader = asyncio.StreamReader(limit=_MAX_LINE)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print("{}", flush=True)
    async for line in reader:
        task = asyncio.create_task(_answer(calls, json.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await service.stop()


async def _answer(calls: Calls, asked: dict[str, Any]) -> None:
    answer = {"number": asked["number"]}
    try:
        answer["result"] = await getattr(calls, asked["call"])(**asked["arguments"])
    except ApiError as error:
        answer |= {"code": error.code, "message": str(error)}
    except Exception as error:  # whoever asked must not wait for ever
        logging.exception("a call failed")
        answer |= {"code": "internal", "message": repr(error)}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
