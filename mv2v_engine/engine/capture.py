"""The seam to CUDA's graphs: capture a function once, replay its launches.

`Recorder` is all that the engine knows of them. `CudaRecorder` keeps one memory pool for all of
its graphs: what one needs between two of its launches, another may use too, as no two ever run at
the same time. Torch gives the pool's bytes back when the last of its graphs is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from mv2v_engine.errors import KernelUnavailableError


class Graph(Protocol):
    """A captured function, on the addresses that it was captured with."""

    def replay(self) -> None: ...

    def reset(self) -> None:
        """Give back what it holds; it cannot be replayed any more."""


class Recorder(Protocol):
    """Captures functions that launch work and neither read nor allocate on the host."""

    def capture(self, run: Callable[[], object]) -> Graph:
        """Record what `run` launches, without executing it.

        Raises:
            RuntimeError: it did what cannot be captured, or memory ran out. Nothing stays open.
        """

    def pool_bytes(self) -> int:
        """The bytes of the pool of all graphs; what CUDA itself keeps for a graph is not told."""

    def enter(self) -> None:
        """A turn begins: it waits for the last one, which may have run on another stream."""

    def pace(self) -> None:
        """Wait until no step but the last one is under way: replays cost the host nothing, and a
        turn whose steps were all launched at once could not be cancelled."""

    def leave(self) -> None:
        """The turn's last launch is made."""


def open_recorder(device: torch.device) -> Recorder:
    """The device's recorder.

    Raises:
        KernelUnavailableError: it has none.
    """
    if device.type != "cuda":
        raise KernelUnavailableError(
            f"graphs need a CUDA device, this engine runs on {device.type}"
        )
    return CudaRecorder(device)


class CudaRecorder:
    """Captures on a stream of its own, while other threads may go on as they like."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self.device)
        self._pool: Any = None
        self._live = 0
        self._left: torch.cuda.Event | None = None
        self._paced: torch.cuda.Event | None = None
        # torch's allocator keeps a pointer to each of these
        self._abandoned: list[torch.cuda.CUDAGraph] = []

    def capture(self, run: Callable[[], object]) -> Graph:
        pool = torch.cuda.graph_pool_handle() if self._pool is None else self._pool
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            # not torch.cuda.graph: where ending a capture fails, it leaves its stream current
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                is_whole = False
                try:
                    run()
                    graph.capture_end()
                    is_whole = True
                finally:
                    if not is_whole:
                        self._abandon(graph, pool)
        self._pool, self._live = pool, self._live + 1
        return _CudaGraph(self, graph)

    def _abandon(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        """End a capture that failed, and what torch leaves open of it.

        `capture_end` raises before the allocator hears of the end, if CUDA has called the capture
        invalid; the allocator would go on as if it were captured from, and keep all it has.
        """
        try:
            graph.capture_end()
        except RuntimeError:
            self._abandoned.append(graph)
            try:
                torch._C._cuda_endAllocateToPool(self.device.index, pool)
            except RuntimeError:
                return  # the allocator had heard
            torch._C._cuda_releasePool(self.device.index, pool)
        else:
            graph.reset()

    def pool_bytes(self) -> int:
        if self._pool is None:
            return 0
        segments = torch.cuda.memory_snapshot(mempool_id=self._pool)
        return sum(int(segment["total_size"]) for segment in segments)

    def enter(self) -> None:
        if self._left is not None:
            self._left.wait(torch.cuda.current_stream(self.device))
        self._paced = None

    def pace(self) -> None:
        before, self._paced = self._paced, self._record()
        if before is not None:
            before.synchronize()

    def leave(self) -> None:
        self._left = self._record()

    def _record(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def forget(self) -> None:
        """One graph less; the pool of none is torch's to free, and its handle is used up."""
        self._live -= 1
        if not self._live:
            self._pool = None
            torch.cuda.empty_cache()


class _CudaGraph:
    def __init__(self, recorder: CudaRecorder, graph: torch.cuda.CUDAGraph) -> None:
        self._recorder, self._graph = recorder, graph

    def replay(self) -> None:
        self._graph.replay()

    def reset(self) -> None:
        # a replay may be under way
        torch.cuda.synchronize(self._recorder.device)
        self._graph.reset()
        self._recorder.forget()
