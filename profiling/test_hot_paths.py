"""The hot paths under pytest-benchmark, on one thread, in seconds of the process.

`pytest profiling/test_hot_paths.py --benchmark-json profiling/results/hot_paths.json`

The committed file is the baseline that `gate.py` takes its commit from; add
`--benchmark-compare=profiling/results/hot_paths.json` to see its times beside new ones.
"""

from __future__ import annotations

import time

import pytest
import torch
from hot_paths import CASES

pytest.importorskip("pytest_benchmark")


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("name", CASES)
def test_hot_path(benchmark, name: str) -> None:  # type: ignore[no-untyped-def]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            benchmark(CASES[name]())
    finally:
        torch.set_num_threads(threads)
