"""Progress: spans that add up, cancellation from any thread."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from mv2v_engine.errors import CancelledError
from mv2v_engine.progress import CancelToken, Spans, StageDone, StageStarted, peak_host_bytes


def test_spans_of_one_name_add_up() -> None:
    spans = Spans(torch.device("cpu"))
    began = time.perf_counter()
    for _ in range(3):
        with spans.stage("vae") as event:
            assert event == StageStarted("vae")
            time.sleep(0.02)
    with spans.stage("text"):
        pass
    spent = time.perf_counter() - began
    assert 0.06 <= spans.seconds["vae"] <= spent
    assert list(spans.seconds) == ["vae", "text"]
    assert sum(spans.seconds.values()) <= spent
    assert spans.done("vae") == StageDone("vae", spans.seconds["vae"])
    # on a CPU the process's own peak, which no stage can be below
    assert list(spans.peak_bytes) == ["vae", "text"]
    assert 1 << 20 < spans.peak_bytes["vae"] <= spans.peak_bytes["text"] <= peak_host_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="what it started from is told on Linux alone")
def test_a_process_does_not_count_its_parents_memory() -> None:
    held = torch.ones(1 << 28, dtype=torch.uint8)  # 256 MiB
    code = "from mv2v_engine.progress import peak_host_bytes as p; b = bytes(1 << 26); print(p())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (own,) = re.findall(r"^VmRSS:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert int(held.sum()) == 1 << 28
    # the same libraries, and 64 MiB where this one holds 256
    assert 1 << 26 < int(done.stdout) < 1024 * int(own) - (1 << 26)


def test_a_failed_stage_is_timed_too() -> None:
    spans = Spans(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="broken"), spans.stage("vae"):
        time.sleep(0.01)
        raise RuntimeError("broken")
    assert spans.seconds["vae"] >= 0.01


def test_nested_stages_are_timed_separately() -> None:
    spans = Spans(torch.device("cpu"))
    with spans.stage("sampling"), spans.stage("models"):
        time.sleep(0.01)
    assert spans.seconds["sampling"] >= spans.seconds["models"] >= 0.01


def test_stages_that_overlap_each_see_the_peak_of_their_own_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against a stand-in for the GPU's counters: the highest since the last reset."""
    allocated, highest, ranges = 0, 0, list[str]()

    def allocate(number: int) -> None:
        nonlocal allocated, highest
        allocated, highest = number, max(highest, number)

    def reset(device: torch.device) -> None:
        nonlocal highest
        highest = allocated

    def begin(name: str) -> str:
        ranges.append(name)
        return name

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: highest)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda.nvtx, "range_start", begin)
    monkeypatch.setattr(torch.cuda.nvtx, "range_end", ranges.remove)
    allocate(50)
    first, second = (Spans(torch.device("cuda", 0)) for _ in range(2))
    one, two = first.stage("sampling"), second.stage("vae")
    allocate(10)
    one.__enter__()
    allocate(30)
    allocate(20)
    two.__enter__()
    allocate(25)
    one.__exit__(None, None, None)
    allocate(40)
    two.__exit__(None, None, None)
    assert first.peak_bytes == {"sampling": 30} and second.peak_bytes == {"vae": 40}
    with first.stage("sampling"), first.stage("models"):
        allocate(60)
    assert first.peak_bytes == {"sampling": 60, "models": 60} and not ranges


def test_a_token_cancels_at_the_next_check() -> None:
    token = CancelToken()
    token.check()
    assert not token.cancelled
    thread = threading.Thread(target=token.cancel)
    thread.start()
    thread.join()
    assert token.cancelled
    for _ in range(2):
        with pytest.raises(CancelledError, match="cancelled; what was finished before is kept"):
            token.check()
