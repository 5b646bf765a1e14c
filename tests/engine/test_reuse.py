"""Approximate reuse of joint conditioning, and skipped steps: what is run, told and let go."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mv2v_engine import CancelToken, Engine, EngineConfig
from mv2v_engine.engine.denoisers import make_denoiser
from mv2v_engine.engine.report import turn_flops
from mv2v_engine.engine.reuse import ReusingDenoiser
from mv2v_engine.engine.runner import Conditioning, Denoised, Denoiser, NoisyTurn, denoise
from mv2v_engine.errors import CancelledError, RequestError
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.sampling.flow_match import make_solver
from mv2v_engine.testing import cpu_flops, randomise, relative_error, tiny_config
from mv2v_engine.tokens.flops import conditioning_bytes, residual_bytes
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
    turn = NoisyTurn(
        transformer=model,
        plan=plan,
        conditioning=Conditioning(latents, cameras, text, negative),
        noise=torch.randn(1, 4, *GRID, generator=torch.Generator().manual_seed(1)),
        solver=make_solver(config.scheduler or "euler", STEPS, 3.0),
        guidance_scale=scale,
    )
    return make_denoiser(config, turn)


def _finished(denoiser: Denoiser) -> Denoised:
    turn = denoise(denoiser, CancelToken())
    while True:
        try:
            next(turn)
        except StopIteration as stop:
            result: Denoised = stop.value
            return result


def _approximate(refresh: int, drift: float | None, **more: Any) -> EngineConfig:
    return EngineConfig(reuse="approximate", reuse_refresh=refresh, reuse_drift=drift, **more)


def _merged_first() -> MV2VTransformer:
    model = MV2VTransformer(tiny_config(merge_blocks=(0, 2))).eval().requires_grad_(False)
    randomise(model)
    return model


@pytest.mark.parametrize("scheduler", ["euler", "unipc"])
@pytest.mark.parametrize(
    "config",
    [
        _approximate(3, 0.0),
        _approximate(1, 1e9),
        _approximate(1, None),
        EngineConfig(step_cache=0.0),
        EngineConfig(conditioning="static", step_cache=0.0),
        _approximate(1, 1e9, step_cache=0.0),
    ],
    ids=["drift 0", "refresh 1", "refresh 1, not measured", "cache 0", "static, cache 0", "both"],
)
def test_the_closed_gate_is_the_exact_path_bit_for_bit(
    model: MV2VTransformer, config: EngineConfig, scheduler: Any
) -> None:
    plan = _plan(conditioning=config.conditioning)
    config = replace(config, scheduler=scheduler)
    exact = _finished(_denoiser(model, plan, replace(EXACT, scheduler=scheduler)))
    denoiser = _denoiser(model, plan, config)
    assert isinstance(denoiser, ReusingDenoiser) and exact.reuse is None
    turn = _finished(denoiser)
    assert torch.equal(turn.latents, exact.latents)
    for ours, theirs in zip(turn.records, exact.records, strict=True):
        assert torch.equal(ours.merged, theirs.merged)


def test_refreshes_follow_the_interval_and_the_gate(model: MV2VTransformer) -> None:
    exact = _finished(_denoiser(model, _plan(), EXACT))
    by_interval = _finished(_denoiser(model, _plan(), _approximate(3, None)))
    assert by_interval.reuse is not None
    rows = by_interval.reuse["refreshes"]
    assert [(row["step"], row["reason"]) for row in rows] == [(0, "first"), (3, "interval")]
    assert by_interval.reuse["reused"] == [
        {"step": step, "first_block_drift": None} for step in (1, 2, 4)
    ]
    assert "keys_drift" not in rows[0] and 0 < rows[1]["keys_drift"] <= rows[1]["worst_keys_drift"]
    assert 1e-3 < relative_error(by_interval.latents, exact.latents) < 1

    # the same interval with a gate that is never reached measures and does nearly the same
    open_gate = _finished(_denoiser(model, _plan(), _approximate(3, 1e9)))
    assert open_gate.reuse is not None
    drifts = [row["first_block_drift"] for row in open_gate.reuse["reused"]]
    assert len(drifts) == 3 and min(drifts) > 0
    # and a gate on either side of the first one, which all turns have in common
    for factor, passes in ((0.99, False), (1.01, True)):
        gated = _finished(_denoiser(model, _plan(), _approximate(3, factor * drifts[0])))
        assert gated.reuse is not None
        told = {row["step"]: row for row in (*gated.reuse["refreshes"], *gated.reuse["reused"])}
        assert told[1]["first_block_drift"] == drifts[0]
        assert told[1].get("reason") == (None if passes else "drift")
        assert sorted(told) == list(range(STEPS))
    json.dumps(gated.reuse)


def test_every_branch_keeps_its_own(model: MV2VTransformer) -> None:
    denoiser = _denoiser(model, _plan(), _approximate(3, None))
    denoiser.step()
    caches = [branch.cache for branch in denoiser.branches]
    assert len(caches) == 2 and caches[0] is not None and caches[1] is not None
    # block 0's K and V have not met the text yet, those of block 1 have
    pairs = list(zip(caches[0].blocks, caches[1].blocks, strict=True))
    assert torch.equal(pairs[0][0][0], pairs[0][1][0])
    assert not torch.equal(pairs[1][0][0], pairs[1][1][0])


COSTS: dict[str, tuple[EngineConfig, dict[str, Any]]] = {
    "interval": (_approximate(3, None), {}),
    "gate": (_approximate(4, 0.3), {}),
    "gate, joint scope": (_approximate(3, 1e9), {"scope": "joint", "merge": "off"}),
    "skipped": (EngineConfig(step_cache=0.9), {}),
    "static, skipped": (EngineConfig(conditioning="static", step_cache=0.9), {}),
    "gate and skipped": (_approximate(3, 1e9, step_cache=0.9), {"merge": "off"}),
}


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_a_turns_flops_are_the_counted_ones(
    model: MV2VTransformer, name: str, scale: float
) -> None:
    config, arguments = COSTS[name]
    plan = _plan(conditioning=config.conditioning, **arguments)
    with FlopCounterMode(display=False, custom_mapping=cpu_flops()) as counter:
        turn = _finished(_denoiser(model, plan, config, scale=scale))
    assert turn.reuse is not None
    table = turn_flops(plan, [record.step for record in turn.records], turn.work)
    assert table["flops"] == counter.get_total_flops() < table["flops_exact"]
    kinds = {kind for kind, count in turn.work.items() if count}
    if config.step_cache is not None:
        assert "residual" in kinds and len(turn.reuse["steps_computed"]) < STEPS
    if config.reuse == "approximate":
        assert kinds & {"kept", "probed"}


def test_merging_before_the_first_block_is_probed_too() -> None:
    model = _merged_first()
    plan = turn_plan(model.config, GRID, (4, 4), merge="conv", fraction=0.5)
    with FlopCounterMode(display=False, custom_mapping=cpu_flops()) as counter:
        turn = _finished(_denoiser(model, plan, _approximate(3, 1e9)))
    assert turn.work["probed"] == 6 and len(turn.records) == 2
    steps = [record.step for record in turn.records]
    assert turn_flops(plan, steps, turn.work)["flops"] == counter.get_total_flops()


@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_skipped_steps_add_what_the_blocks_added(model: MV2VTransformer, conditioning: Any) -> None:
    plan = _plan(conditioning=conditioning, merge="off")
    config = EngineConfig(conditioning=conditioning, step_cache=0.9)
    denoiser = _denoiser(model, plan, config, scale=1.0)
    assert isinstance(denoiser, ReusingDenoiser)
    assert denoiser.computed[0] and denoiser.computed[-1] and not all(denoiser.computed)
    added, branch = None, denoiser.branches[0]
    while not denoiser.is_finished:
        skips, before = denoiser.kind == "residual", denoiser.latents
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


@pytest.mark.parametrize("drift", [None, 1e9])
@pytest.mark.parametrize("end", ["cancelled", "closed", "failed", "finished"])
def test_nothing_is_kept_after_a_turn(
    model: MV2VTransformer, monkeypatch: pytest.MonkeyPatch, end: str, drift: float | None
) -> None:
    plan, token = _plan(), CancelToken()
    denoiser = _denoiser(model, plan, _approximate(3, drift, step_cache=0.0))
    turn = denoise(denoiser, token)
    next(turn)
    held = 0
    for branch in denoiser.branches:
        cache: Any = branch.cache
        kept = [tensor for block in cache.blocks for tensor in block]
        kept += [t for t in (cache._first_output,) if t is not None]
        assert cache.is_filled and branch.residual is not None
        held += sum(tensor.untyped_storage().nbytes() for tensor in kept)
        assert branch.residual.read().untyped_storage().nbytes() == residual_bytes(plan, 4)
    assert held == conditioning_bytes(plan, 4, copies=2, probes=drift is not None)
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
        cache = branch.cache
        assert cache.blocks == [] and cache.cameras is None and cache._first_output is None
        assert branch.residual is not None and branch.residual.value is None


def test_a_turns_report(tiny_checkpoint: Path, source_frames: Tensor) -> None:
    config = _approximate(2, 1e9, step_cache=0.01, merge="off")
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu", config=config)
    report = engine.session(source_frames).render("pan_right", num_inference_steps=4).report
    assert report["conditioning_is_trained"] and len(report["approximations"]) == 2
    assert report["flops"] < report["flops_exact"]
    reuse, work = report["reuse"], report["work"]
    assert reuse["conditioning"] == "approximate" and reuse["refresh"] == 2
    assert report["forwards"] == len(reuse["steps_computed"])
    assert work["whole"] == len(reuse["refreshes"]) and work["probed"] == len(reuse["reused"])
    assert report["residual_bytes"] > 0 and report["conditioning_bytes"] > 0

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
        ({"reuse": "approximate", "conditioning": "static"}, "kept exactly already; leave reuse"),
        ({"reuse_refresh": 0}, "reuse_refresh counts steps, 1 or more, got 0"),
        ({"reuse_drift": -0.1}, "reuse_drift must be finite and not negative, or None, got -0.1"),
        ({"step_cache": float("inf")}, "step_cache must be finite and not negative"),
    ],
)
def test_what_cannot_be(arguments: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        EngineConfig(**arguments)
