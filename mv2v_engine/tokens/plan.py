"""The token plan: one immutable, hashable description of a turn's sequence (METHOD 2).

From the ordered list of segments follow, without touching a tensor, the token ranges, the frame
table, the positions, the lengths at every depth and the FLOPs. It is the key of everything that
depends on shapes, and the thing a user is shown.

F latent frames, H W latent rows and columns, L tokens, C width, k a tokenizer's spatial patch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

from torch import Tensor

from mv2v_engine.config import (
    LUCY_5B,
    WAN_1_3B,
    ConditioningMode,
    MemoryTokenizers,
    MergeMode,
    MergerConfig,
    MergeScope,
    RopeMode,
    TransformerConfig,
)
from mv2v_engine.errors import RequestError
from mv2v_engine.shapes import rate_of
from mv2v_engine.tokens.layout import EncoderName, Layout, MergeStep, Run, encoded_grid, merge_step

Role = Literal["target", "source", "memory"]
_ORDER = ("target", "source", "memory")
# the largest id of a source that Bernini was trained on
MOST_SOURCE_IDS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """One video of the sequence.

    grid: latent (frames, rows, columns). tokenizer: spatial patch k. tau: first temporal id.
    source_id: of a model whose videos have ids, 0 the target's.
    camera: which camera track its tokens take, None for a model without cameras.
    reverse: temporal ids run backwards (memory of long editing, METHOD 4).
    encoder: what makes its tokens; frames_per_token: latent frames that one of them covers.
    is_encoded: of a history, its tokens are given in place of its latents.
    taus: of a target whose frames are not in a row, the temporal id of each; else empty.
    """

    role: Role
    grid: tuple[int, int, int]
    tokenizer: int = 2
    tau: int = 0
    source_id: float = 0
    camera: int | None = None
    mergeable: bool = False
    reverse: bool = False
    encoder: EncoderName = "patches"
    frames_per_token: int = 1
    is_encoded: bool = False
    taus: tuple[int, ...] = ()

    @property
    def encoded_grid(self) -> tuple[int, int, int]:
        """Token (frames, rows, columns)."""
        return encoded_grid(self.encoder, self.grid, self.tokenizer, self.frames_per_token)

    @property
    def num_frames(self) -> int:
        """Frames of tokens."""
        return self.encoded_grid[0]

    @property
    def token_grid(self) -> tuple[int, int]:
        """Token rows and columns of a frame."""
        return self.encoded_grid[1:]

    @property
    def rate(self) -> str:
        """The rate of a history's tokens, as "4x4x2"."""
        return f"{self.tokenizer // 2}x{self.tokenizer // 2}x{self.frames_per_token}"

    @property
    def cell_grid(self) -> tuple[int, int]:
        """Rows and columns of the 1x2x2 grid on which spatial ids live (METHOD 4)."""
        _, rows, columns = self.grid
        return -(-rows // 2), -(-columns // 2)

    @property
    def tokens_per_frame(self) -> int:
        return self.token_grid[0] * self.token_grid[1]

    @property
    def length(self) -> int:
        return self.num_frames * self.tokens_per_frame


@dataclass(frozen=True, slots=True)
class FrameSpan:
    """A row of the frame table: frame `frame` of segment `segment` fills tokens start..stop."""

    segment: int
    frame: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class TokenPlan:
    """The sequence of one turn on one transformer shape.

    fraction: share of each group's candidates that merges at each depth; None follows the
        number of memory videos, clip(0.3 + 0.08 (M - 1), 0.3, 0.7) (METHOD 7).
    """

    segments: tuple[Segment, ...]
    shape: TransformerConfig
    merge: MergeMode = "conv"
    scope: MergeScope = "group"
    fraction: float | None = None
    conditioning: ConditioningMode = "joint"
    rope: RopeMode = "pooled"

    def __post_init__(self) -> None:
        roles = [segment.role for segment in self.segments]
        if roles.count("target") != 1 or roles != sorted(roles, key=_ORDER.index):
            raise RequestError(
                f"a plan needs one target, then sources, then memory; got {roles or 'no segments'}"
            )
        if self.shape.source_channels and "source" in roles:
            raise RequestError(
                "this model takes the source on the target's channels and a plan without a source "
                f"segment (tokens.plan.turn_plan), got {roles}"
            )
        for segment in self.segments:
            if min(segment.grid) < 1:
                raise RequestError(f"a segment's grid must be positive, got {segment.grid}")
            if (segment.camera is None) == self.shape.has_camera:
                raise RequestError(
                    f"{segment.role} has camera {segment.camera}, but the model's "
                    f"camera_conditioning is {self.shape.camera_conditioning!r} and its "
                    f"camera_attention {self.shape.camera_attention!r}"
                )
            if segment.role == "target":
                if segment.tokenizer != 2 or segment.grid[1] % 2 or segment.grid[2] % 2:
                    raise RequestError(
                        "the target uses the base 1x2x2 patches and needs even latent rows and "
                        f"columns, got tokenizer {segment.tokenizer} on grid {segment.grid}"
                    )
            elif segment.encoder == "history":
                self._check_history(segment)
            elif segment.tokenizer not in self.shape.tokenizers:
                raise RequestError(
                    f"{segment.role} asks for tokenizer 1x{segment.tokenizer}x{segment.tokenizer}; "
                    f"this model has {self.shape.tokenizers or 'none'}"
                )
        if self.shape.is_by_frames and (
            self.conditioning == "static"
            or any(s.mergeable or s.token_grid != self.target.token_grid for s in self.segments)
        ):
            raise RequestError(
                "this model has operations over all frames of a place (Echo-Memory): it takes "
                'conditioning="joint", and frames of one grid that do not merge'
            )
        if self.fraction is None:
            rule = min(max(0.3 + 0.08 * (self.num_memory - 1), 0.3), 0.7)
            object.__setattr__(self, "fraction", round(rule, 6))
        if not 0 <= self.merge_fraction <= 1:
            raise RequestError(f"the merge fraction must lie in 0..1, got {self.fraction}")

    def lesser(self) -> tuple[tuple[TokenPlan, tuple[int, ...]], ...]:
        """The plan without reference images that are segments, and the target's alone.

        With each go the places of its conditioning among this plan's. Nothing without such images.
        """
        sources = [place for place, s in enumerate(self.segments) if s.role == "source"]
        if not self.shape.source_ids or len(sources) < 2:
            return ()
        others = [place for place in range(1, len(self.segments)) if place not in sources[1:]]
        return self._keeping(others), self._keeping([])

    def without(self, role: Role) -> tuple[TokenPlan, tuple[int, ...]] | None:
        """The plan without its segments of a role, and the places of what is left, as `lesser`.

        None if there is no such segment, or no conditioning would be left.
        """
        kept = [place for place, s in enumerate(self.segments) if place and s.role != role]
        return self._keeping(kept) if 0 < len(kept) < len(self.segments) - 1 else None

    def _keeping(self, kept: Sequence[int]) -> tuple[TokenPlan, tuple[int, ...]]:
        """The plan with some segments beside the target; places are counted without the target."""
        segments = tuple(self.segments[place] for place in (0, *kept))
        # nothing that could be kept: the target's tokens depend on every step
        conditioning: ConditioningMode = self.conditioning if kept else "joint"
        plan = replace(self, segments=segments, conditioning=conditioning)
        return plan, tuple(place - 1 for place in kept)

    def _check_history(self, segment: Segment) -> None:
        """Refuse a history that the model cannot encode, or that has no whole token."""
        history, (frames, rows, columns) = self.shape.history, segment.grid
        if history is None or segment.rate not in history.rates:
            has = "no history encoder" if history is None else f"{' and '.join(history.rates)}"
            raise RequestError(
                f"a history of rate {segment.rate} needs the encoder of that rate, this model has "
                f"{has}"
            )
        if self.shape.has_phases or segment.mergeable or segment.role != "memory":
            raise RequestError(
                "a history is memory that does not merge, of a model without camera phases, got "
                f"{segment.role}, mergeable {segment.mergeable}"
            )
        patch = segment.tokenizer
        if min(rows, columns) < patch:
            raise RequestError(
                f"a token of rate {segment.rate} covers {patch}x{patch} latent cells, the video "
                f"has {rows}x{columns}; use a finer rate"
            )
        if frames < segment.frames_per_token:
            raise RequestError(
                f"a token of rate {segment.rate} covers {segment.frames_per_token} latent frames, "
                f"the history has {frames}; use a finer rate, or a longer history"
            )

    @property
    def merge_fraction(self) -> float:
        return self.fraction or 0.0

    @property
    def num_memory(self) -> int:
        return sum(segment.role == "memory" for segment in self.segments)

    @property
    def target(self) -> Segment:
        return self.segments[0]

    @property
    def length(self) -> int:
        """Tokens before any merging."""
        return self.layout.length

    @property
    def lengths_by_kind(self) -> dict[str, int]:
        """Tokens of target, source and memory before any merging."""
        lengths = dict.fromkeys(_ORDER, 0)
        for segment in self.segments:
            lengths[segment.role] += segment.length
        return lengths

    @cached_property
    def layout(self) -> Layout:
        """The sequence as it enters the first block: one run a segment."""
        return Layout(
            tuple(
                Run(*segment.token_grid, segment.num_frames, segment.mergeable)
                for segment in self.segments
            )
        )

    @cached_property
    def camera_dim(self) -> int:
        """Numbers of a camera as it is given."""
        return self.shape.camera_dim

    @property
    def attended_history(self) -> tuple[int, int] | None:
        """Tokens and channels of what a history was made of, if blocks attend to it."""
        history = self.shape.history
        lengths = [s.length for s in self.segments if s.encoder == "history"]
        if history is None or not history.cross_attention or not lengths:
            return None
        return sum(lengths), history.channels[-1]

    @cached_property
    def latent_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Every segment's latents (C, F, H, W); the target's hold a source on channels, too.

        Of a history that is encoded already its tokens, each followed by what it was made of where
        blocks attend to that: (L, width).
        """
        width = self.shape.dim
        if self.attended_history is not None:
            width += self.attended_history[1]
        return tuple(
            (s.length, width) if s.is_encoded else (self.shape.channels_of(s.role), *s.grid)
            for s in self.segments
        )

    @cached_property
    def frame_table(self) -> tuple[FrameSpan, ...]:
        """Every frame's token range, in sequence order."""
        table, start = [], 0
        for index, segment in enumerate(self.segments):
            for frame in range(segment.num_frames):
                stop = start + segment.tokens_per_frame
                table.append(FrameSpan(index, frame, start, stop))
                start = stop
        return tuple(table)

    def positions(self) -> Tensor:
        """Position ids [L, 3]: temporal id, first row and first column on the 1x2x2 grid."""
        from mv2v_engine.tokens.positions import position_ids

        return position_ids(self)

    @property
    def merger(self) -> MergerConfig:
        """The merging kernel; a shape without one averages 2x2 cells."""
        return self.shape.merger or MergerConfig()

    def merge_counts(self, layout: Layout) -> tuple[int, ...]:
        """floor(fraction * n) of each group of a layout (METHOD 7)."""
        # the rounding keeps 0.7 * 10 at 7 in spite of binary fractions
        return tuple(
            int(round(self.merge_fraction * group.num_frames, 9)) for group in layout.groups()
        )

    def step_at(self, block: int, before: Layout, counts: Sequence[int]) -> MergeStep:
        """The merge of given counts on a given layout, by this plan's mode and kernel."""
        kernel, discard = self.merger.kernel, self.merge == "discard"
        return merge_step(block, before, counts, kernel=kernel, discard=discard)

    @cached_property
    def merge_steps(self) -> tuple[MergeStep, ...]:
        """The merges of group scope in order of depth; empty when nothing merges.

        Raises:
            RequestError: with scope "joint" the lengths depend on data.
        """
        if self.merge == "off":
            return ()
        if self.scope == "joint":
            raise RequestError('with scope="joint" the merged counts depend on data; use "group"')
        steps, layout = [], self.layout
        for block in self.shape.merging_blocks:
            step = self.step_at(block, layout, self.merge_counts(layout))
            if step.groups:
                steps.append(step)
            layout = step.after
        return tuple(steps)

    def lengths_by_block(self, steps: Sequence[MergeStep] | None = None) -> tuple[int, ...]:
        """Tokens in each block's attention. `steps`: the merges that happened (joint scope)."""
        steps = self.merge_steps if steps is None else steps
        lengths, layout = [], self.layout
        for block in range(self.shape.num_layers):
            for step in steps:
                layout = step.after if step.block == block else layout
            lengths.append(layout.length)
        return tuple(lengths)

    def flops(self, steps: Sequence[MergeStep] | None = None) -> int:
        """FLOPs of one forward's blocks, two a multiply-add, as METHOD 16 counts them.

        With static conditioning: one step of the target over conditioning K/V computed before.
        What METHOD 16 leaves out (embedding, merging, head) is in `tokens.flops.flop_table`.
        """
        from mv2v_engine.tokens.flops import block_flops

        return block_flops(self, steps)

    def describe(self) -> dict[str, Any]:
        """The plan as plain data, for reports and the command line."""
        steps = () if self.scope == "joint" else self.merge_steps
        return {
            "tokens": self.length,
            "tokens_by_kind": self.lengths_by_kind,
            "memory_encoders": [s.encoder for s in self.segments if s.role == "memory"],
            "memory_tokenizers": [s.tokenizer for s in self.segments if s.role == "memory"],
            "memory_tokens": [s.length for s in self.segments if s.role == "memory"],
            "merge": self.merge,
            "merge_fraction": self.fraction,
            "merges": [
                {
                    "block": step.block,
                    "frames": sum(group.num_merged for group in step.groups),
                    "of": sum(group.num_frames for group in step.groups),
                    "tokens_before": step.before.length,
                    "tokens_after": step.after.length,
                }
                for step in steps
            ],
            "conditioning": self.conditioning,
        }


def memory_tokenizers(
    count: int,
    available: Sequence[int] = (2, 4, 8),
    *,
    mode: MemoryTokenizers = "ranked",
) -> tuple[int, ...]:
    """Tokenizers by rank: 1x4x4 for the first three memory videos, then 1x8x8 (METHOD 3).

    mode: "uniform" is 1x2x2 for every one (the ablation).
    """
    chosen = (2,) * count
    if mode == "ranked":
        chosen = tuple(4 if rank < 3 else 8 for rank in range(count))
    missing = sorted(set(chosen) - set(available))
    if missing:
        raise RequestError(f"memory needs tokenizers {missing}; this model has {tuple(available)}")
    return chosen


def turn_plan(
    shape: TransformerConfig,
    grid: tuple[int, int, int],
    tokenizers: Sequence[int],
    *,
    source: bool = True,
    preceding: bool = True,
    references: Sequence[tuple[int, int]] = (),
    merge: MergeMode = "conv",
    scope: MergeScope = "group",
    fraction: float | None = None,
    conditioning: ConditioningMode = "joint",
    rope: RopeMode = "pooled",
    history: str | None = None,
    history_frames: int = 0,
    is_encoded: bool = False,
) -> TokenPlan:
    """The plan of a novel view, or of an edit's window: target, source, memory by rank (METHOD 2).

    Where an edit's source rides on the target's channels, its plan has no source segment.

    Args:
        grid: latent (frames, rows, columns), the same for every video.
        tokenizers: one per memory video, best first.
        source: whether a novel view has its source.
        preceding: whether the first memory video of an edit is the segment just before.
        references: latent (rows, columns) of images that an edit refers to; VACE's are frames
            before the target's, and have its rows and columns.
        history: the rate at which the memory videos, one after the other, are one history; None
            gives each its tokenizer. history_frames, is_encoded: see `history_segments`.

    Raises:
        RequestError: references to a model that takes none.
    """
    if references and not (shape.source_ids or shape.vace_layers):
        raise RequestError(f"this model takes no reference images, got {len(references)}")
    by_rank = () if history is not None else tokenizers
    if shape.source_ids:
        segments = _segments_by_id(grid, references, by_rank)
    elif shape.source_channels:
        longer = (len(references) + grid[0], *grid[1:])
        segments = _edit_segments(grid, longer, by_rank, preceding)
    else:
        segments = _view_segments(shape, grid, by_rank, source)
    past: Iterator[Segment] = iter(())
    if history is not None and tokenizers:
        length = (len(tokenizers) * grid[0], *grid[1:])
        past = history_segments(shape, length, history, history_frames, is_encoded=is_encoded)
    return TokenPlan(
        segments=(*segments, *past),
        shape=shape,
        merge=merge,
        scope=scope,
        fraction=fraction,
        conditioning=conditioning,
        rope=rope,
    )


def history_segments(
    shape: TransformerConfig,
    grid: tuple[int, int, int],
    rate: str,
    whole_frames: int = 0,
    *,
    is_encoded: bool = False,
) -> Iterator[Segment]:
    """A history just before the target, with the ids of its own latent frames (METHOD 17).

    grid: of all of it. whole_frames: how many of its last latent frames follow once more, at the
    source's 1x2x2 tokens. is_encoded: forwards are given its tokens. Cameras are tracks 2 and 3.
    """
    rows, _, frames = rate_of(rate)
    track = 2 if shape.has_camera else None
    yield Segment(
        role="memory",
        grid=grid,
        tokenizer=2 * rows,
        tau=-grid[0],
        camera=track,
        encoder="history",
        frames_per_token=frames,
        is_encoded=is_encoded,
    )
    if count := min(whole_frames, grid[0]):
        camera = None if track is None else track + 1
        yield Segment(role="memory", grid=(count, *grid[1:]), tau=-count, camera=camera)


def _view_segments(
    shape: TransformerConfig,
    grid: tuple[int, int, int],
    tokenizers: Sequence[int],
    has_source: bool,
) -> Iterator[Segment]:
    """Temporal ids and camera tracks of METHOD 4 and 5.

    Tracks: 0 target, 1 source, 2... memory; all 0 for a stock ReCamMaster, whose conditioning
    tokens take the target's camera. With `shared_time` all ids begin at 0.
    """
    frames, is_shared = grid[0], shape.camera_conditioning == "target"
    taus = (0, 0) if shape.shared_time else (frames, 2 * frames)
    context, is_whole = grid, not shape.context_frames
    if count := shape.context_frames:
        # a state runs from the past on, which has the ids before the target's
        context, taus = (count, *grid[1:]), (-count if shape.state_space else frames, 2 * frames)

    def track(index: int) -> int | None:
        return (0 if is_shared else index) if shape.has_camera else None

    yield Segment(role="target", grid=grid, camera=track(0))
    if has_source:
        yield Segment(role="source", grid=context, tau=taus[0], camera=track(1), mergeable=is_whole)
    for rank, tokenizer in enumerate(tokenizers):
        yield Segment(
            role="memory",
            grid=grid,
            tokenizer=tokenizer,
            tau=taus[1],
            camera=track(2 + rank),
            mergeable=is_whole,
        )


def _segments_by_id(
    grid: tuple[int, int, int], references: Sequence[tuple[int, int]], tokenizers: Sequence[int]
) -> Iterator[Segment]:
    """Target 0, source 1, then references and memory; more ids than were trained lie evenly among
    these."""
    count, most = 1 + len(references) + len(tokenizers), MOST_SOURCE_IDS
    ids = [1 + n * (min(count, most) - 1) / max(count - 1, 1) for n in range(count)]
    yield Segment(role="target", grid=grid)
    yield Segment(role="source", grid=grid, source_id=ids[0], mergeable=True)
    for source_id, (rows, columns) in zip(ids[1:], references, strict=False):
        yield Segment(role="source", grid=(1, rows, columns), source_id=source_id)
    for source_id, tokenizer in zip(ids[1 + len(references) :], tokenizers, strict=True):
        yield Segment(
            role="memory", grid=grid, tokenizer=tokenizer, source_id=source_id, mergeable=True
        )


def _edit_segments(
    grid: tuple[int, int, int],
    target: tuple[int, int, int],
    tokenizers: Sequence[int],
    has_preceding: bool,
) -> Iterator[Segment]:
    """The segment just before takes the ids T..2T-1, all other memory shares 2T..3T-1; memory
    frames run backwards (METHOD 4).

    target: the grid with references before its frames, whose T counts.
    """
    frames = target[0]
    yield Segment(role="target", grid=target)
    for rank, tokenizer in enumerate(tokenizers):
        yield Segment(
            role="memory",
            grid=grid,
            tokenizer=tokenizer,
            tau=frames if has_preceding and rank == 0 else 2 * frames,
            mergeable=True,
            reverse=True,
        )


def latent_grid(
    frames: int, size: tuple[int, int], *, spatial_stride: int = 8
) -> tuple[int, int, int]:
    """Latent (frames, rows, columns) of a video of 4n+1 frames and (height, width) pixels."""
    if frames % 4 != 1 or size[0] % spatial_stride or size[1] % spatial_stride:
        raise RequestError(
            f"a video needs 4n+1 frames and a size divisible by {spatial_stride}, "
            f"got {frames} frames of {size[0]}x{size[1]}"
        )
    return (frames - 1) // 4 + 1, size[0] // spatial_stride, size[1] // spatial_stride


def novel_view_plan(
    *,
    memory: int,
    frames: int = 81,
    size: tuple[int, int] = (480, 832),
    merge: MergeMode = "conv",
    fraction: float | None = None,
    conditioning: ConditioningMode = "joint",
    shape: TransformerConfig = WAN_1_3B,
    tokenizers: MemoryTokenizers = "ranked",
    spatial_stride: int = 8,
) -> TokenPlan:
    """The plan of a turn with `memory` retrieved videos, without any weights (METHOD 16).

    tokenizers: by rank, or 1x2x2 for every memory video (the ablation). spatial_stride: the VAE's.
    """
    if memory < 0:
        raise RequestError(f"memory must be a count of videos, got {memory}")
    return turn_plan(
        shape,
        latent_grid(frames, size, spatial_stride=spatial_stride),
        memory_tokenizers(memory, shape.tokenizers, mode=tokenizers),
        merge=merge,
        fraction=fraction,
        conditioning=conditioning,
    )


# the plan of an edit's window that remembers `memory` segments
window_plan = partial(novel_view_plan, shape=LUCY_5B, spatial_stride=16)
