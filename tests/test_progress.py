"""Progress: spans that add up, cancellation from any thread."""

from __future__ import annotations

import threading
import time

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


def test_a_token_cancels_at_the_next_check() -> None:
    token = CancelToken()
    token.check()
    assert not token.cancelled
    thread = threading.Thread(target=token.cancel)
    thread.start()
    thread.join()
    assert token.cancelled
    for _ in range(2):
        with pytest.raises(CancelledError, match="keeps its earlier turns"):
            token.check()
