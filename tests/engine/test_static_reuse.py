"""A turn with static conditioning: computed once, reused by every step and both branches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mv2v_engine import CancelToken, Engine, EngineConfig
from mv2v_engine.engine import denoise as loop
from mv2v_engine.engine.denoise import Denoised, Denoiser, denoise
from mv2v_engine.engine.report import turn_flops
from mv2v_engine.engine.step import Conditioning
from mv2v_engine.errors import CancelledError
from mv2v_engine.models import merging
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.kept import ConditioningCache
from mv2v_engine.sampling.flow_match import make_solver
from mv2v_engine.testing import cpu_flops, randomise, relative_error, tiny_config
from mv2v_engine.tokens.plan import TokenPlan, turn_plan

GRID, STEPS, SCALE = (3, 6, 10), 3, 4.0


@pytest.fixture
def model() -> MV2VTransformer:
    model = MV2VTransformer(tiny_config()).eval().requires_grad_(False)
    randomise(model)
    return model


def _plan(merge: Any = "conv", conditioning: Any = "static") -> TokenPlan:
    return turn_plan(
        tiny_config(), GRID, (4, 4), merge=merge, fraction=0.5, conditioning=conditioning
    )


def _conditioning(plan: TokenPlan) -> Conditioning:
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(1, 4, *s.grid, generator=generator) for s in plan.segments[1:]]
    cameras = torch.randn(1, len(plan.segments), GRID[0], 12, generator=generator)
    text, negative = torch.randn(2, 1, 6, 10, generator=generator).unbind()
    return Conditioning(latents, cameras, text, negative)


def _turn(model: MV2VTransformer, plan: TokenPlan, token: CancelToken | None = None) -> Any:
    denoiser = Denoiser(
        transformer=model,
        plan=plan,
        conditioning=_conditioning(plan),
        noise=torch.randn(1, 4, *GRID, generator=torch.Generator().manual_seed(1)),
        solver=make_solver("euler", STEPS, 3.0),
        guidance_scale=SCALE,
    )
    return denoise(denoiser, token or CancelToken())


def _finished(model: MV2VTransformer, plan: TokenPlan) -> Denoised:
    turn = _turn(model, plan)
    while True:
        try:
            next(turn)
        except StopIteration as stop:
            result: Denoised = stop.value
            return result


def _recomputed(
    model: MV2VTransformer, plan: TokenPlan, chosen: list[Tensor], patch: pytest.MonkeyPatch
) -> Tensor:
    """The guided turn written out, with whole forwards alone; chosen: scores of every merge."""
    given, solver = _conditioning(plan), make_solver("euler", STEPS, 3.0)
    latents = torch.randn(1, 4, *GRID, generator=torch.Generator().manual_seed(1))
    for index in range(STEPS):
        velocities = []
        for text in (given.text, given.negative_text):
            scores = iter(chosen)
            patch.setattr(merging, "responsiveness", lambda *_, scores=scores: next(scores))
            timestep = solver.timesteps[index : index + 1]
            inputs = ([latents, *given.latents], timestep, text)
            velocities.append(model(*inputs, plan=plan, cameras=given.cameras))
        positive, negative = velocities
        latents = solver.step(negative + SCALE * (positive - negative), index, latents)
    return latents[0]


@pytest.mark.parametrize("merge", ["off", "conv", "discard"])
def test_a_guided_turn_equals_recomputation(
    model: MV2VTransformer, merge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = _plan(merge)
    turn = _finished(model, plan)
    chosen = [record.responsiveness for record in turn.records]
    assert turn.num_forwards == 2 * STEPS and len(chosen) == (0 if merge == "off" else 2)
    assert relative_error(turn.latents, _recomputed(model, plan, chosen, monkeypatch)) < 1e-5


def test_conditioning_is_computed_once_a_turn(model: MV2VTransformer) -> None:
    plan = _plan("off")
    calls: Counter[tuple[str, int]] = Counter()
    for index, block in enumerate(model.blocks):
        block.attn1.to_k.register_forward_pre_hook(  # type: ignore[union-attr,operator]
            lambda _, inputs, index=index: calls.update([(f"k {index}", inputs[0].shape[1])])
        )
    for k in ("2", "4"):
        model.tokenizers[k].register_forward_pre_hook(
            lambda _, inputs, k=k: calls.update([(f"tokenizer {k}", 0)])
        )
    _finished(model, plan)
    target, own = plan.target.length, plan.length - plan.target.length
    expected = {("tokenizer 2", 0): 1, ("tokenizer 4", 0): 2}
    for index in range(len(model.blocks)):
        expected |= {(f"k {index}", own): 1, (f"k {index}", target): 2 * STEPS}
    assert calls == expected


@pytest.mark.parametrize("conditioning", ["static", "joint"])
def test_a_turns_flops_are_the_counted_ones(model: MV2VTransformer, conditioning: str) -> None:
    plan = _plan("conv", conditioning)
    with FlopCounterMode(display=False, custom_mapping=cpu_flops()) as counter:
        turn = _finished(model, plan)
    table = turn_flops(plan, [record.step for record in turn.records], turn.num_forwards)
    assert table["flops"] == counter.get_total_flops()


@pytest.mark.parametrize("end", ["cancelled", "closed", "failed", "finished"])
def test_nothing_is_kept_after_a_turn(
    model: MV2VTransformer, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    caches: list[ConditioningCache] = []

    def watched(plan: TokenPlan) -> ConditioningCache:
        caches.append(ConditioningCache(plan))
        return caches[-1]

    monkeypatch.setattr(loop, "ConditioningCache", watched)
    token = CancelToken()
    turn = _turn(model, _plan(), token)
    next(turn)
    (cache,) = caches
    assert cache.is_filled
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
    assert cache.blocks == [] and cache.cameras is None


def test_a_report_tells_first_and_later_forwards(
    tiny_checkpoint: Path, source_frames: Tensor
) -> None:
    reports = []
    for mode in ("static", "joint"):
        config = EngineConfig(conditioning=mode, merge="conv", merge_fraction=0.5)  # type: ignore[arg-type]
        engine = Engine.from_pretrained(tiny_checkpoint, device="cpu", config=config)
        session = engine.session(source_frames)
        session.render("pan_right", num_inference_steps=1)
        reports.append(session.render("pan_left").report)
    for report in reports:
        first, later = report["flops_first_forward"], report["flops_per_forward"]
        count = report["forwards"] - 1
        assert report["flops"] == sum(first.values()) + count * sum(later.values())
    static, joint = reports
    assert static["merged_frames"] and static["flops_per_forward"].keys().isdisjoint(
        {"conditioning_blocks", "merge"}
    )
    assert joint["flops_first_forward"] == joint["flops_per_forward"]
