"""Choosing and fusing frames: ties, books kept, mergers that start as averages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mv2v_engine.config import MergerConfig
from mv2v_engine.models.merging import Merger, apply_merge, joint_counts, merge_order
from mv2v_engine.models.sequence import Sequence, token_slots
from mv2v_engine.testing import tiny_config
from mv2v_engine.tokens.layout import Layout
from mv2v_engine.tokens.plan import TokenPlan, turn_plan

CPU = torch.device("cpu")
GRID = (3, 12, 20)
ROTARY = 6


def _plan(fraction: float = 0.5, *tokenizers: int) -> TokenPlan:
    return turn_plan(tiny_config(), GRID, tokenizers or (4, 2), fraction=fraction)


def _sequence(plan: TokenPlan, batch: int = 1) -> Sequence:
    """Tokens whose first channel is their frame's number, positions all different."""
    frames = torch.arange(len(plan.frame_table)).expand(batch, -1)
    slots = token_slots(plan.layout, CPU).float()
    torch.manual_seed(0)
    x = torch.randn(batch, plan.length, 24)
    x[..., 0] = slots
    rope = torch.randn(1, plan.length, ROTARY)
    nothing = torch.empty(batch, 0)
    return Sequence.of(
        x, rope, frames, plan.layout, temb=nothing, temb_6=nothing, text=None, cameras=None
    )


def _merge(
    plan: TokenPlan, sequence: Sequence, scores: Tensor, *, discard: bool = False
) -> tuple[Sequence, Tensor]:
    step = plan.step_at(1, sequence.layout, plan.merge_counts(sequence.layout))
    merged, record = apply_merge(
        sequence, step, scores, None, kernel=(2, 2), discard=discard, backend="reference"
    )
    assert merged.layout == step.after and merged.x.shape[1] == step.after.length
    assert merged.rope.shape[:2] == merged.x.shape[:2]
    return merged, record.merged


def test_least_responsive_first_and_the_later_of_equals() -> None:
    scores = torch.tensor([[0.3, 0.1, 0.2, 0.1], [0.5, 0.5, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4]])
    assert merge_order(scores).tolist() == [[3, 1, 2, 0], [3, 2, 1, 0], [0, 1, 2, 3]]


def test_order_is_the_same_for_every_run_and_copy() -> None:
    torch.manual_seed(0)
    scores = (8 * torch.rand(4, 300)).round() / 8  # many ties
    first = merge_order(scores)
    assert all(torch.equal(merge_order(scores.clone()), first) for _ in range(5))
    for row, order in zip(scores.tolist(), first.tolist(), strict=True):
        assert order == sorted(range(300), key=lambda i: (row[i], -i))


def test_token_slots_number_the_frames() -> None:
    plan = _plan()
    expected = [i for i, span in enumerate(plan.frame_table) for _ in range(span.start, span.stop)]
    assert token_slots(plan.layout, CPU).tolist() == expected
    assert token_slots(Layout(plan.layout.runs[:1]), CPU).tolist() == expected[: 3 * 60]


def test_the_books_follow_the_frames() -> None:
    plan = _plan(0.5, 4, 2)  # source and the second memory share the grid 6 x 10
    sequence = _sequence(plan)
    # conditioning frames 3..11: source 3-5, 1x4x4 memory 6-8, 1x2x2 memory 9-11
    scores = torch.tensor([[0.9, 0.1, 0.8, 0.3, 0.2, 0.1, 0.05, 0.7, 0.6]])
    merged, chosen = _merge(plan, sequence, scores)
    assert sorted(chosen[0].tolist()) == [4, 8, 9, 11]
    assert chosen[0].tolist() == [9, 4, 11, 8]  # ascending within each group
    # the target, then each group's kept and merged frames in their order
    assert merged.frames[0].tolist() == [0, 1, 2, 3, 5, 10, 4, 9, 11, 6, 7, 8]
    # every token still carries its frame's number, averages of equal numbers included
    assert torch.equal(merged.x[0, :, 0].round().long(), merged.token_frames[0])


def test_merged_positions_are_the_mean_of_their_parents() -> None:
    plan = _plan(0.4, 4)
    sequence = _sequence(plan)
    scores = torch.tensor([[0.5, 0.1, 0.9, 0.2, 0.7, 0.8]])
    merged, chosen = _merge(plan, sequence, scores)
    assert chosen[0].tolist() == [4, 6]
    span = plan.frame_table[4]
    parents = sequence.rope[0, span.start : span.stop].reshape(6, 10, ROTARY)
    place = int((merged.token_frames[0] == 4).nonzero()[0])
    for row in range(3):
        for column in range(5):
            window = parents[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            got = merged.rope[0, place + 5 * row + column]
            torch.testing.assert_close(got, window.mean((0, 1)))
    # 3 x 5 does not divide by two: the last row and column stand twice in their windows
    span = plan.frame_table[6]
    parents = sequence.rope[0, span.start : span.stop].reshape(3, 5, ROTARY)
    place = int((merged.token_frames[0] == 6).nonzero()[0])
    torch.testing.assert_close(merged.rope[0, place + 5], parents[2, 4])
    torch.testing.assert_close(merged.rope[0, place + 2], parents[:2, 4].mean(0))


def test_merging_an_average_keeps_a_constant_frame() -> None:
    plan = _plan(1.0, 4)
    sequence = _sequence(plan)
    merged, _ = _merge(plan, sequence, torch.rand(1, 6))
    numbers = merged.token_frames[0].float()
    torch.testing.assert_close(merged.x[0, :, 0], numbers)


def test_discarded_frames_are_gone() -> None:
    plan = turn_plan(tiny_config(), GRID, (4,), fraction=0.4, merge="discard")
    merged, chosen = _merge(
        plan, _sequence(plan), torch.tensor([[0.5, 0.1, 0.9, 0.2, 0.7, 0.8]]), discard=True
    )
    assert chosen[0].tolist() == [4, 6]
    assert merged.frames[0].tolist() == [0, 1, 2, 3, 5, 7, 8]
    assert torch.equal(merged.x[0, :, 0].long(), merged.token_frames[0])


def test_the_target_and_merged_frames_are_no_candidates() -> None:
    plan = _plan(1.0, 4)
    merged, chosen = _merge(plan, _sequence(plan), torch.rand(1, 6))
    assert sorted(chosen[0].tolist()) == [3, 4, 5, 6, 7, 8]
    assert merged.layout.groups() == ()


def test_samples_choose_for_themselves() -> None:
    plan = _plan(0.4, 4)
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.1, 0.2, 0.3], [0.3, 0.2, 0.1, 0.3, 0.2, 0.1]])
    merged, chosen = _merge(plan, _sequence(plan, 2), scores)
    assert chosen.tolist() == [[3, 6], [5, 8]]
    assert torch.allclose(merged.x[..., 0], merged.token_frames.float())


def test_joint_scope_counts_across_groups() -> None:
    plan = _plan(0.5, 4, 2)
    sequence = _sequence(plan)
    # nine candidates, four merge: 7, 4, 8 and 9 (numbers of the frame table)
    scores = torch.tensor([[0.9, 0.2, 0.8, 0.7, 0.1, 0.3, 0.4, 0.6, 0.5]])
    assert joint_counts(scores, sequence, 0.5) == (2, 2)
    assert joint_counts(scores, sequence, 0.0) == (0, 0)
    assert joint_counts(scores, sequence, 1.0) == (6, 3)


def test_joint_ties_go_to_the_later_frame_of_the_plan() -> None:
    plan = _plan(0.5, 4, 2)
    sequence = _sequence(plan)
    # all equal: frames 11, 10, 9 are the last 1x2x2 memory, then 8 of the 1x4x4 one
    assert joint_counts(torch.ones(1, 9), sequence, 0.5) == (3, 1)


@pytest.mark.parametrize(
    "config",
    [
        MergerConfig(),
        MergerConfig(bias=False),
        MergerConfig(groups=24),
        MergerConfig(groups=3),
        MergerConfig(pooled=True),
        MergerConfig(kernel=(1, 2)),
    ],
    ids=["dense", "no bias", "depth-wise", "groups", "pooled", "1x2"],
)
def test_a_fresh_merger_averages(config: MergerConfig) -> None:
    from mv2v_engine.ops.token_merge import token_merge

    torch.manual_seed(0)
    x, rope = torch.randn(1, 2, 60, 24), torch.randn(1, 2, 60, ROTARY)
    kept, merged = torch.tensor([[0]]), torch.tensor([[1]])
    module = Merger(24, config)
    got, _ = token_merge(
        x,
        rope,
        kept,
        merged,
        grid=(6, 10),
        kernel=config.kernel,
        weight=module.weight,
        bias=module.bias,
    )
    expected, _ = token_merge(x, rope, kept, merged, grid=(6, 10), kernel=config.kernel)
    torch.testing.assert_close(got, expected)
