"""Skipped steps: what is run, told and let go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mv2v_engine import CancelToken, Engine, EngineConfig
from mv2v_engine.engine.denoise import Denoised, Denoiser, denoise
from mv2v_engine.engine.report import turn_flops
from mv2v_engine.engine.step import Conditioning
from mv2v_engine.errors import CancelledError, RequestError
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.sampling.flow_match import make_solver
from mv2v_engine.testing import cpu_flops, randomise, relative_error, tiny_config
from mv2v_engine.tokens.flops import residual_bytes
from mv2v_engine.tokens.plan import TokenPlan, turn_plan

GRID, STEPS, SCALE = (3, 6, 10), 5, 4.0
EXACT = EngineConfig()


@pytest.fixture
def model() -> MV2VTransformer:
    model = MV2VTransformer(tiny_config()).eval().requires_grad_(False)
    randomise(model)
    return model


def _plan(**arguments: Any) -> TokenPlan:
    return turn_plan(tiny_config(), GRID, (4, 4), **{"merge": "conv", "fraction": 0.5} | arguments)


def _denoiser(
    model: MV2VTransformer, plan: TokenPlan, config: EngineConfig, *, scale: float = SCALE
) -> Denoiser:
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(1, 4, *s.grid, generator=generator) for s in plan.segments[1:]]
    cameras = torch.randn(1, len(plan.segments), GRID[0], 12, generator=generator)
    text, negative = torch.randn(2, 1, 6, 10, generator=generator).unbind()
    return Denoiser(
        transformer=model,
        plan=plan,
        conditioning=Conditioning(latents, cameras, text, negative),
        noise=torch.randn(1, 4, *GRID, generator=torch.Generator().manual_seed(1)),
        solver=make_solver(config.scheduler or "euler", STEPS, 3.0),
        guidance_scale=scale,
        step_cache=config.step_cache,
    )


def _finished(denoiser: Denoiser) -> Denoised:
    turn = denoise(denoiser, CancelToken())
    while True:
        try:
            next(turn)
        except StopIteration as stop:
            result: Denoised = stop.value
            return result


@pytest.mark.parametrize("scheduler", ["euler", "unipc"])
@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(step_cache=0.0),
        EngineConfig(conditioning="static", step_cache=0.0),
    ],
    ids=["joint", "static"],
)
def test_the_closed_gate_is_the_exact_path_bit_for_bit(
    model: MV2VTransformer, config: EngineConfig, scheduler: Any
) -> None:
    plan = _plan(conditioning=config.conditioning)
    config = replace(config, scheduler=scheduler)
    exact = _finished(_denoiser(model, plan, replace(EXACT, scheduler=scheduler)))
    turn = _finished(_denoiser(model, plan, config))
    assert exact.reuse is None and turn.reuse is not None
    assert turn.reuse["steps_computed"] == list(range(STEPS))
    assert torch.equal(turn.latents, exact.latents)
    for ours, theirs in zip(turn.records, exact.records, strict=True):
        assert torch.equal(ours.merged, theirs.merged)


@pytest.mark.parametrize("conditioning", ["joint", "static"])
@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_a_turns_flops_are_the_counted_ones(
    model: MV2VTransformer, conditioning: Any, scale: float
) -> None:
    config = EngineConfig(step_cache=0.9)
    plan = _plan(conditioning=conditioning)
    with FlopCounterMode(display=False, custom_mapping=cpu_flops()) as counter:
        turn = _finished(_denoiser(model, plan, config, scale=scale))
    assert turn.reuse is not None
    table = turn_flops(plan, [record.step for record in turn.records], turn.work)
    assert table["flops"] == counter.get_total_flops() < table["flops_exact"]
    kinds = {kind for kind, count in turn.work.items() if count}
    assert "residual" in kinds and len(turn.reuse["steps_computed"]) < STEPS


@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_skipped_steps_add_what_the_blocks_added(model: MV2VTransformer, conditioning: Any) -> None:
    plan = _plan(conditioning=conditioning, merge="off")
    config = EngineConfig(conditioning=conditioning, step_cache=0.9)
    denoiser = _denoiser(model, plan, config, scale=1.0)
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
    exact = _finished(_denoiser(model, plan, EngineConfig(conditioning=conditioning), scale=1.0))
    assert 1e-4 < relative_error(turn.latents, exact.latents) < 1


@pytest.mark.parametrize("end", ["cancelled", "closed", "failed", "finished"])
def test_nothing_is_kept_after_a_turn(
    model: MV2VTransformer, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    plan, token = _plan(), CancelToken()
    denoiser = _denoiser(model, plan, EngineConfig(step_cache=0.0))
    turn = denoise(denoiser, token)
    next(turn)
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
        monkeypatch.setattr(model.blocks[1], "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(turn)
    else:
        list(turn)
    for branch in denoiser.branches:
        assert branch.residual is not None and branch.residual.value is None


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
