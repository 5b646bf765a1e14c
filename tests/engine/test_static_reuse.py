"""A turn with static conditioning: computed once, reused by every step and both branches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from torch import Tensor

from mv2v_engine import Engine, EngineConfig
from mv2v_engine.models import merging
from mv2v_engine.sampling.flow_match import make_solver
from mv2v_engine.testing import relative_error
from mv2v_engine.tokens.plan import TokenPlan
from tests.engine.graphed_turns import Asked, StandInTurns

ASKED = Asked(steps=3, scale=4.0)


def _recomputed(
    turns: StandInTurns, plan: TokenPlan, chosen: list[Tensor], patch: pytest.MonkeyPatch
) -> Tensor:
    """The guided turn written out, with whole forwards alone; chosen: scores of every merge."""
    buffers, solver = turns.denoiser(plan, ASKED, None).buffers, make_solver("euler", 3, 3.0)
    given, latents = buffers.conditioning, buffers.latents.clone()
    for index in range(ASKED.steps):
        velocities = []
        for text in given.texts:
            scores = iter(chosen)
            patch.setattr(merging, "responsiveness", lambda *_, scores=scores: next(scores))
            inputs = ([latents, *given.latents], solver.timesteps[index : index + 1], text)
            velocities.append(turns.model(*inputs, plan=plan, cameras=given.cameras))
        positive, negative = velocities
        latents = solver.step(negative + ASKED.scale * (positive - negative), index, latents)
    return latents[0]


@pytest.mark.parametrize("merge", ["off", "conv", "discard"])
def test_a_guided_turn_equals_recomputation(merge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = StandInTurns()
    plan = turns.plan("static", merge=merge)
    turn = turns.run(plan, ASKED, None)
    chosen = [record.responsiveness for record in turn.records]
    assert turn.num_forwards == 2 * ASKED.steps and len(chosen) == (0 if merge == "off" else 2)
    assert relative_error(turn.latents, _recomputed(turns, plan, chosen, monkeypatch)) < 1e-5


def test_conditioning_is_computed_once_a_turn() -> None:
    turns = StandInTurns()
    plan, model = turns.plan("static", merge="off"), turns.model
    calls: Counter[tuple[str, int]] = Counter()
    for index, block in enumerate(model.blocks):
        block.attn1.to_k.register_forward_pre_hook(  # type: ignore[union-attr,operator]
            lambda _, inputs, index=index: calls.update([(f"k {index}", inputs[0].shape[1])])
        )
    for k in ("2", "4"):
        model.tokenizers[k].register_forward_pre_hook(
            lambda _, inputs, k=k: calls.update([(f"tokenizer {k}", 0)])
        )
    turns.run(plan, ASKED, None)
    target, own = plan.target.length, plan.length - plan.target.length
    expected = {("tokenizer 2", 0): 1, ("tokenizer 4", 0): 2}
    for index in range(len(model.blocks)):
        expected |= {(f"k {index}", own): 1, (f"k {index}", target): 2 * ASKED.steps}
    assert calls == expected


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
