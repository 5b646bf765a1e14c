"""Engines with captured steps: whole turns, warm-up, and requests that cannot be met."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mv2v_engine import Engine, EngineConfig
from mv2v_engine.config import ConditioningMode
from mv2v_engine.engine import graphs
from mv2v_engine.engine.request import Request
from mv2v_engine.errors import KernelUnavailableError, RequestError
from mv2v_engine.testing import tiny_config
from mv2v_engine.tokens.plan import novel_view_plan, turn_plan
from tests.engine.graph_stand_in import StandIn

CAMERAS = ("pan_right", "arc_left", "tilt_up")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    recorder = StandIn()
    monkeypatch.setattr(graphs, "open_recorder", lambda device: recorder)
    return recorder


def _engines(checkpoint: Path, conditioning: ConditioningMode) -> tuple[Engine, Engine]:
    """On the same weights, one without graphs and one with."""
    config = EngineConfig(conditioning=conditioning, merge="conv", memory="retrieved", graphs="off")
    plain = Engine.from_pretrained(checkpoint, device="cpu", config=config)
    return plain, plain.reconfigured(replace(config, graphs="on"))


def _latents(engine: Engine, frames: Tensor, cameras: tuple[str, ...] = CAMERAS) -> list[Tensor]:
    session = engine.session(frames)
    for seed, camera in enumerate(cameras):
        session.render(camera, seed=seed, prompt="red ball", guidance_scale=3.0)
    return [turn.latents for turn in session.turns]


@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_turns_with_graphs_are_those_without(
    worded_checkpoint: Path,
    source_frames: Tensor,
    recorder: StandIn,
    conditioning: ConditioningMode,
) -> None:
    """Each turn has a plan of its own, as memory grows; later sessions find them captured."""
    plain, engine = _engines(worded_checkpoint, conditioning)
    expected = _latents(plain, source_frames)
    # the arena grows once, and the first static plan's graph goes with the old one
    for captures in (3, 3) if conditioning == "joint" else (3, 4, 4):
        for ours, theirs in zip(_latents(engine, source_frames), expected, strict=True):
            assert torch.equal(ours, theirs)
        assert recorder.captures == captures
    engine.graphs.clear()
    assert not recorder.live and not recorder.turns


def test_a_report_says_how_the_steps_ran(
    tiny_checkpoint: Path, source_frames: Tensor, recorder: StandIn
) -> None:
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu")
    session = engine.session(source_frames)
    first, second = (session.render("pan_left", memory="none").report["graphs"] for _ in range(2))
    counts = ("eager_steps", "captured_steps", "replayed_steps")
    assert [first[name] for name in counts] == [1, 1, 1]
    assert [second[name] for name in counts] == [0, 0, 3]
    assert second["mode"] == "auto" and second["reason"] is None
    assert second["bytes"]["pool"] == recorder.pool > 0 and second["bytes"]["buffers"] > 0
    reusing = engine.reconfigured(EngineConfig(step_cache=0.1)).session(source_frames)
    report = reusing.render("pan_left").report["graphs"]
    assert report["eager_steps"] == 3 and "what earlier ones left" in report["reason"]
    off = engine.reconfigured(EngineConfig(graphs="off")).session(source_frames)
    report = off.render("pan_left").report["graphs"]
    assert (report["eager_steps"], report["reason"]) == (3, "graphs are off")


@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_after_a_warm_up_nothing_is_captured(
    worded_checkpoint: Path,
    source_frames: Tensor,
    recorder: StandIn,
    conditioning: ConditioningMode,
) -> None:
    plain, engine = _engines(worded_checkpoint, conditioning)
    size, frames = engine.sampling.size, engine.sampling.num_frames
    plans = [
        novel_view_plan(
            memory=memory,
            frames=frames,
            size=size,
            conditioning=conditioning,
            shape=engine.transformer.config,
            spatial_stride=engine.vae.spatial_stride,
        )
        for memory in (0, 1, 2)
    ]
    session = engine.session(source_frames)
    request = Request.view("pan_right", engine.sampling, memory="retrieved")
    assert session.plan_turn(request)[1] == plans[0]
    rows = engine.warmup([*plans, plans[0]], guidance_scale=3.0)
    assert [row["tokens"] for row in rows] == [plan.length for plan in reversed(plans)]
    assert all(row["captured_steps"] == 1 and row["reason"] is None for row in rows)
    warm = recorder.captures
    assert warm == 3

    expected = _latents(plain, source_frames)
    for ours, theirs in zip(_latents(engine, source_frames), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert recorder.captures == warm


def test_a_cpu_has_no_graphs(tiny_checkpoint: Path, source_frames: Tensor) -> None:
    with pytest.raises(
        KernelUnavailableError,
        match=r'graphs="on" was asked for, but graphs need a CUDA device, .* runs on cpu; use',
    ):
        Engine.from_pretrained("no-such-checkpoint", device="cpu", config=EngineConfig(graphs="on"))
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu")
    session = engine.session(source_frames)
    request = Request.view("pan_right", engine.sampling, memory="none")
    (row,) = engine.warmup([session.plan_turn(request)[1]])
    assert (row["eager_steps"], row["captured_steps"], row["mode"]) == (1, 0, "auto")
    report = session.render("pan_right").report["graphs"]
    assert report["eager_steps"] == 3 and "runs on cpu" in report["reason"]


def test_what_cannot_be_met_is_refused(engine: Engine) -> None:
    with pytest.raises(RequestError, match=r'graphs="on" cannot be met with merge_scope="joint"'):
        EngineConfig(graphs="on", merge_scope="joint")
    EngineConfig(graphs="on", merge_scope="joint", merge="off")
    with pytest.raises(RequestError, match="find what earlier ones left"):
        EngineConfig(graphs="on", step_cache=0.1)
    with pytest.raises(RequestError, match="graph_bytes must be at least 0, got -"):
        EngineConfig(graph_bytes=-1)
    with pytest.raises(RequestError, match="of another transformer than the engine's"):
        engine.warmup([turn_plan(tiny_config(), (3, 6, 10), ())])
