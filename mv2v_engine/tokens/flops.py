"""FLOPs of one forward from the plan alone, two a multiply-add.

Per block (METHOD 16): 4 Lq Lk C for self-attention; 2 L (7 C^2 + 2 C ffn) for q, k, v, o, the
camera projector, cross-attention's q and o, and the feed-forward; 4 L S C + 4 S C^2 for
cross-attention and its text k, v. S text tokens. PRoPE adds 32 L N D to the linear part, where D
channels of N heads meet cameras. Phases of cameras add 8 L C N P for two layers of P a head, image
tokens as much in cross-attention as so much text. Attention over F frames adds 4 L F C + 8 L C^2, a
state-space memory 6 L C^2 in its blocks. Attention to a history's L' hidden states of E channels
adds 4 L C^2 + 4 L L' C + 4 L' E C in its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from mv2v_engine.shapes import IMAGE_TOKENS
from mv2v_engine.tokens.encoders import history_flops
from mv2v_engine.tokens.layout import MergeStep

if TYPE_CHECKING:
    from mv2v_engine.config import TransformerConfig
    from mv2v_engine.tokens.plan import Segment, TokenPlan

_BLOCK_PARTS = ("self_attention", "linear", "cross_attention")

# What a step may run in each guidance branch: a whole forward; the target over kept K/V; no block.
# And once a turn, "schedule", for every timestep.
Work = Literal["whole", "kept", "residual", "schedule"]
FORWARDS: tuple[Work, ...] = ("whole", "kept")


def exact_work(plan: TokenPlan, num_forwards: int) -> dict[Work, int]:
    """What a turn of so many forwards runs: with static conditioning, one whole forward."""
    if plan.conditioning == "joint" or not num_forwards:
        return {"whole": num_forwards}
    return {"whole": 1, "kept": num_forwards - 1}


def work_flops(plan: TokenPlan, work: Work, steps: Sequence[MergeStep] | None = None) -> int:
    """FLOPs of one piece of work. steps: as in `flop_table`."""
    if work == "schedule":
        return _time_flops(plan) + _time_projection_flops(plan)
    if work == "residual":
        # no block runs, and no merge
        return _tokenize_flops(plan, plan.segments[:1]) + _time_flops(plan) + _head_flops(plan)
    table = flop_table if work == "whole" else kept_flop_table
    return sum(table(plan, steps).values())


def flop_table(plan: TokenPlan, steps: Sequence[MergeStep] | None = None) -> dict[str, int]:
    """FLOPs by part of one whole forward, matrix products and convolutions all counted.

    With static conditioning the blocks' parts are the target's and the conditioning's.
    steps: the merges that happened, where the plan cannot know them (scope "joint").
    """
    shape = plan.shape
    steps = plan.merge_steps if steps is None else steps
    is_static = plan.conditioning == "static"
    if is_static:
        table = {
            "target_blocks": block_flops(plan, steps),
            "conditioning_blocks": conditioning_flops(plan, steps),
        }
    else:
        lengths = plan.lengths_by_block(steps)
        table = _block_parts(plan, lengths, lengths)
    table["tokenize"] = _tokenize_flops(plan, plan.segments)
    # a merging block adds its camera rows once more, for the keys that choose the frames; the
    # halves of a static forward each encode all rows
    blocks = (shape.num_layers + len(steps)) * (1 + is_static)
    table["camera"] = _camera_flops(plan, blocks, len(plan.frame_table))
    table["camera"] += _ray_flops(plan, plan.segments)
    table["embedding"] = _embedding_flops(plan, timesteps=1 + is_static)
    table["head"] = _head_flops(plan)
    if shape.vace_layers:
        table["vace"] = _vace_flops(plan)
    table["merge"] = sum(_merge_flops(plan, step) for step in steps)
    return table


def kept_flop_table(plan: TokenPlan, steps: Sequence[MergeStep] | None = None) -> dict[str, int]:
    """FLOPs by part of one forward of the target over conditioning K/V kept by another."""
    return {
        "target_blocks": target_block_flops(plan, steps),
        "tokenize": _tokenize_flops(plan, plan.segments[:1]),
        "camera": _camera_flops(plan, plan.shape.num_layers, plan.target.num_frames)
        + _ray_flops(plan, plan.segments[:1]),
        "embedding": _embedding_flops(plan, timesteps=1),
        "head": _head_flops(plan),
        **({"vace": _vace_flops(plan)} if plan.shape.vace_layers else {}),
    }


def stream_flops(plan: TokenPlan, held: int) -> int:
    """FLOPs of one forward of a stream's block, whose self-attention sees `held` further tokens."""
    return sum(flop_table(plan).values()) + seen_flops(plan, held)


def seen_flops(plan: TokenPlan, held: int) -> int:
    """FLOPs of self-attention to `held` tokens that a forward sees beside its own."""
    return 4 * plan.length * held * plan.shape.dim * plan.shape.num_layers


def arriving_flops(segment: Segment, shape: TransformerConfig, held: int) -> int:
    """FLOPs of what makes a stream's frames tokens of its history: the encoder, and one forward of
    the tokens, without text, which sees `held` further ones.

    segment: the new tokens', as a plan has them.
    """
    assert shape.history is not None
    length, width = segment.length, shape.dim
    size = (segment.grid, segment.tokenizer, segment.frames_per_token)
    encoded = history_flops(shape.history, shape.latent_channels, width, *size)
    time = 2 * (shape.freq_dim * width + 7 * width**2)
    attention = 4 * length * (held + length) * width
    linear = 2 * length * (4 * width**2 + 2 * width * shape.ffn_dim)
    return encoded + time + shape.num_layers * (attention + linear)


def block_flops(plan: TokenPlan, steps: Sequence[MergeStep] | None = None) -> int:
    """The blocks' FLOPs of one forward as METHOD 16 counts them; static: over kept K/V."""
    if plan.conditioning == "static":
        return target_block_flops(plan, steps)
    lengths = plan.lengths_by_block(steps)
    return sum(_block_parts(plan, lengths, lengths).values())


def target_block_flops(plan: TokenPlan, steps: Sequence[MergeStep] | None = None) -> int:
    """The blocks' FLOPs of the target's queries alone, against all keys."""
    lengths = plan.lengths_by_block(steps)
    return sum(_block_parts(plan, (plan.target.length,) * len(lengths), lengths).values())


def conditioning_flops(plan: TokenPlan, steps: Sequence[MergeStep] | None = None) -> int:
    """Once a turn with static conditioning: the conditioning tokens' own forward, without text."""
    if plan.conditioning == "joint":
        return 0
    shape, width = plan.shape, plan.shape.dim
    total = 0
    for length in plan.lengths_by_block(steps):
        own = length - plan.target.length
        # no cross-attention: its q and o fall away
        linear = (4 + shape.has_camera_modules) * width**2 + 2 * width * shape.ffn_dim
        linear += _prope_products(shape)
        total += 4 * own * own * width + 2 * own * linear
    return total


def conditioning_bytes(
    plan: TokenPlan,
    element_bytes: int,
    steps: Sequence[MergeStep] | None = None,
) -> int:
    """What a turn with static conditioning keeps of it: every block's K and V of its tokens."""
    if plan.conditioning == "joint":
        return 0
    tokens = sum(length - plan.target.length for length in plan.lengths_by_block(steps))
    return 2 * tokens * plan.shape.dim * element_bytes


def residual_bytes(plan: TokenPlan, element_bytes: int) -> int:
    """What a step that runs no block adds to the target's tokens, kept for each branch."""
    return plan.target.length * plan.shape.dim * element_bytes


def _block_parts(plan: TokenPlan, queries: Sequence[int], keys: Sequence[int]) -> dict[str, int]:
    shape, width, text = plan.shape, plan.shape.dim, plan.shape.text_len + _image_tokens(plan.shape)
    per_token = (6 + shape.has_camera_modules) * width**2 + 2 * width * shape.ffn_dim
    per_token += _prope_products(shape)
    parts = dict.fromkeys(_BLOCK_PARTS, 0)
    frames = len(plan.frame_table)
    for index, (num_queries, num_keys) in enumerate(zip(queries, keys, strict=True)):
        parts["self_attention"] += 4 * num_queries * num_keys * width
        if shape.action_attention:
            parts["self_attention"] += 4 * num_queries * frames * width
            parts["linear"] += 8 * num_queries * width**2
        attending = shape.history.cross_attention if shape.history is not None else ()
        if plan.attended_history is not None and index in attending:
            length, channels = plan.attended_history
            own = num_queries * (width + length) + length * channels
            parts["cross_attention"] += 4 * own * width
        if index in shape.state_space:
            parts["linear"] += 6 * num_queries * width**2
        parts["linear"] += 2 * num_queries * per_token
        parts["cross_attention"] += 4 * num_queries * text * width + 4 * text * width**2
    return parts


def _vace_flops(plan: TokenPlan) -> int:
    """VACE's blocks over the target's tokens, their hints, and the first one's way in."""
    count, length = len(plan.shape.vace_layers), plan.target.length
    blocks = sum(_block_parts(plan, [length] * count, [length] * count).values())
    return blocks + 2 * (count + 1) * length * plan.shape.dim**2


def _prope_products(shape: TransformerConfig) -> int:
    """Multiply-adds of a token's q, k, v and o with matrices of four columns, or of its phases."""
    if shape.has_phases:
        return 2 * shape.dim * shape.num_attention_heads * shape.num_phases
    return 16 * shape.num_attention_heads * shape.camera_channels


def _image_tokens(shape: TransformerConfig) -> int:
    return IMAGE_TOKENS if shape.image_dim else 0


def _ray_flops(plan: TokenPlan, segments: Sequence[Segment]) -> int:
    """The adapter's convolutions over the 1x2x2 cells of the segments: 24 x 8 x 8 numbers a latent
    cell, then twice 3x3."""
    if not plan.shape.has_phases:
        return 0
    cells = sum(s.num_frames * s.cell_grid[0] * s.cell_grid[1] for s in segments)
    width = plan.shape.dim
    return 2 * cells * (4 * 24 * 64 * width + 2 * 9 * width**2)


def _tokenize_flops(plan: TokenPlan, segments: Sequence[Segment]) -> int:
    shape = plan.shape
    values = sum(
        segment.length * segment.tokenizer**2 * shape.channels_of(segment.role)
        for segment in segments
        if segment.encoder == "patches"
    )
    histories = 0
    for each in segments:
        if each.encoder == "history" and not each.is_encoded:
            assert shape.history is not None
            size = (each.grid, each.tokenizer, each.frames_per_token)
            histories += history_flops(shape.history, shape.latent_channels, shape.dim, *size)
    return 2 * shape.dim * values + histories


def _camera_flops(plan: TokenPlan, blocks: int, frames: int) -> int:
    """Camera rows of so many frames, encoded by so many blocks."""
    has_modules = plan.shape.has_camera_modules or plan.shape.camera_actions
    return 2 * blocks * frames * 12 * plan.shape.dim if has_modules else 0


def _embedding_flops(plan: TokenPlan, timesteps: int) -> int:
    """Timesteps, and the text once."""
    shape, width = plan.shape, plan.shape.dim
    time = _time_flops(plan) + _time_projection_flops(plan)
    image = _image_tokens(shape) * (shape.image_dim**2 + shape.image_dim * width)
    return timesteps * time + 2 * (shape.text_len * (shape.text_dim * width + width**2) + image)


def _time_flops(plan: TokenPlan) -> int:
    """A timestep, and of a flow map where its step ends."""
    times = 1 + plan.shape.has_end_time
    return times * 2 * (plan.shape.freq_dim * plan.shape.dim + plan.shape.dim**2)


def _time_projection_flops(plan: TokenPlan) -> int:
    return 2 * 6 * plan.shape.dim**2


def _head_flops(plan: TokenPlan) -> int:
    return 2 * plan.target.length * plan.shape.dim * plan.shape.out_channels * 4


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
