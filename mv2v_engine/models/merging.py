"""A merge before a block: the frames that its own queries and keys show to be ignored."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mv2v_engine.models.forward_pass import ForwardPass
from mv2v_engine.models.token_merge import (
    Merger,
    MergeRecord,
    Sequence,
    apply_merge,
    joint_counts,
)

if TYPE_CHECKING:
    from mv2v_engine.models.dit import MV2VTransformer


def merged_before(
    model: MV2VTransformer, index: int, begun: ForwardPass, records: list[MergeRecord] | None
) -> Sequence:
    """The tokens as they enter merging block `index`; the forward's own where nothing merges.

    records: receives what was merged.
    """
    sequence, plan, layout = begun.sequence, begun.plan, begun.sequence.layout
    counts = plan.merge_counts(layout)
    # nothing to choose: the plan counts no responsiveness here either
    if not layout.groups() or (plan.scope == "group" and not any(counts)):
        return sequence
    with torch.no_grad():
        given, whole = (begun.temb_6, begun.static_temb, begun.rows), sequence.whole()
        block = model.blocks[index]
        scores = model.responsiveness(block, sequence, *given, whole)  # type: ignore[arg-type]
    if plan.scope == "joint":
        counts = joint_counts(scores, sequence, plan.merge_fraction)
    step = plan.step_at(index, layout, counts)
    if not step.groups:
        return sequence
    merged, record = apply_merge(
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
    return merged if sequence.shard is None else merged.over(sequence.shard.context)


def _merger(model: MV2VTransformer, index: int) -> Merger | None:
    """The block's, or the one that all share; None for a model that drops tokens alone."""
    config = model.config
    if config.merger is None:
        return None
    merger = model.mergers[str(config.merging_blocks[0] if config.merger.shared else index)]
    assert isinstance(merger, Merger)
    return merger
