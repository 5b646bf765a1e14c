"""Blocks of streams made by a host: whatever was cut off, the video is the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mv2v_engine import CancelToken, Engine
from mv2v_engine.engine.stream_folder import StreamFolder
from mv2v_engine.serving.store.streams import engine_folder, video_path
from mv2v_engine.serving.watch.logs import _IDS
from mv2v_engine.serving.work import worker
from mv2v_engine.serving.work.host import Host
from mv2v_engine.serving.work.open_streams import OpenStreams
from mv2v_engine.video.fragments import fragment_ends

COUNT = 4
Json = dict[str, Any]


@pytest.fixture(scope="module")
def causal(causal_folder: Path) -> Engine:
    return Engine.from_pretrained(causal_folder, device="cpu")


def asked(number: int, **more: Any) -> Json:
    return {
        "id": "s",
        "number": number,
        "prompt": "a ball",
        "seed": 1,
        "policy": None,
        "source": None,
        **more,
    }


def made(streams: OpenStreams, folder: Path, number: int, steps: int | None = None) -> Json | None:
    """A block of a number; steps: broken off behind so many of its events."""
    work = streams.block(asked(number), folder, CancelToken())
    try:
        while steps is None or (steps := steps - 1) >= 0:
            next(work)
    except StopIteration as end:
        answer: Json = end.value
        return answer
    return None


@pytest.fixture(scope="module")
def unbroken(causal: Engine, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder, streams = tmp_path_factory.mktemp("unbroken"), OpenStreams(causal, 1)
    for number in range(1, COUNT + 1):
        answer = made(streams, folder, number)
        assert answer is not None and answer["end"] == video_path(folder).stat().st_size
    streams.close()
    return video_path(folder).read_bytes()


@pytest.mark.parametrize("stop", range(1, COUNT + 1))
@pytest.mark.parametrize("harm", ["step", "stored", "torn", "lost"])
def test_a_stream_goes_on_wherever_its_worker_was_killed(
    causal: Engine, unbroken: bytes, tmp_path: Path, stop: int, harm: str
) -> None:
    """In a step, between a block and its fragment, in a fragment; or the video is lost."""
    streams, video = OpenStreams(causal, 1), video_path(tmp_path)
    for number in range(1, stop):
        made(streams, tmp_path, number)
    made(streams, tmp_path, stop, steps=2 if harm == "step" else None)
    ends = fragment_ends(video)
    if harm == "stored":
        with video.open("r+b") as file:
            file.truncate(ends[-2] if len(ends) > 1 else 0)
    elif harm == "torn":
        with video.open("r+b") as file:
            file.truncate(ends[-1] - 7)
    elif harm == "lost":
        video.unlink()
    # nothing that was in memory is used any more
    again = OpenStreams(causal, 1)
    assert StreamFolder(engine_folder(tmp_path)).exists()
    for number in range(len(fragment_ends(video)) + 1, COUNT + 1):
        answer = made(again, tmp_path, number)
        assert answer is not None and answer["end"] == fragment_ends(video)[number - 1]
    assert video.read_bytes() == unbroken
    again.close()


def test_what_is_not_used_is_let_go(causal: Engine, tmp_path: Path) -> None:
    streams = OpenStreams(causal, 1)
    for name in ("a", "b", "a"):
        folder = tmp_path / name
        number = len(fragment_ends(video_path(folder))) + 1
        for _ in streams.block(asked(number) | {"id": name}, folder, CancelToken()):
            pass
        assert list(streams._open) == [name]


class Steps:
    """A host whose turns and blocks are so many steps, and that notes whose each was."""

    def __init__(self, count: int) -> None:
        self.count, self.log, self.ids = count, list[str](), list[Json]()

    def run(
        self, job: Json, session: Json, folder: Path, cancel: CancelToken, tell: Any
    ) -> Iterator[None]:
        yield from self._steps(session["id"])
        tell({"type": "done"})

    def block(self, asked: Json, folder: Path, cancel: CancelToken, tell: Any) -> Iterator[None]:
        yield from self._steps(asked["id"])
        tell({"type": "block", "number": asked["number"]})

    def _steps(self, name: str) -> Iterator[None]:
        for _ in range(self.count):
            self.log.append(name)
            self.ids.append(_IDS.get())
            yield

    def tick(self) -> None:
        pass


class Asked:
    """The orders of a server that wants block after block of each stream, and one turn."""

    def __init__(self, host: Steps, blocks: int) -> None:
        self.host, self.left, self.is_closed = host, {"a": blocks, "b": blocks}, False
        self.orders = [self._block(name) for name in self.left]
        turn = {"type": "run", "job": {"id": "t"}, "session": {"id": "turn"}, "folder": "."}
        self.orders.append(turn)

    def _block(self, name: str) -> Json:
        self.left[name] -= 1
        stream = {"id": name, "number": 1}
        return {"type": "block", "call": name, "stream": stream, "folder": "."}

    def come(self, *, waits: bool) -> list[Json]:
        orders, self.orders = self.orders, []
        self.is_closed = waits and not orders
        return orders

    @contextmanager
    def token(self, name: str) -> Iterator[CancelToken]:
        yield CancelToken()

    def write(self, line: bytes) -> None:
        """The pipe: an answer is followed by the next order."""
        call = worker.decode(line).get("call")
        if call is not None and self.left[call]:
            self.orders.append(self._block(call))


def test_streams_and_turns_take_steps_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Steps(8)
    orders = Asked(host, blocks=2)
    monkeypatch.setattr(Host, "tick", Steps.tick)
    worker.serve(orders, host, orders, lambda *ids: _nothing())  # type: ignore[arg-type]
    assert {name: host.log.count(name) for name in "ab"} == {"a": 16, "b": 16}
    assert host.log.count("turn") == 8
    # a line of the log says whose it is, though all are steps of one thread
    lines = {"turn": {"session": "turn", "job": "t"}, "a": {"stream": "a"}, "b": {"stream": "b"}}
    assert host.ids == [lines[name] for name in host.log] and not _IDS.get()
    # as long as all three have work, nobody is more than a step ahead, also between two blocks
    for at in range(24):
        counts = [host.log[: at + 1].count(name) for name in ("a", "b", "turn")]
        assert max(counts) - min(counts) <= 1


@contextmanager
def _nothing() -> Iterator[None]:
    yield
