"""What a rank is sent in a forward over several ranks, in bytes, from the plan alone.

P ranks, L tokens of a block of which a rank has L_r, n of N heads, D head dim, C = N D, e bytes of
an element. Per block: (L - L_r) n D e for each of q, k and v, and L_r (N - n) D e on the way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mv2v_engine.parallel.context import even_lengths, head_lengths

if TYPE_CHECKING:
    from mv2v_engine.tokens.layout import MergeStep
    from mv2v_engine.tokens.plan import TokenPlan

_FLOAT32 = 4


def forward_traffic(
    plan: TokenPlan,
    size: int,
    rank: int,
    element_bytes: int,
    *,
    is_kept: bool = False,
    steps: Sequence[MergeStep] | None = None,
) -> dict[str, int]:
    """Bytes that one forward of a batch of one sends to one rank of `size`, by what they are.

    is_kept: the target alone, over kept K and V. steps: the merges that happened, where the plan
    cannot know them (scope "joint").
    """
    shape, target = plan.shape, plan.target.length
    steps = plan.merge_steps if steps is None else steps
    heads = head_lengths(shape.num_attention_heads, size)[rank]
    others = shape.num_attention_heads - heads
    attention = 0
    for length in plan.lengths_by_block(steps):
        total = target if is_kept else length
        own = _tokens(target, total, size)[rank]
        row = shape.attention_head_dim * element_bytes
        attention += (3 * (total - own) * heads + own * others) * row
    merging = 0
    for step in () if is_kept else steps:
        # the tokens and their rotary table, padded to the longest rank's, and the scores
        row = shape.dim * element_bytes + shape.attention_head_dim * _FLOAT32
        merging += (size - 1) * max(_tokens(target, step.before.length, size)) * row
        merging += (step.before.num_frames - plan.target.num_frames) * _FLOAT32
    head = (size - 1) * even_lengths(target, size)[0] * shape.out_channels * 4 * element_bytes
    return {"attention": attention, "merging": merging, "head": head}


def step_traffic(
    plan: TokenPlan,
    *,
    guidance: int,
    context: int,
    rank: int,
    element_bytes: int,
    branches: int = 2,
    is_kept: bool = False,
    has_ends: bool = False,
    steps: Sequence[MergeStep] | None = None,
) -> dict[str, int]:
    """The traffic of a rank's whole step: its forwards, and what the ranks tell each other.

    context: ranks of one forward. rank: among them. branches: of guidance, shared by `guidance`
    groups of such ranks. has_ends: of a flow map, which is told where its step goes.
    """
    share = guidance if branches > 1 else 1
    one = dict.fromkeys(("attention", "merging", "head"), 0)
    if context > 1:
        one = forward_traffic(plan, context, rank, element_bytes, is_kept=is_kept, steps=steps)
    total = {name: count * branches // share for name, count in one.items()}
    frames, rows, columns = plan.target.grid
    video = frames * rows * columns
    total["guidance"] = (share - 1) * video * plan.shape.out_channels * element_bytes
    # the noisy latents and the timesteps, from rank 0
    total["latents"] = (video * plan.shape.in_channels + 1 + has_ends) * _FLOAT32
    return total


def _tokens(target: int, length: int, size: int) -> list[int]:
    """The tokens of the target and of the conditioning together that every rank has."""
    pairs = zip(even_lengths(target, size), even_lengths(length - target, size), strict=True)
    return [sum(pair) for pair in pairs]
