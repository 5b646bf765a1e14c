"""A whole service over a backend that makes its turns at once, or when a test lets it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from mv2v_engine.serving.config import Limits, ServingConfig
from mv2v_engine.serving.folders import result_path
from mv2v_engine.serving.records import JobRecord, SessionRecord
from mv2v_engine.serving.server import DrainingServer, bound_socket, address_of, running_app

ABOUT: dict[str, Any] = {
    "kind": "views",
    "engine": {"checkpoint": "fake", "device": "cpu", "dtype": "float32"},
    "has_text": False,
    "memory": "retrieved",
    "presets": ["pan_right", "arc_left"],
    "sampling": {
        "num_frames": 9,
        "size": [48, 64],
        "fps": 8.0,
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
    },
}
THUMBNAIL = b"\xff\xd8 a picture \xff\xd9"


class FakeBackend:
    """Makes turns without an engine. A turn's video is the session's source.

    hold: turns begin and then wait for `let_go`. Everything but `let_go` belongs to the loop.
    """

    capacity, restarts, pid = 1, 0, None

    def __init__(self) -> None:
        self.ready, self.reason = True, ""
        self.about: dict[str, Any] | None = ABOUT
        self.hold = False
        self._go = asyncio.Event()
        self._cancelled: set[str] = set()

    def watch(self, changed: Callable[[], None]) -> None:
        self._changed = changed

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed()

    async def stop(self, grace: float) -> None:
        self._go.set()

    def let_go(self) -> None:
        """From any thread: no turn waits any more."""
        self.hold = False
        self._loop.call_soon_threadsafe(self._go.set)

    async def run(
        self, job: JobRecord, session: SessionRecord, folder: Path
    ) -> AsyncIterator[dict[str, Any]]:
        number = len(list(folder.glob("results/*.mp4"))) + 1
        yield {"type": "started", "number": number}
        yield {"type": "stage_started", "stage": "sampling"}
        for step in (1, 2):
            if self.hold:
                self._go.clear()
                await self._go.wait()
            if job.id in self._cancelled:
                yield {"type": "cancelled"}
                return
            left = 2.0 - step
            progress = {"stage": "sampling", "step": step, "total": 2, "seconds_left": left}
            yield {"type": "step_done", **progress}
        yield {"type": "stage_done", "stage": "sampling", "seconds": 0.5}
        video = result_path(folder, number, "video")
        video.parent.mkdir(exist_ok=True)
        video.write_bytes((folder / "source").read_bytes())
        result_path(folder, number, "thumbnail").write_bytes(THUMBNAIL)
        report = {"turn": number, "camera": str(job.request.get("camera")), "seconds": {}}
        plan = {"tokens_by_kind": {"target": 10}, "merges": []}
        counters = dict.fromkeys(("hits", "misses", "reloads", "demotions", "evictions"), 0)
        report |= {"plan": plan, "cache_bytes_by_tier": {}, "cache_counters": counters}
        memory = {"bytes": 1000 * number, "next_turn_tokens": {"target": 10, "memory": number}}
        yield {
            "type": "done",
            "number": number,
            "report": report,
            "bytes": video.stat().st_size,
            "published": True,
            "memory": memory,
        }

    def cancel(self, job_id: str) -> None:
        self._cancelled.add(job_id)
        self._go.set()

    async def publish(
        self, session: SessionRecord, folder: Path, number: int
    ) -> dict[str, Any]:
        return {"type": "failed", "code": "internal", "message": "not here"}

    async def release(self, session_id: str) -> None:
        pass


class Live:
    """A service that listens on this machine, in a thread of its own."""

    def __init__(self, config: ServingConfig, backend: Any) -> None:
        self.config, self.backend = config, backend
        self._is_up = threading.Event()
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="service")

    def start(self) -> None:
        self.thread.start()
        assert self._is_up.wait(120)
        if self._error is not None:
            raise self._error

    def drain(self) -> None:
        """What a signal does."""
        self._loop.call_soon_threadsafe(self.server.begin_drain)

    def client(self, token: str | None = None) -> httpx.Client:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        # a machine that is busy answers late; that is no matter of these tests
        return httpx.Client(base_url=self.address, headers=headers, timeout=120)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._error = error
            self._is_up.set()
            raise

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with running_app(self.config, self.backend) as app:
            with bound_socket("127.0.0.1", 0) as bound:
                self.server = DrainingServer(app, app.state.service.drain)
                self.app, self.address = app, address_of(bound)
                self._is_up.set()
                await self.server.serve([bound])


@pytest.fixture(scope="session")
def serving_backend() -> type[FakeBackend]:
    return FakeBackend


@pytest.fixture(scope="session")
def serving() -> Callable[..., Any]:
    """Makes a live service of a backend and settings; to be used in a with statement."""

    @contextmanager
    def live(store: Path, backend: Any = None, **settings: Any) -> Iterator[Live]:
        settings = {"min_free_bytes": 0, "grace": 60.0} | settings
        service = Live(ServingConfig(store=store, **settings), backend or FakeBackend())
        service.start()
        try:
            yield service
        finally:
            if isinstance(service.backend, FakeBackend):
                service.backend.let_go()
            service.drain()
            service.thread.join(120)
            assert not service.thread.is_alive()

    return live


@pytest.fixture(scope="session")
def live(serving: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """One open service for all that need no settings of their own: two turns may wait."""
    limits = Limits(upload_bytes=1 << 20, frames=100)
    store = tmp_path_factory.mktemp("store")
    with serving(store, limits=limits, max_queue=2) as service:
        yield service


@pytest.fixture
def client(live: Live) -> Iterator[httpx.Client]:
    with live.client() as client:
        yield client


@pytest.fixture(scope="session")
def upload(source_clip: Path) -> Callable[..., dict[str, Any]]:
    """Makes a session of the clip."""

    def send(client: httpx.Client, name: str = "clip.mp4", **headers: str) -> dict[str, Any]:
        files = {"video": (name, source_clip.read_bytes(), "video/mp4")}
        answer = client.post("/v1/sessions", files=files, data={"name": name}, headers=headers)
        assert answer.status_code == 201, answer.text
        session: dict[str, Any] = answer.json()
        return session

    return send


@pytest.fixture(scope="session")
def events_of() -> Callable[..., list[tuple[int, str, dict[str, Any]]]]:
    """Reads a job's stream of events to its end: (number, kind, data) of each."""
    import json

    def read(client: httpx.Client, job: str, **headers: str) -> list[tuple[int, str, Any]]:
        found = []
        with client.stream("GET", f"/v1/jobs/{job}/events", headers=headers) as answer:
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            for block in "".join(answer.iter_text()).split("\n\n"):
                fields = dict(line.split(": ", 1) for line in block.splitlines() if line[0] != ":")
                if fields:
                    data = json.loads(fields["data"])
                    found.append((int(fields["id"]), fields["event"], data))
        return found

    return read
