"""Captured steps on a GPU: real graphs, one pool, and captures that fail."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine import CancelToken, Engine, EngineConfig
from mv2v_engine.engine.capture import CudaRecorder, open_recorder
from mv2v_engine.engine.denoise import denoise
from mv2v_engine.errors import CancelledError
from tests.engine.graphed_turns import Asked, GraphedTurns, steps

pytestmark = pytest.mark.gpu


def turns(mode: Any = "on", dtype: torch.dtype = torch.bfloat16) -> GraphedTurns:
    """Heads of 64, which every attention library takes."""
    recorder = open_recorder(torch.device("cuda"))
    return GraphedTurns(recorder, mode, device="cuda", dtype=dtype, attention_head_dim=64)


def settled() -> int:
    """Bytes of live tensors, with what was waiting to be freed gone."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("merge", ["conv", "discard", "off"])
@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_replay_equals_eager(conditioning: str, merge: str, dtype: torch.dtype) -> None:
    run = turns(dtype=dtype)
    plan, first = run.plan(conditioning, merge=merge), int(conditioning == "static")
    for seed, scale in enumerate((4.0, 4.0, 1.7)):
        report = run.check(plan, Asked(seed, 5 - seed, scale))
        assert report["replayed_steps"] == (3, 4 - first, 3 - first)[seed]
    assert report["bytes"]["pool"] > 0 and (report["bytes"]["arena"] > 0) == bool(first)
    assert run.check(plan, Asked(4, 4, solver="unipc"))["captured_steps"] == 1
    run.graphs.clear()


def test_two_plans_share_the_pool_and_the_arena() -> None:
    run = turns()
    large, small = run.plan("static", 3), run.plan("static", 1)
    for seed, plan in enumerate((large, small, large, small, run.plan("joint", 2), large, small)):
        run.check(plan, Asked(seed, 4, 3.0))
    assert len(run.graphs) == 3
    assert run.check(large, Asked(9))["captured_steps"] == 0


def test_everything_is_given_back() -> None:
    run = turns()
    plan = run.plan("static", 3)
    run.run(plan, Asked(), None)  # what libraries allocate once
    before, reserved = settled(), torch.cuda.memory_reserved()
    for _ in range(3):
        run.check(plan)
        run.check(run.plan("joint", 3))
        assert settled() > before
        run.graphs.clear()
        assert settled() <= before + (1 << 20)
    assert torch.cuda.memory_reserved() <= reserved + (32 << 20)


@pytest.mark.parametrize("kind", ["a host read", "an exception"])
def test_a_capture_that_fails_leaves_an_eager_turn(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = turns("auto")
    plan, other = run.plan(merge="off"), run.plan("static")
    run.check(other)
    head = run.model._head

    def failing(x: Tensor, *rest: Any) -> Tensor:
        if kind == "an exception" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not while capturing")
        return head(x * float(x.isfinite().all()), *rest)

    before = settled()
    with monkeypatch.context() as patch:
        patch.setattr(run.model, "_head", failing)
        report = run.check(plan, Asked(1, 4))
        assert steps(report) == (4, 0, 0) and "could not be captured" in report["reason"]
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert settled() <= before + (1 << 20)
    # graphs made before the failure and after it serve
    assert run.check(other, Asked(2))["captured_steps"] == 0
    assert run.check(run.plan("joint", 3))["captured_steps"] == 1
    run.graphs.clear()
    assert run.check(plan)["captured_steps"] == 1


def test_another_thread_works_on_while_a_step_is_captured() -> None:
    run, stop, wrong = turns(), threading.Event(), list[str]()
    plan = run.plan("joint", 3)
    expected = run.run(plan, Asked(1), None).latents

    def work() -> None:
        while not stop.is_set():
            got = run.run(plan, Asked(1), None).latents
            # new sizes make the allocator ask the driver for memory
            torch.empty(torch.randint(1 << 22, 1 << 26, ()).item(), device="cuda")
            if not torch.equal(got, expected):
                wrong.append("another result")

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for seed in range(4):
            assert run.check(run.plan("static", seed))["captured_steps"] == 1
    finally:
        stop.set()
        thread.join()
    assert wrong == []


def test_a_cancelled_turn_has_one_step_under_way() -> None:
    run, token = turns(), CancelToken()
    plan = run.plan()
    run.check(plan)
    recorder = run.graphs._recorder
    assert isinstance(recorder, CudaRecorder)
    turn = denoise(run.denoiser(plan, Asked(steps=50), run.graphs), token)
    waited = []
    for _ in range(10):
        before = recorder._paced
        next(turn)
        waited.append(before is None or before.query())
    assert all(waited)
    token.cancel()
    with pytest.raises(CancelledError):
        next(turn)
    assert steps(run.check(plan)) == (0, 0, 3)


@pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="the VAE needs the package diffusers"
)
@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_turns_of_an_engine(
    tiny_checkpoint: Path, source_frames: Tensor, conditioning: Any
) -> None:
    found = []
    for mode in ("off", "on"):
        config = EngineConfig(conditioning=conditioning, memory="retrieved", graphs=mode)  # type: ignore[arg-type]
        engine = Engine.from_pretrained(
            tiny_checkpoint, device="cuda", dtype=torch.float32, config=config
        )
        session = engine.session(source_frames)
        for camera in ("pan_right", "arc_left"):
            session.render(camera, seed=3, num_inference_steps=4)
        found.append(session.turns)
    for eager, captured in zip(*found, strict=True):
        assert torch.equal(eager.latents, captured.latents)
        assert captured.report["graphs"]["captured_steps"] == 1
