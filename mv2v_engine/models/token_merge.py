"""Merging at depth: choose the unresponsive frames, fuse them, keep the books (METHOD 6-7).

B batch, L tokens, F frames of the sequence, G frames of a group, P tokens of a frame, C width.
"""

from __future__ import annotations

from collections.abc import Sequence as Series
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor, nn

from mv2v_engine.config import MergerConfig
from mv2v_engine.errors import RequestError
from mv2v_engine.models.static_cache import KeysValues
from mv2v_engine.ops.token_merge import token_merge
from mv2v_engine.parallel.context import ContextGroup, Shard
from mv2v_engine.tokens.layout import Layout, MergeStep


@dataclass(frozen=True, eq=False)
class Sequence:
    """Tokens with everything that travels with them.

    x [B, L, C]; rope [1 or B, L, D]; frames [B, F] and token_frames [B, L] say which frame of the
    plan's frame table each frame of the layout, and each token, is. Made by `of`.
    row [B, L]: which timestep modulates a token; None is its sample's.
    shard: over which ranks the layout's tokens lie; L are then this rank's, and `frames` still all.
    """

    x: Tensor
    rope: Tensor
    frames: Tensor
    token_frames: Tensor
    layout: Layout
    row: Tensor | None = None
    shard: Shard | None = None
    # attention is dense: other than in a PackedSequence
    text: ClassVar[None] = None

    @classmethod
    def of(cls, x: Tensor, rope: Tensor, frames: Tensor, layout: Layout) -> Sequence:
        """A sequence from one merge to the next; every block reads what is worked out here."""
        return cls(x, rope, frames, frames[:, token_slots(layout, frames.device)], layout)

    @property
    def target_length(self) -> int:
        """How many of the L tokens are the target's: the first ones."""
        return self.layout.target_length if self.shard is None else self.shard.own(0)

    def over(self, context: ContextGroup | None) -> Sequence:
        """This rank's part of the whole sequence that it has; as it is without ranks to share it.

        Raises:
            RequestError: there are more ranks than target tokens.
        """
        if context is None:
            return self
        target, length = self.layout.target_length, self.layout.length
        if target < context.size:
            raise RequestError(
                f"{target} target tokens cannot be shared by context={context.size} ranks; use "
                "fewer ranks"
            )
        shard = Shard(context, (target, length - target))
        by_token = (self.x, self.rope, self.token_frames)
        x, rope, token_frames = (shard.take(tensor) for tensor in by_token)
        return replace(self, x=x, rope=rope, token_frames=token_frames, shard=shard)

    def whole(self) -> Sequence:
        """All tokens, on every rank; without rows."""
        if self.shard is None:
            return self
        x, rope = self.shard.gather(self.x), self.shard.gather(self.rope)
        return Sequence.of(x, rope, self.frames, self.layout)

    def with_frame_timesteps(self) -> Sequence:
        """The same, modulated frame by frame: a sample's timesteps are rows, one a frame."""
        first = torch.arange(len(self.x), device=self.x.device) * self.layout.num_frames
        return replace(self, row=self.token_frames + first[:, None])

    def followed_by(self, own: Tensor, kept: Series[Tensor | None]) -> Tensor:
        """K or V of the sequence's tokens [B, L, N, D], then those kept for it."""
        return torch.cat([own, *(more for more in kept if more is not None)], 1)

    def pack_over(self, kept: Series[KeysValues | None] | None) -> None:
        return None

    def halves(self) -> tuple[Sequence, Sequence]:
        """The target alone, and the conditioning alone; both count the plan's frames as before."""
        length, runs, shard = self.target_length, self.layout.runs, self.shard
        count = runs[0].num_frames
        by_token = (self.x, self.rope, self.token_frames)
        x, rope, token_frames = (tensor[:, :length] for tensor in by_token)
        target = Sequence(x, rope, self.frames[:, :count], token_frames, Layout(runs[:1]))
        x, rope, token_frames = (tensor[:, length:] for tensor in by_token)
        rest = Sequence(x, rope, self.frames[:, count:], token_frames, Layout(runs[1:]))
        if shard is None:
            return target, rest
        return replace(target, shard=shard.alone(0)), replace(rest, shard=shard.alone(1))


@dataclass(frozen=True, eq=False)
class MergeRecord:
    """What one merge did. merged: frame-table indices [B, M], ascending responsiveness within a
    group; responsiveness [B, F'] of the conditioning frames `frames` [B, F'] before it."""

    step: MergeStep
    merged: Tensor
    responsiveness: Tensor
    frames: Tensor


def token_slots(layout: Layout, device: torch.device) -> Tensor:
    """The layout's frame number of every token: int64 [L].

    Made on the device from Python numbers: a copy from the host would wait for it.
    """
    if not layout.runs:
        return torch.empty(0, dtype=torch.int64, device=device)
    starts = _run_starts(layout)
    numbers = [
        torch.arange(start, start + run.num_frames, device=device)[:, None]
        for start, run in zip(starts, layout.runs, strict=True)
    ]
    slots = [
        number.expand(-1, run.tokens_per_frame).flatten()
        for number, run in zip(numbers, layout.runs, strict=True)
    ]
    return torch.cat(slots)


class Merger(nn.Module):
    """C_theta of one merging block: a 2-D weight pools and projects, a 4-D one convolves."""

    def __init__(self, dim: int, config: MergerConfig) -> None:
        super().__init__()
        shape = (dim, dim) if config.pooled else (dim, dim // config.groups, *config.kernel)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(dim)) if config.bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Average pooling, which leaves a constant frame as it is."""
        if self.weight.is_meta:
            return
        dim, groups = self.weight.shape[0], self.weight.shape[0] // self.weight.shape[1]
        nn.init.zeros_(self.weight)
        channel = torch.arange(dim, device=self.weight.device)
        if self.weight.ndim == 2:
            self.weight[channel, channel] = 1
        else:
            cells = self.weight.shape[2] * self.weight.shape[3]
            self.weight[channel, channel % (dim // groups)] = 1 / cells
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def merge_order(scores_BG: Tensor) -> Tensor:
    """Frame numbers [B, G] from the first to merge to the last: least responsive first.

    Ties: the later frame merges first (METHOD 7), hence the stable sort of the reversed row.
    """
    last = scores_BG.shape[1] - 1
    return last - scores_BG.flip(1).argsort(dim=1, stable=True)


def joint_counts(scores_BF: Tensor, sequence: Sequence, fraction: float) -> tuple[int, ...]:
    """How many frames of each group merge when all groups are ranked together (scope "joint").

    Reads the scores on the host, so it is eager only. scores: of the sequence's conditioning
    frames, batch of one.
    """
    layout = sequence.layout
    groups = layout.groups()
    host = torch.device("cpu")
    candidates = torch.cat([_group_slots(layout, group.runs, host) for group in groups])
    owner = torch.cat(
        [
            torch.full((group.num_frames,), index, dtype=torch.int64, device="cpu")
            for index, group in enumerate(groups)
        ]
    )
    # ties go by a frame's place in the plan, whatever group it is in
    in_time = sequence.frames[0].cpu()[candidates].argsort()
    candidates, owner = candidates[in_time], owner[in_time]
    total = int(round(fraction * len(candidates), 9))
    scores = scores_BF[:, candidates.to(scores_BF.device) - layout.runs[0].num_frames]
    chosen = merge_order(scores)[0, :total].cpu()
    return tuple(int((owner[chosen] == index).sum()) for index in range(len(groups)))


def _run_starts(layout: Layout) -> list[int]:
    """The layout's number of every run's first frame."""
    return [0, *accumulate(run.num_frames for run in layout.runs)][:-1]


def _group_slots(layout: Layout, runs: tuple[int, ...], device: torch.device) -> Tensor:
    """The layout's frame numbers of the given runs, made on the device."""
    starts = _run_starts(layout)
    return torch.cat(
        [
            torch.arange(starts[i], starts[i] + layout.runs[i].num_frames, device=device)
            for i in runs
        ]
    )


def _runs_of(tensor_BL: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    """Split a token tensor [., L, .] into the layout's runs."""
    runs: tuple[Tensor, ...] = tensor_BL.split([run.length for run in layout.runs], dim=1)
    return runs


def apply_merge(
    sequence: Sequence,
    step: MergeStep,
    scores_BF: Tensor,
    merger: Merger | None,
    *,
    kernel: tuple[int, int],
    discard: bool,
    backend: str,
) -> tuple[Sequence, MergeRecord]:
    """Carry out a step whose groups merge their least responsive frames.

    scores: responsiveness [B, F'] of the layout's conditioning frames. merger None averages.
    """
    layout, num_target = step.before, step.before.runs[0].num_frames
    xs, ropes = _runs_of(sequence.x, layout), _runs_of(sequence.rope, layout)
    moved = {index for group in step.groups for index in group.runs}
    still = [index for index in range(len(layout.runs)) if index not in moved]
    parts_x = [xs[index] for index in still]
    parts_rope = [ropes[index].expand(len(sequence.x), -1, -1) for index in still]
    device = sequence.frames.device
    parts_frames = [sequence.frames[:, _group_slots(layout, tuple(still), device)]]
    merged_frames = []
    for group in step.groups:
        slots = _group_slots(layout, group.runs, device)
        order = merge_order(scores_BF[:, slots - num_target])
        merged = order[:, : group.num_merged].sort(1).values
        kept = order[:, group.num_merged :].sort(1).values
        frame_shape = (group.num_frames, group.rows * group.columns)
        x, rope = token_merge(
            torch.cat([xs[index] for index in group.runs], 1).unflatten(1, frame_shape),
            torch.cat([ropes[index] for index in group.runs], 1).unflatten(1, frame_shape),
            kept,
            merged[:, :0] if discard else merged,
            grid=(group.rows, group.columns),
            kernel=kernel,
            weight=merger.weight if merger else None,
            bias=merger.bias if merger else None,
            backend=backend,
        )
        parts_x.append(x)
        parts_rope.append(rope)
        ids = sequence.frames[:, slots]
        merged_frames.append(ids.gather(1, order[:, : group.num_merged]))
        parts_frames.append(ids.gather(1, kept))
        if not discard:
            parts_frames.append(ids.gather(1, merged))
    merged_sequence = Sequence.of(
        torch.cat(parts_x, 1), torch.cat(parts_rope, 1), torch.cat(parts_frames, 1), step.after
    )
    before = sequence.frames[:, num_target:]
    record = MergeRecord(step, torch.cat(merged_frames, 1), scores_BF, before)
    return merged_sequence, record
