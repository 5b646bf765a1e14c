"""A backend without an engine, for tests of what surrounds it.

It writes what a worker would, in its order: the session's manifest, the results, the last event.
Where it stops in between is up to the test.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import torch

from mv2v_engine.config import SamplingConfig
from mv2v_engine.engine.folder import SessionFolder
from mv2v_engine.engine.request import Request
from mv2v_engine.engine.turn import Draft, KeptWindow
from mv2v_engine.serving.store.folders import result_path, turn_bytes
from mv2v_engine.serving.store.records import JobRecord, SessionRecord

NUM_FRAMES, SIZE = 9, (48, 64)
ABOUT: dict[str, Any] = {
    "kind": "views",
    "stream": None,
    "engine": {"checkpoint": "fake"},
    "has_text": False,
    "guides": {"references": False, "mask": False},
    "memory": "retrieved",
    "presets": ["pan_right"],
    "sampling": {
        "num_frames": NUM_FRAMES,
        "size": list(SIZE),
        "sizes": [list(SIZE[::-1])],
        "fps": 8.0,
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
    },
}
STEPS = 3
CRASHED = {"type": "failed", "code": "worker_crashed", "message": "the worker ended by SIGKILL"}


def store_turn(folder: Path, session_id: str, number: int) -> None:
    """Commit a turn as the engine's store does."""
    store = SessionFolder(folder)
    if not store.exists():
        store.create(session_id, {"source": "fake"})
    sampling = SamplingConfig(num_frames=NUM_FRAMES, size=SIZE)
    request = Request.view("static", sampling, memory="none")
    latents, report = torch.full((1, 1, 2, 2), float(number)), {"turn": number}
    store.append(Draft(number, request, {}, [KeptWindow(report, latents)], report), 1, latents)


def write_results(folder: Path, number: int) -> None:
    for which in ("video", "thumbnail"):
        path = result_path(folder, number, which)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"frames of turn %d" % number)


class FakeBackend:
    """A turn is `STEPS` steps. go: an Event that every step waits for; set from the start.

    crash: a job's turn crashes there: "begun", "stored" or "written".
    fails: the code that a job fails with. made: how often each turn of a session was made.
    """

    capacity = 1

    def __init__(self, **about: Any) -> None:
        self.about: dict[str, Any] | None = ABOUT | about
        self.ready, self.reason, self.restarts = True, "", 0
        self.is_lost, self.refusal = False, ""
        self.go = asyncio.Event()
        self.go.set()
        self.crash: dict[str, str] = {}
        self.fails: dict[str, str] = {}
        self.failure = "as asked"  # in words
        self.made: dict[tuple[str, int], int] = {}
        self.order: list[str] = []
        self.released: list[str] = []
        self.steps: dict[str, int] = {}
        self._cancelled: set[str] = set()
        self._killed = asyncio.Event()
        self.changed: Callable[[], None] = lambda: None

    def watch(self, changed: Callable[[], None]) -> None:
        self.changed = changed

    async def start(self) -> None:
        self.changed()

    async def stop(self, grace: float) -> None:
        self._killed.set()
        self.go.set()

    async def run(
        self, job: JobRecord, session: SessionRecord, folder: Path
    ) -> AsyncIterator[dict[str, Any]]:
        assert job.number is not None and job.state == "running"
        self.order.append(job.id)
        yield {"type": "started", "number": job.number}
        for step in range(1, STEPS + 1):
            await self.go.wait()
            if self._killed.is_set() or self.crash.get(job.id) == "begun":
                yield CRASHED
                return
            if job.id in self._cancelled:
                yield {"type": "cancelled"}
                return
            self.steps[job.id] = step
            yield {"type": "step_done", "stage": "sampling", "step": step, "total": STEPS}
        if job.id in self.fails:
            yield {"type": "failed", "code": self.fails[job.id], "message": self.failure}
            return
        key = (session.id, job.number)
        self.made[key] = self.made.get(key, 0) + 1
        store_turn(folder, session.id, job.number)
        if self.crash.get(job.id) == "stored":
            yield CRASHED
            return
        write_results(folder, job.number)
        if self.crash.get(job.id) == "written":
            yield CRASHED
            return
        yield {
            "type": "done",
            "number": job.number,
            "report": {"turn": job.number},
            "bytes": turn_bytes(folder, job.number),
            "published": True,
            "memory": {"bytes": 5, "next_turn_tokens": {"target": 3}},
        }

    def cancel(self, job_id: str) -> None:
        if job_id in self.order:
            self._cancelled.add(job_id)

    async def publish(self, session: SessionRecord, folder: Path, number: int) -> dict[str, Any]:
        write_results(folder, number)
        return {"type": "published", "bytes": turn_bytes(folder, number)}

    async def release(self, session_id: str) -> None:
        self.released.append(session_id)
