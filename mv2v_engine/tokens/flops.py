"""FLOPs of one forward from the plan alone, two a multiply-add.

Per block (METHOD 16): 4 Lq Lk C for self-attention; 2 L (7 C^2 + 2 C ffn) for q, k, v, o, the
camera projector, cross-attention's q and o, and the feed-forward; 4 L S C + 4 S C^2 for
cross-attention and its text k, v. S text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mv2v_engine.tokens.layout import MergeStep

if TYPE_CHECKING:
    from mv2v_engine.tokens.plan import TokenPlan

_BLOCK_PARTS = ("self_attention", "linear", "cross_attention")


def flop_table(plan: TokenPlan, steps: Sequence[MergeStep] | None = None) -> dict[str, int]:
    """FLOPs by part of one joint forward, matrix products and convolutions all counted.

    steps: the merges that happened, where the plan cannot know them (scope "joint").
    """
    shape = plan.shape
    steps = plan.merge_steps if steps is None else steps
    lengths = plan.lengths_by_block(steps)
    text, width = shape.text_len, shape.dim
    frames = len(plan.frame_table)
    table = _block_parts(plan, lengths, lengths)
    table["tokenize"] = (
        2
        * width
        * shape.in_channels
        * sum(segment.length * segment.tokenizer**2 for segment in plan.segments)
    )
    table["camera"] = 2 * shape.num_layers * frames * 12 * width if shape.has_camera else 0
    table["embedding"] = 2 * (shape.freq_dim * width + width**2 + 6 * width**2) + 2 * text * (
        shape.text_dim * width + width**2
    )
    table["head"] = 2 * plan.target.length * width * shape.out_channels * 4
    table["merge"] = sum(_merge_flops(plan, step) for step in steps)
    # a merging block adds its camera rows once more, for the keys that choose the frames
    if shape.has_camera:
        table["camera"] += 2 * len(steps) * frames * 12 * width
    return table


def block_flops(plan: TokenPlan, steps: Sequence[MergeStep] | None = None) -> int:
    """The blocks' FLOPs of one forward as METHOD 16 counts them."""
    lengths = plan.lengths_by_block(steps)
    queries = lengths
    if plan.conditioning == "static":
        queries = (plan.target.length,) * len(lengths)
    return sum(_block_parts(plan, queries, lengths).values())


def conditioning_flops(plan: TokenPlan, steps: Sequence[MergeStep] | None = None) -> int:
    """Once a turn with static conditioning: the conditioning tokens' own forward, without text."""
    if plan.conditioning == "joint":
        return 0
    shape, width = plan.shape, plan.shape.dim
    total = 0
    for length in plan.lengths_by_block(steps):
        own = length - plan.target.length
        # no cross-attention: its q and o fall away
        linear = (4 + shape.has_camera) * width**2 + 2 * width * shape.ffn_dim
        total += 4 * own * own * width + 2 * own * linear
    return total


def _block_parts(plan: TokenPlan, queries: Sequence[int], keys: Sequence[int]) -> dict[str, int]:
    shape, width, text = plan.shape, plan.shape.dim, plan.shape.text_len
    per_token = (6 + shape.has_camera) * width**2 + 2 * width * shape.ffn_dim
    parts = dict.fromkeys(_BLOCK_PARTS, 0)
    for num_queries, num_keys in zip(queries, keys, strict=True):
        parts["self_attention"] += 4 * num_queries * num_keys * width
        parts["linear"] += 2 * num_queries * per_token
        parts["cross_attention"] += 4 * num_queries * text * width + 4 * text * width**2
    return parts


def _merge_flops(plan: TokenPlan, step: MergeStep) -> int:
    """Choosing (target queries, conditioning keys, their product) and convolving."""
    width, before = plan.shape.dim, step.before
    conditioning_frames = before.num_frames - before.runs[0].num_frames
    choose = 2 * before.length * width**2 + 2 * before.target_length * conditioning_frames * width
    if plan.merge == "discard" or plan.shape.merger is None:
        return choose
    kernel, merger = plan.merger.kernel, plan.merger
    cells = 1 if merger.pooled else kernel[0] * kernel[1]
    fuse = 0
    for group in step.groups:
        tokens = -(-group.rows // kernel[0]) * -(-group.columns // kernel[1])
        fuse += 2 * group.num_merged * tokens * cells * width * width // merger.groups
    return choose + fuse
