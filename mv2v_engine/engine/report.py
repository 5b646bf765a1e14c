"""A turn's report: what was asked, remembered, merged and spent, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mv2v_engine.engine.request import TurnRequest, camera_notes
from mv2v_engine.engine.runner import Denoised, Denoiser
from mv2v_engine.memory.retrieval import Retrieval
from mv2v_engine.models.token_merge import MergeRecord
from mv2v_engine.progress import CancelToken, Spans
from mv2v_engine.tokens.flops import (
    FORWARDS,
    Work,
    conditioning_bytes,
    exact_work,
    flop_table,
    kept_flop_table,
    residual_bytes,
    work_flops,
)
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
    cancel: CancelToken


def turn_report(
    engine: Engine, prepared: Prepared, denoised: Denoised, spans: Spans, *, number: int
) -> dict[str, Any]:
    """Everything about a turn (ARCHITECTURE, contracts)."""
    request, retrieval, plan = prepared.request, prepared.retrieval, prepared.denoiser.plan
    return {
        "turn": number,
        "camera": request.camera.name,
        "notes": camera_notes(request.camera, engine.transformer.config),
        "seed": request.seed,
        "prompt": request.prompt,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "memory": {
            "mode": request.memory,
            "ranking": engine.config.memory_ranking,
            **retrieval.to_dict(),
        },
        **run_report(engine, prepared.denoiser, denoised, retrieval),
        "approximations": approximations(engine, plan),
        "conditioning_is_trained": is_trained(engine, plan),
        **spent(engine, plan, spans),
        **cache_report(engine),
        **engine.describe(),
    }


def run_report(
    engine: Engine,
    denoiser: Denoiser,
    denoised: Denoised,
    retrieval: Retrieval,
    *,
    memory_name: str = "turn",
) -> dict[str, Any]:
    """One denoising run: its plan, what it merged, what it computed and kept.

    memory_name: what made the remembered videos, turns or windows.
    """
    plan, steps = denoiser.plan, [record.step for record in denoised.records]
    names = segment_names(plan, retrieval.turns, memory_name)
    return {
        "plan": plan.describe(),
        "merged_frames": merge_report(plan, denoised.records, names),
        "forwards": denoised.num_forwards,
        "packed_steps": denoiser.packed_steps,
        **turn_flops(plan, steps, denoised.work),
        **kept_bytes(engine, denoiser, steps),
        **({} if denoised.reuse is None else {"reuse": denoised.reuse}),
        "graphs": denoised.graphs,
        **({} if (shared := denoiser.parallel_report()) is None else {"parallel": shared}),
    }


def spent(engine: Engine, plan: TokenPlan, spans: Spans) -> dict[str, Any]:
    """Seconds and bytes by stage.

    `peak_bytes` and `predicted_peak_bytes` are of the same thing, the device's tensors. On a CPU
    nobody can tell them from what else the process holds, so the measured one is left out, and
    what is known of the whole process is called `process_peak_bytes`.
    """
    return {
        "seconds": {name: round(value, 4) for name, value in spans.seconds.items()},
        spans.peak_name: dict(spans.peak_bytes),
        "predicted_peak_bytes": engine.budget.predict(plan).by_span(),
    }


def cache_report(engine: Engine) -> dict[str, Any]:
    """The memory as it is now."""
    return {
        "cache_bytes": engine.cache.bytes_used,
        "cache_bytes_by_tier": engine.cache.bytes_by_tier(),
        # of all the engine's sessions since it was made
        "cache_counters": engine.cache.counters(),
    }


def segment_names(
    plan: TokenPlan, memory_turns: Sequence[int], memory_name: str = "turn"
) -> list[str]:
    """What a report calls each segment: target, source, turn N."""
    turns = iter(memory_turns)
    return [
        f"{memory_name} {next(turns)}" if segment.role == "memory" else segment.role
        for segment in plan.segments
    ]


def turn_flops(
    plan: TokenPlan, steps: Sequence[MergeStep], work: int | Mapping[Work, int]
) -> dict[str, Any]:
    """FLOPs by part of a turn's first forward and of each later exact one, and of the whole turn.

    With static conditioning the later ones run the target alone. `flops_exact` is what the same
    steps take without approximations. steps: the merges that happened. work: what was run, or how
    many forwards of an exact turn.
    """
    if isinstance(work, int):
        work = exact_work(plan, work)
    branches_times_steps = sum(work.get(kind, 0) for kind in (*FORWARDS, "residual"))
    exact = exact_work(plan, branches_times_steps)
    first = flop_table(plan, steps)
    later = kept_flop_table(plan, steps) if plan.conditioning == "static" else first
    totals = [
        sum(count * work_flops(plan, kind, steps) for kind, count in counts.items() if count)
        for counts in (work, exact)
    ]
    return {
        "flops_first_forward": first,
        "flops_per_forward": later,
        "flops": totals[0],
        "flops_exact": totals[1],
        "work": dict(work),
    }


def kept_bytes(engine: Engine, denoiser: Denoiser, steps: Sequence[MergeStep]) -> dict[str, int]:
    """What a turn kept between its steps: conditioning, and what skipped steps add again."""
    element = engine.dtype.itemsize
    kept = {"conditioning_bytes": conditioning_bytes(denoiser.plan, element, steps)}
    if engine.config.step_cache is not None:
        branches = len(denoiser.branches)
        kept["residual_bytes"] = branches * residual_bytes(denoiser.plan, element)
    return kept


def is_trained(engine: Engine, plan: TokenPlan) -> bool:
    """Whether the weights are known to have been trained for the plan's conditioning."""
    return plan.conditioning in engine.checkpoint.conditioning


def approximations(engine: Engine, plan: TokenPlan) -> list[str]:
    """In words, all in which a turn differs from what its weights were made for; mostly nothing."""
    config, found = engine.config, []
    if not is_trained(engine, plan):
        trained = " and ".join(engine.checkpoint.conditioning)
        found.append(f"{plan.conditioning} conditioning on weights trained for {trained}")
    if config.step_cache is not None:
        found.append(f"steps skipped below a change of {config.step_cache:g}")
    return found


def merge_report(
    plan: TokenPlan, records: Sequence[MergeRecord], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Which latent frames each merging block fused, by video: in the last step, or for good.

    names: of the plan's segments.
    """
    table, rows = plan.frame_table, []
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
