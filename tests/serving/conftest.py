"""A whole service over a backend that makes its turns at once, or when a test lets it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from mv2v_engine.serving.config import Limits, ServingConfig
from mv2v_engine.serving.server import DrainingServer, address_of, bound_socket, running_app
from mv2v_engine.serving.store.records import JobRecord, SessionRecord
from mv2v_engine.serving.work.local import LocalBackend
from tests.serving.browsing import CHROMIUM, launched, opening
from tests.serving.fake_backend import FakeBackend

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PATIENCE = 600.0  # seconds; what a busy machine may take to start or to stop
# what the metrics read of a turn
REPORT: dict[str, Any] = {
    "plan": {"tokens_by_kind": {"target": 10}, "merges": []},
    "cache_bytes_by_tier": {},
    "cache_counters": dict.fromkeys(("hits", "misses", "reloads", "demotions", "evictions"), 0),
}


class HeldBackend(FakeBackend):
    """Whose turns can be held up from another thread, and report what the metrics read.

    shown: what they report besides.
    """

    shown: Mapping[str, Any] = MappingProxyType({})

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        await super().start()

    def hold(self) -> None:
        """Every step waits from now on."""
        self._loop.call_soon_threadsafe(self.go.clear)

    def let_go(self) -> None:
        """No step waits any more."""
        self._loop.call_soon_threadsafe(self.go.set)

    async def run(
        self, job: JobRecord, session: SessionRecord, folder: Path
    ) -> AsyncIterator[dict[str, Any]]:
        async for event in super().run(job, session, folder):
            if event["type"] == "done":
                event = event | {"report": REPORT | event["report"] | self.shown}
            yield event


class Live:
    """A service that listens on this machine, in a thread of its own."""

    def __init__(self, config: ServingConfig, backend: Any) -> None:
        self.config, self.backend = config, backend
        self._is_up = threading.Event()
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="service")

    def start(self) -> None:
        self.thread.start()
        assert self._is_up.wait(PATIENCE)
        if self._error is not None:
            raise self._error

    def drain(self) -> None:
        """What a signal does."""
        self._loop.call_soon_threadsafe(self.server.begin_drain)

    def client(self, token: str | None = None) -> httpx.Client:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        # a machine that is busy answers late; that is no matter of these tests
        return httpx.Client(base_url=self.address, headers=headers, timeout=PATIENCE)

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


def until(is_so: Callable[[], Any]) -> Any:
    """What is so, once it is; asked ever less often, since asking slows down what is awaited."""
    deadline, pause = time.monotonic() + PATIENCE, 0.01
    while not (found := is_so()):
        assert time.monotonic() < deadline
        time.sleep(pause)
        pause = min(1.5 * pause, 0.1)
    return found


@pytest.fixture
def held() -> FakeBackend:
    """Each of its steps waits until the test has set `go`."""
    backend = FakeBackend()
    backend.go.clear()
    return backend


@pytest.fixture(scope="session")
def serving_backend() -> type[HeldBackend]:
    return HeldBackend


@pytest.fixture(scope="session")
def serving() -> Callable[..., Any]:
    """Makes a live service of a backend and settings; to be used in a with statement."""

    @contextmanager
    def live(store: Path, backend: Any = None, **settings: Any) -> Iterator[Live]:
        settings = {"min_free_bytes": 0, "grace": 60.0} | settings
        service = Live(ServingConfig(store=store, **settings), backend or HeldBackend())
        service.start()
        try:
            yield service
        finally:
            if service.thread.is_alive():
                if isinstance(service.backend, HeldBackend):
                    service.backend.let_go()
                service.drain()
            service.thread.join(PATIENCE)
            assert not service.thread.is_alive()

    return live


@pytest.fixture(scope="session")
def serving_engine(serving: Callable[..., Any]) -> Callable[..., Any]:
    """The same with an engine in a worker process, which may still be loading."""

    def live(store: Path, **settings: Any) -> Any:
        settings = {"device": "cpu", "grace": 0.0} | settings
        return serving(store, LocalBackend(ServingConfig(store=store, **settings)), **settings)

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


@pytest.fixture
def sent(tmp_path: Path, source_clip: Path) -> Path:
    """A session's folder that has the clip alone."""
    folder = tmp_path / "session_a"
    folder.mkdir()
    (folder / "source").write_bytes(source_clip.read_bytes())
    return folder


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


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # not for longer: while it is open, nothing else in this thread can run an event loop
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH")
    with launched() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens an address, as `Browser.new_page` does."""
    with opening(browser) as open_one:
        yield open_one
