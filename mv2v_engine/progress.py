"""Progress as typed events from one iterator; bars, streams and callbacks are adapters over it.

A turn is a generator of events. `Spans` opens a stage's ranges (NVTX's, torch's profiler's and
those of `watching_stages`), its timer and its event in one place, under the folder's name (video,
vae, text, memory, sampling).
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from mv2v_engine.arguments import callback, instance
from mv2v_engine.errors import CancelledError

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class StageStarted:
    stage: str


@dataclass(frozen=True, slots=True)
class StepDone:
    """step of total is done; seconds_left is extrapolated from the steps so far."""

    stage: str
    step: int
    total: int
    seconds_left: float


@dataclass(frozen=True, slots=True)
class StageDone:
    stage: str
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class Preview:
    """What the video looks like after step of total, for who asked for previews.

    picture: uint8 [H, W, 3] on the CPU, a pixel for each latent cell of the window's middle frame,
    of the clean latents that the step predicts. On a GPU it comes a step later than its StepDone.
    """

    step: int
    total: int
    picture: Tensor


@dataclass(frozen=True, slots=True)
class TurnNotStored:
    """The turn is finished, and the session's folder did not take it; it is tried again later."""

    turn: int
    reason: str


@dataclass(frozen=True, slots=True)
class WindowStarted:
    """Window `number` of a long edit's `total` begins, counted from 1."""

    number: int
    total: int


@dataclass(frozen=True, slots=True)
class WindowDone:
    """Window `number` of `total` is finished and kept.

    seconds_left: of all the windows to come, extrapolated from those of this run.
    """

    number: int
    total: int
    seconds_left: float


Event = StageStarted | StepDone | Preview | StageDone | TurnNotStored | WindowStarted | WindowDone


class CancelToken:
    """Set from any thread; the turn under way raises `CancelledError` at its next step.

    While the VAE works, at its next chunk of frames.
    """

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        self._event.set()

    @property
    def cancelled(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        if self.cancelled:
            raise CancelledError("cancelled; what was finished before is kept")


def cancel_token(cancel: CancelToken | None) -> CancelToken:
    """The token that a caller passed, or a new one.

    Raises:
        RequestError: it is none.
    """
    if cancel is None:
        return CancelToken()
    return instance("cancel", cancel, CancelToken, "a CancelToken, or None")


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers from drawing bars of its own while it loads."""
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()


def host_bytes(pid: int | None = None) -> int:
    """The memory that a process, or this one, holds now; 0 where the system does not say."""
    try:
        return _status_bytes("VmRSS", "self" if pid is None else str(pid))
    except (OSError, ValueError):
        return 0


def _status_bytes(name: str, process: str = "self") -> int:
    fields = Path(f"/proc/{process}/status").read_text(encoding="ascii").split()
    return int(fields[fields.index(f"{name}:") + 1]) * 1024


def peak_host_bytes() -> int:
    """The most memory that this process has held so far; 0 where the system does not say."""
    if sys.platform == "win32":
        return 0
    try:
        # getrusage also counts what the process was before its program began: its parent's memory
        return _status_bytes("VmHWM")
    except (OSError, ValueError):
        pass  # no Linux, or one without /proc
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


OpenRange = Callable[[str], AbstractContextManager[object]]
_RANGES: ContextVar[tuple[OpenRange, ...]] = ContextVar("ranges", default=())


@contextmanager
def watching_stages(open_range: OpenRange) -> Iterator[None]:
    """Around every stage that this thread runs in the block, a range of the caller's own.

    open_range: makes the range of a stage's name; ranges of turns that run together end in any
        order. An exception that ends a stage passes through its range.
    """
    token = _RANGES.set((*_RANGES.get(), open_range))
    try:
        yield
    finally:
        _RANGES.reset(token)


@dataclass(eq=False)
class _Peak:
    """A stage under way on a GPU: the most it has seen before the device's peak was reset."""

    device: torch.device
    bytes: int = 0


class Spans:
    """Seconds and peak bytes per stage of one turn, on the device that does the work.

    On a GPU the bytes are the most that was allocated while the stage ran, by whomever: stages of
    turns that run together overlap. A CPU tells no turn's bytes apart: they are the most that the
    whole process has held up to the stage's end. `peak_name` is what a report calls either.
    current: the stage under way, or the last one.
    """

    _peaks: ClassVar[list[_Peak]] = []

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        self.current = ""
        self.peak_name = "peak_bytes" if device.type == "cuda" else "process_peak_bytes"

    @contextmanager
    def stage(self, name: str) -> Iterator[StageStarted]:
        """Time a stage; yields its event for the caller to pass on. Stages of one name add up."""
        self.current = name
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            # not a stack: stages of turns that run together end in any order
            span = torch.cuda.nvtx.range_start(name)
            seen = self._watch_peak()
        began = time.perf_counter()
        try:
            with ExitStack() as ranges:
                # what torch's profiler shows, on any device, and whoever watches
                for open_range in (torch.profiler.record_function, *_RANGES.get()):
                    ranges.enter_context(open_range(name))
                yield StageStarted(name)
        finally:
            if on_gpu:
                torch.cuda.synchronize(self.device)
                peak = max(seen.bytes, torch.cuda.max_memory_allocated(self.device))
                self._peaks.remove(seen)
                torch.cuda.nvtx.range_end(span)
            else:
                peak = peak_host_bytes()
            self.peak_bytes[name] = max(peak, self.peak_bytes.get(name, 0))
            spent = time.perf_counter() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + spent

    def _watch_peak(self) -> _Peak:
        """Begin a stage's peak without losing what the others under way have seen."""
        highest = torch.cuda.max_memory_allocated(self.device)
        for other in list(self._peaks):
            if other.device == self.device:
                other.bytes = max(other.bytes, highest)
        torch.cuda.reset_peak_memory_stats(self.device)
        own = _Peak(self.device)
        self._peaks.append(own)
        return own

    def done(self, name: str) -> StageDone:
        """The closing event of a stage."""
        return StageDone(name, self.seconds[name])


def driven(
    events: Generator[Event, None, Result], on_progress: Callable[[Event], None] | None
) -> Result:
    """Run a turn to its end; what it returns.

    Raises:
        RequestError: on_progress is no function.
    """
    callback("on_progress", on_progress)
    while True:
        try:
            event = next(events)
        except StopIteration as stop:
            result: Result = stop.value
            return result
        if on_progress is not None:
            on_progress(event)


def staged(spans: Spans, name: str, work: Callable[[], Result]) -> Generator[Event, None, Result]:
    """Do a stage's work between its two events."""
    with spans.stage(name) as started:
        yield started
        result = work()
    yield spans.done(name)
    return result
