"""Merging before a block: find the frames that the target ignores, fuse them, keep the books
(METHOD 6-7).

B batch, L tokens, F frames of the sequence, G frames of a group, M frames that merge, C width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mv2v_engine.config import MergerConfig
from mv2v_engine.models.block import Block
from mv2v_engine.models.sequence import Sequence, run_starts
from mv2v_engine.ops.frame_responsiveness import frame_responsiveness
from mv2v_engine.ops.token_merge import token_merge
from mv2v_engine.tokens.layout import Layout, MergeStep
from mv2v_engine.tokens.plan import TokenPlan

if TYPE_CHECKING:
    from mv2v_engine.models.dit import MV2VTransformer


@dataclass(frozen=True, eq=False)
class MergeRecord:
    """The result of one merge.

    merged: frame-table indices [B, M], ascending responsiveness within a group. responsiveness
    [B, F'] of the conditioning frames `frames` [B, F'] before it.
    """

    step: MergeStep
    merged: Tensor
    responsiveness: Tensor
    frames: Tensor


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


def merged(
    model: MV2VTransformer,
    index: int,
    block: Block,
    sequence: Sequence,
    plan: TokenPlan,
    records: list[MergeRecord] | None,
) -> Sequence:
    """One sample's sequence as it enters merging block `index`; itself where nothing merges.

    block: that block, with its weights on the device. records: receives what was merged.
    """
    layout, counts = sequence.layout, plan.merge_counts(sequence.layout)
    # nothing to choose: the plan counts no responsiveness here either
    if not layout.groups() or (plan.scope == "group" and not any(counts)):
        return sequence
    with torch.no_grad():
        whole = sequence.whole()
        scores = responsiveness(model, block, sequence, whole)
    if plan.scope == "joint":
        counts = joint_counts(scores, sequence, plan.merge_fraction)
    step = plan.step_at(index, layout, counts)
    if not step.groups:
        return sequence
    fused, record = apply_merge(
        whole,
        step,
        scores,
        _merger(model, index),
        kernel=plan.merger.kernel,
        discard=plan.merge == "discard",
        backend=model.backend,
    )
    if records is not None:
        records.append(record)
    return fused if sequence.shard is None else fused.over(sequence.shard.context)


def _merger(model: MV2VTransformer, index: int) -> Merger | None:
    """The block's merger, or the one that all share; None for a model that only drops tokens."""
    config = model.config
    if config.merger is None:
        return None
    merger = model.mergers[str(config.merging_blocks[0] if config.merger.shared else index)]
    assert isinstance(merger, Merger)
    return merger


def responsiveness(
    model: MV2VTransformer, block: Block, sequence: Sequence, whole: Sequence | None = None
) -> Tensor:
    """R_t [B, F'] of the conditioning frames that enter a block (Eq. 4-5).

    whole: the sequence's tokens of all ranks; each takes its own queries and all keys, and the
    largest of all ranks is R_t.
    """
    split, runs = sequence.target_length, sequence.layout.runs[1:]
    if sequence.static_temb_6 is None and sequence.shard is None:
        hidden = block.attention_input(sequence)
        target, conditioning = hidden[:, :split], hidden[:, split:]
    else:
        halves = sequence.halves()[0], (whole or sequence).halves()[1]
        target, conditioning = (block.attention_input(half) for half in halves)
    heads = model.config.num_attention_heads if model.responsiveness_heads == "mean" else 1
    scores = frame_responsiveness(
        block.attn1.plain_queries(target),
        block.attn1.plain_keys(conditioning),
        frames=[run.num_frames for run in runs],
        tokens=[run.tokens_per_frame for run in runs],
        num_heads=heads,
        backend=model.backend,
    )
    if sequence.shard is not None:
        sequence.shard.context.take_largest(scores)
    return scores


def merge_order(scores_BG: Tensor) -> Tensor:
    """Frame numbers [B, G] from the first to merge to the last: least responsive first.

    Ties: the later frame merges first (METHOD 7), hence the stable sort of the reversed row.
    """
    last = scores_BG.shape[1] - 1
    return last - scores_BG.flip(1).argsort(dim=1, stable=True)


def joint_counts(scores_BF: Tensor, sequence: Sequence, fraction: float) -> tuple[int, ...]:
    """How many frames of each group merge when all groups are ranked together (scope "joint").

    Reads the scores on the host, so it is eager only. scores: those of the sequence's conditioning
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


def _group_slots(layout: Layout, runs: tuple[int, ...], device: torch.device) -> Tensor:
    """The layout's frame numbers of the given runs, made on the device."""
    starts = run_starts(layout)
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
    xs, table = _runs_of(sequence.x, layout), sequence.rope
    if sequence.rays is not None:
        # they merge as positions do, by the mean
        table = torch.cat([table.expand(len(sequence.x), -1, -1), sequence.rays.float()], -1)
    ropes = _runs_of(table, layout)
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
    rope, rays = torch.cat(parts_rope, 1), None
    if sequence.rays is not None:
        rope, rays = rope.split([sequence.rope.shape[-1], sequence.rays.shape[-1]], -1)
        rope, rays = rope.contiguous(), rays.to(sequence.rays.dtype)
    fused = sequence.regrouped(
        torch.cat(parts_x, 1), rope, torch.cat(parts_frames, 1), step.after, rays
    )
    before = sequence.frames[:, num_target:]
    record = MergeRecord(step, torch.cat(merged_frames, 1), scores_BF, before)
    return fused, record
