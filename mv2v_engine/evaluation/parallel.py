"""Scenes measured one after the other, or in several processes with an engine each.

On a CPU processes scale where threads do not: a small model's operations are too short to share.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch

from mv2v_engine.engine.engine import Engine
from mv2v_engine.errors import MemoryBudgetError, RequestError

_MOST_JOBS = 8  # the default's limit: every process holds an engine of its own

Measures = dict[str, Any]
MeasureFn = Callable[[Engine, int], Measures]


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """jobs: how many. load: an engine for each; both are sent to another interpreter."""

    jobs: int
    load: Callable[[], Engine]

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise RequestError(f"an evaluation needs at least 1 job, got {self.jobs}")


def default_jobs(device: str | None) -> int:
    """A process for every thread of a CPU, at most 8; one for a GPU, which None prefers."""
    is_cpu = device == "cpu" or (device is None and not torch.cuda.is_available())
    return min(torch.get_num_threads(), _MOST_JOBS) if is_cpu else 1


def measure_all(
    engine: Engine, seeds: Sequence[int], measure: MeasureFn, processes: Processes
) -> Generator[Measures]:
    """`measure(engine, seed)` of every seed, in order, as they become ready.

    Args:
        measure: picklable if there are processes; what it raises is raised here.

    Raises:
        MemoryBudgetError: a process was killed.
    """
    jobs = min(processes.jobs, len(seeds))
    if jobs <= 1:
        for seed in seeds:
            yield measure(engine, seed)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    # forked processes would inherit threads' locks in whatever state they are
    pool = ProcessPoolExecutor(
        jobs, get_context("spawn"), _begin, (processes.load, measure, threads)
    )
    try:
        yield from pool.map(_measure, seeds)
    except BrokenProcessPool as error:
        raise MemoryBudgetError(
            f"one of {jobs} measuring processes was killed, most likely for want of memory; what "
            "is measured is kept: go on with --resume and fewer --jobs"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_own: tuple[Engine, MeasureFn] | None = None


def _begin(load: Callable[[], Engine], measure: MeasureFn, threads: int) -> None:
    global _own
    torch.set_num_threads(threads)
    _own = load(), measure


def _measure(seed: int) -> Measures:
    assert _own is not None
    engine, measure = _own
    return measure(engine, seed)
