"""CudaRecorder on a torch.cuda that is acted out: what a failed capture leaves open is ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from mv2v_engine.engine.capture import CudaRecorder, open_recorder
from mv2v_engine.errors import KernelUnavailableError


class Driver:
    """What torch.cuda and its allocator would know. capturing: pools that captures allocate from;
    uses: of every pool, by its graphs and captures."""

    def __init__(self) -> None:
        self.capturing: list[Any] = []
        self.uses: dict[Any, int] = {}
        self.streams = ["default"]
        self.handles = 0
        self.is_valid = True

    def handle(self) -> tuple[int, int]:
        self.handles += 1
        return (0, self.handles)

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.streams.append(stream)
        try:
            yield
        finally:
            self.streams.pop()

    def end_allocating(self, device: int, pool: Any) -> None:
        if pool not in self.capturing:
            raise RuntimeError("not currently recording to mempool_id")
        self.capturing.remove(pool)

    def release(self, device: int, pool: Any) -> None:
        self.uses[pool] -= 1

    def snapshot(self, mempool_id: Any) -> list[dict[str, int]]:
        return [{"total_size": 7}, {"total_size": 3}]


class Graph:
    """Like torch's: `capture_end` raises before the allocator hears of a capture that is lost."""

    def __init__(self, driver: Driver) -> None:
        self.driver, self.pool, self.replays = driver, None, 0
        self.is_open = self.is_whole = False

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local" and self.driver.streams[-1] != "default"
        # a pool that none uses any more is torch's to free, and may not be taken up again
        assert self.driver.uses.get(pool) != 0
        self.pool, self.is_open = pool, True
        self.driver.capturing.append(pool)
        self.driver.uses[pool] = self.driver.uses.get(pool, 0) + 1

    def capture_end(self) -> None:
        is_valid, self.driver.is_valid = self.is_open and self.driver.is_valid, True
        self.is_open = False
        if not is_valid:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.driver.capturing.remove(self.pool)
        self.is_whole = True

    def replay(self) -> None:
        self.replays += 1

    def reset(self) -> None:
        if self.is_whole:
            self.driver.release(0, self.pool)
        self.is_whole = False


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    acted: dict[str, Any] = {
        "CUDAGraph": lambda: Graph(driver),
        "Stream": lambda device: f"stream of {device}",
        "current_device": lambda: 0,
        "device": lambda device: driver.stream(driver.streams[-1]),
        "empty_cache": lambda: None,
        "graph_pool_handle": driver.handle,
        "memory_snapshot": driver.snapshot,
        "stream": driver.stream,
        "synchronize": lambda device=None: None,
    }
    for name, stand_in in acted.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    internal = {
        "_cuda_endAllocateToPool": driver.end_allocating,
        "_cuda_releasePool": driver.release,
    }
    for name, function in internal.items():
        monkeypatch.setattr(torch._C, name, function, raising=False)
    return driver


def test_graphs_share_a_pool_until_the_last_is_gone(driver: Driver) -> None:
    recorder = CudaRecorder(torch.device("cuda"))
    assert recorder.pool_bytes() == 0
    first, second = (recorder.capture(lambda: None) for _ in range(2))
    assert driver.uses == {(0, 1): 2} and recorder.pool_bytes() == 10
    first.reset()
    assert driver.uses == {(0, 1): 1} and recorder.pool_bytes() == 10
    second.reset()
    assert driver.uses == {(0, 1): 0} and recorder.pool_bytes() == 0
    # torch frees that pool when it likes: the next capture begins another
    recorder.capture(lambda: None)
    assert driver.uses == {(0, 1): 0, (0, 2): 1}


def losing(driver: Driver) -> Callable[[], None]:
    def read_on_host() -> None:
        driver.is_valid = False
        raise RuntimeError("operation not permitted when stream is capturing")

    return read_on_host


def silently_losing(driver: Driver) -> Callable[[], None]:
    def swallow() -> None:
        driver.is_valid = False

    return swallow


def failing(driver: Driver) -> Callable[[], None]:
    def fail() -> None:
        raise ZeroDivisionError

    return fail


@pytest.mark.parametrize("failure", [losing, silently_losing, failing])
@pytest.mark.parametrize("has_graphs", [False, True])
def test_a_failed_capture_is_ended(
    driver: Driver, failure: Callable[[Driver], Callable[[], None]], has_graphs: bool
) -> None:
    recorder = CudaRecorder(torch.device("cuda", 0))
    if has_graphs:
        recorder.capture(lambda: None)
    with pytest.raises((RuntimeError, ZeroDivisionError)) as caught:
        recorder.capture(failure(driver))
    # what went wrong, not that the end of the capture failed as well
    expected = {losing: "not permitted", silently_losing: "previous error", failing: ""}
    assert expected[failure] in str(caught.value)
    assert driver.capturing == [] and driver.streams == ["default"]
    assert sum(driver.uses.values()) == int(has_graphs)
    graph = recorder.capture(lambda: None)
    graph.replay()
    assert recorder.pool_bytes() == 10 and sum(driver.uses.values()) == 1 + has_graphs


def test_no_device_no_recorder() -> None:
    with pytest.raises(KernelUnavailableError, match="need a CUDA device"):
        open_recorder(torch.device("cpu"))
