"""Skipped steps: what is run, told and let go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mv2v_engine import CancelToken, Engine, EngineConfig
from mv2v_engine.engine.denoise import denoise
from mv2v_engine.engine.report import turn_flops
from mv2v_engine.errors import CancelledError, RequestError
from mv2v_engine.testing import cpu_flops, relative_error
from mv2v_engine.tokens.flops import residual_bytes
from tests.engine.graphed_turns import Asked, StandInTurns

STEPS, SCALE = 5, 4.0


def asked(step_cache: float | None = None, scale: float = SCALE, solver: str = "euler") -> Asked:
    return Asked(steps=STEPS, scale=scale, solver=solver, step_cache=step_cache)


@pytest.mark.parametrize("solver", ["euler", "unipc"])
@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_the_closed_gate_is_the_exact_path_bit_for_bit(conditioning: str, solver: str) -> None:
    turns = StandInTurns()
    plan = turns.plan(conditioning)
    exact, turn = (turns.run(plan, asked(gate, solver=solver), None) for gate in (None, 0.0))
    assert exact.reuse is None and turn.reuse is not None
    assert turn.reuse["steps_computed"] == list(range(STEPS))
    assert torch.equal(turn.latents, exact.latents)
    for ours, theirs in zip(turn.records, exact.records, strict=True):
        assert torch.equal(ours.merged, theirs.merged)


@pytest.mark.parametrize("conditioning", ["joint", "static"])
@pytest.mark.parametrize("scale", [1.0, SCALE])
@pytest.mark.parametrize("step_cache", [None, 0.9])
def test_a_turns_flops_are_the_counted_ones(
    conditioning: str, scale: float, step_cache: float | None
) -> None:
    turns = StandInTurns()
    turns.model.set_backend("reference")
    plan = turns.plan(conditioning)
    with FlopCounterMode(display=False, custom_mapping=cpu_flops()) as counter:
        turn = turns.run(plan, asked(step_cache, scale), None)
    steps, work = [record.step for record in turn.records], turn.work
    table = turn_flops(plan, steps, turn.num_forwards if step_cache is None else work)
    assert table["flops"] == counter.get_total_flops()
    assert (table["flops"] < table["flops_exact"]) == (step_cache is not None)
    assert bool(work.get("residual")) == (turn.reuse is not None) == (step_cache is not None)
    assert turn.reuse is None or len(turn.reuse["steps_computed"]) < STEPS


@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_skipped_steps_add_what_the_blocks_added(conditioning: str) -> None:
    turns = StandInTurns()
    plan, model = turns.plan(conditioning, merge="off"), turns.model
    denoiser = turns.denoiser(plan, asked(0.9, 1.0), None)
    assert denoiser.computed[0] and denoiser.computed[-1] and not all(denoiser.computed)
    added, branch = None, denoiser.branches[0]
    while not denoiser.is_finished:
        skips, before = not denoiser.computed[denoiser.index], denoiser.latents
        embedded = model.patch_embedding(before).flatten(2).transpose(1, 2)
        seen: list[Tensor] = []
        handle = model.proj_out.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        denoiser.step()
        handle.remove()
        assert branch.residual is not None and len(seen) == 1
        if skips:
            assert branch.residual.value is added
        else:
            added = branch.residual.value
            assert added is not None and added.shape == embedded.shape
    turn = denoiser.result()
    exact = turns.run(plan, asked(None, 1.0), None)
    assert 1e-4 < relative_error(turn.latents, exact.latents) < 1


@pytest.mark.parametrize("end", ["cancelled", "closed", "failed", "finished"])
def test_nothing_is_kept_after_a_turn(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """Neither what the blocks added nor K and V of static conditioning."""
    turns, token = StandInTurns(), CancelToken()
    plan = turns.plan("static")
    denoiser = turns.denoiser(plan, asked(0.0), None)
    turn, cache = denoise(denoiser, token), denoiser.cache
    next(turn)
    assert cache is not None and cache.is_filled
    for branch in denoiser.branches:
        assert branch.residual is not None
        assert branch.residual.read().untyped_storage().nbytes() == residual_bytes(plan, 4)
    if end == "cancelled":
        token.cancel()
        with pytest.raises(CancelledError):
            next(turn)
    elif end == "closed":
        turn.close()
    elif end == "failed":
        monkeypatch.setattr(turns.model.blocks[1], "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(turn)
    else:
        list(turn)
    for branch in denoiser.branches:
        assert branch.residual is not None and branch.residual.value is None
    assert cache.blocks == [] and cache.cameras is None


def test_a_turns_report(tiny_checkpoint: Path, source_frames: Tensor) -> None:
    config = EngineConfig(step_cache=9.0, merge="off")
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu", config=config)
    report = engine.session(source_frames).render("pan_right", num_inference_steps=4).report
    assert report["conditioning_is_trained"]
    assert report["approximations"] == ["steps skipped below a change of 9"]
    assert report["flops"] < report["flops_exact"]
    reuse, work = report["reuse"], report["work"]
    assert reuse == {"step_cache": 9.0, "steps_computed": [0, 3]}
    assert report["forwards"] == work["whole"] == work["residual"] == 2
    assert report["residual_bytes"] > 0 and report["conditioning_bytes"] == 0

    # these weights say nothing of their training, so static is an approximation on them
    static = engine.reconfigured(EngineConfig(conditioning="static"))
    report = static.session(source_frames).render("pan_right", num_inference_steps=1).report
    assert not report["conditioning_is_trained"] and "reuse" not in report
    assert report["approximations"] == ["static conditioning on weights trained for joint"]
    exact = engine.reconfigured(EngineConfig())
    report = exact.session(source_frames).render("pan_right", num_inference_steps=1).report
    assert report["approximations"] == [] and report["flops"] == report["flops_exact"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reuse": "approximate"}, "approximate reuse of joint conditioning is gone: fewer"),
        ({"step_cache": -1}, "step_cache must be at least 0, got -1"),
        ({"step_cache": float("inf")}, "step_cache must be at least 0 and finite, got inf"),
    ],
)
def test_what_cannot_be(arguments: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        EngineConfig(**arguments)
