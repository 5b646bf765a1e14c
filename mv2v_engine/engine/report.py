"""A turn's report: what was asked, remembered, merged and spent, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mv2v_engine.engine.request import TurnRequest
from mv2v_engine.engine.runner import Denoised, Denoiser
from mv2v_engine.memory.retrieval import Retrieval
from mv2v_engine.models.token_merge import MergeRecord
from mv2v_engine.progress import Spans
from mv2v_engine.tokens.flops import conditioning_bytes, flop_table, kept_flop_table
from mv2v_engine.tokens.layout import MergeStep
from mv2v_engine.tokens.plan import TokenPlan

if TYPE_CHECKING:
    from mv2v_engine.engine.engine import Engine


@dataclass(frozen=True, eq=False)
class Prepared:
    """A turn before its first step."""

    request: TurnRequest
    retrieval: Retrieval
    denoiser: Denoiser


def turn_report(
    engine: Engine, prepared: Prepared, denoised: Denoised, spans: Spans, *, number: int
) -> dict[str, Any]:
    """Everything about a turn (ARCHITECTURE, contracts)."""
    request, retrieval, plan = prepared.request, prepared.retrieval, prepared.denoiser.plan
    steps = [record.step for record in denoised.records]
    return {
        "turn": number,
        "camera": request.camera.name,
        "seed": request.seed,
        "prompt": request.prompt,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "memory": {
            "mode": request.memory,
            "ranking": engine.config.memory_ranking,
            **retrieval.to_dict(),
        },
        "plan": plan.describe(),
        "merged_frames": merge_report(plan, denoised.records, retrieval.turns),
        "forwards": denoised.num_forwards,
        **turn_flops(plan, steps, denoised.num_forwards),
        "conditioning_bytes": conditioning_bytes(plan, engine.dtype.itemsize, steps),
        "seconds": {name: round(value, 4) for name, value in spans.seconds.items()},
        "peak_bytes": dict(spans.peak_bytes),
        "cache_bytes": engine.cache.bytes_used,
        "cache_bytes_by_tier": engine.cache.bytes_by_tier(),
        **engine.describe(),
    }


def segment_names(plan: TokenPlan, memory_turns: Sequence[int]) -> list[str]:
    """What a report calls each segment: target, source, turn N."""
    turns = iter(memory_turns)
    return [
        f"turn {next(turns)}" if segment.role == "memory" else segment.role
        for segment in plan.segments
    ]


def turn_flops(plan: TokenPlan, steps: Sequence[MergeStep], num_forwards: int) -> dict[str, Any]:
    """FLOPs by part of a turn's first forward and of each later one, and of all forwards together.

    With static conditioning the later ones run the target alone. steps: the merges that happened.
    """
    first = flop_table(plan, steps)
    later = kept_flop_table(plan, steps) if plan.conditioning == "static" else first
    return {
        "flops_first_forward": first,
        "flops_per_forward": later,
        "flops": sum(first.values()) + (num_forwards - 1) * sum(later.values()),
    }


def merge_report(
    plan: TokenPlan, records: Sequence[MergeRecord], memory_turns: Sequence[int]
) -> list[dict[str, Any]]:
    """Which latent frames each merging block fused, by video: in the last step, or for good."""
    names, table = segment_names(plan, memory_turns), plan.frame_table
    rows = []
    for record in records:
        by_video: dict[str, list[int]] = {}
        for index in sorted(record.merged[0].tolist()):
            span = table[index]
            by_video.setdefault(names[span.segment], []).append(span.frame)
        rows.append(
            {
                "block": record.step.block,
                "frames": by_video,
                "tokens_before": record.step.before.length,
                "tokens_after": record.step.after.length,
            }
        )
    return rows
