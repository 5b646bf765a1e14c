"""The service's end of the process that decodes uploads (`probe`)."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from mv2v_engine.config import Alpha
from mv2v_engine.envs import child_environment
from mv2v_engine.serving.config import Limits
from mv2v_engine.serving.errors import ApiError
from mv2v_engine.serving.store.records import MASK, SOURCE, ProbedVideo

# the process's own threads would only be in the way of its forks
_THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# seconds that starting and a fork's own alarm may take beyond the limit
_SLACK_SECONDS = 60.0


class Prober:
    """Decodes uploads in a process apart, `at_once` at a time; started again if it dies.

    An owner has one at a time decoded, and owners take turns: whoever sends many, or what takes
    long, holds up nobody but himself.
    """

    def __init__(self, *, at_once: int = 2) -> None:
        self._room = asyncio.Semaphore(at_once)
        self._starting = asyncio.Lock()
        self._process: Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = itertools.count(1)
        # owners that decode or wait: each waits for room with one upload, so that they take turns
        self._owners: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def start(self) -> None:
        """Start the process, unless it runs."""
        async with self._starting:
            if self._process is not None and self._process.returncode is None:
                return
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "mv2v_engine.serving.work.probe",
                stdin=PIPE,
                stdout=PIPE,
                env=child_environment(**_THREADS),
            )
            self._reading = asyncio.create_task(self._read(self._process))

    async def stop(self) -> None:
        """End the process; who still waits is refused."""
        async with self._starting:
            process, self._process = self._process, None
            if process is None:
                return
            if process.returncode is None:
                process.kill()
            await process.wait()
            if self._reading is not None:
                await self._reading

    async def probe(
        self,
        owner: str,
        path: Path,
        limits: Limits,
        alpha: Alpha = "black",
        name: str = SOURCE,
    ) -> ProbedVideo:
        """What an owner's upload holds, decoded to its end.

        name: as in `Uploads.named`, whether it has to be a video, an image, or is a mask.

        Raises:
            ApiError: it is no video or image, it is broken, or it is beyond a limit.
        """
        param = "video" if name == SOURCE else MASK if name == MASK else "reference"
        async with self._owners.setdefault(owner, asyncio.Lock()), self._room:
            await self.start()
            number = next(self._numbers)
            answer = asyncio.get_running_loop().create_future()
            self._waiting[number] = answer
            try:
                asked = {"path": str(path), "limits": limits.to_dict(), "alpha": alpha}
                asked["name"] = name
                await self._ask({"id": number, **asked})
                said = await asyncio.wait_for(answer, limits.probe_seconds + _SLACK_SECONDS)
            except asyncio.TimeoutError:
                raise ApiError(
                    "video_too_slow", "decoding the file does not end; re-encode it", param=param
                ) from None
            finally:
                del self._waiting[number]
        if "video" not in said:
            raise ApiError(said["code"], said["message"], param=param)
        found: dict[str, Any] = said["video"]
        return ProbedVideo(**found | {"notes": tuple(found["notes"])})

    async def _ask(self, request: dict[str, Any]) -> None:
        process = self._process
        if process is None or process.stdin is None:
            raise _gone()
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            await process.stdin.drain()
        except ConnectionError:
            raise _gone() from None

    async def _read(self, process: Process) -> None:
        """Hand every answer to who waits for it; at the end of the process, an error."""
        assert process.stdout is not None
        async for line in process.stdout:
            said = json.loads(line)
            answer = self._waiting.get(said["id"])
            if answer is not None and not answer.done():
                answer.set_result(said)
        await process.wait()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(_gone())


def _gone() -> ApiError:
    return ApiError("not_ready", "the process that decodes uploads ended; send the video again")
