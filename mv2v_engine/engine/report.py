"""The report of a turn or a window: what was asked, remembered, merged and spent, as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mv2v_engine.config import APPROXIMATE_ATTENTION, FEW_STEPS
from mv2v_engine.engine.budget import Budget
from mv2v_engine.engine.denoise import Denoised, Denoiser
from mv2v_engine.engine.parts import Parts
from mv2v_engine.engine.request import Request, camera_notes
from mv2v_engine.memory.retrieval import Retrieval
from mv2v_engine.models.merging import MergeRecord
from mv2v_engine.progress import Spans
from mv2v_engine.sampling.guidance import needs_guidance
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
from mv2v_engine.tokens.plan import TokenPlan, window_plan
from mv2v_engine.video.windows import EditWindow

FULL_SIZE = (480, 832)


def view_report(
    parts: Parts,
    request: Request,
    denoiser: Denoiser,
    denoised: Denoised,
    retrieval: Retrieval,
    spans: Spans,
    *,
    number: int,
) -> dict[str, Any]:
    """The report of a novel view."""
    assert request.camera is not None
    return {
        "turn": number,
        "camera": request.camera.name,
        "notes": camera_notes(request.camera, parts.transformer.config),
        **_asked(request),
        "memory": {
            "mode": request.memory,
            "ranking": parts.config.memory_ranking,
            **retrieval.to_dict(),
        },
        **_run(parts, denoiser, denoised, retrieval, spans, "turn"),
        **_cache(parts),
        **parts.describe(),
    }


def window_report(
    parts: Parts,
    window: EditWindow,
    denoiser: Denoiser,
    denoised: Denoised,
    retrieval: Retrieval,
    spans: Spans,
) -> dict[str, Any]:
    """The report of an edit's window, up to its latents.

    A `turn` of its memory is a window, counted from 1.
    """
    first = window.new_frames
    return {
        "window": window.number + 1,
        "shot": window.shot + 1,
        "frames": [window.start, window.stop],
        "new_frames": [window.start + first.start, window.start + first.stop],
        "memory": retrieval.to_dict(),
        **_run(parts, denoiser, denoised, retrieval, spans, "window"),
    }


def edit_report(
    parts: Parts,
    request: Request,
    source: Mapping[str, Any],
    windows: Sequence[EditWindow],
    rows: Sequence[Mapping[str, Any]],
    *,
    number: int,
    decoding: Spans,
) -> dict[str, Any]:
    """The report of a whole edit but for its windows' own reports (`rows`).

    decoding: the windows that this process has decoded meanwhile.
    """
    counts = [len(row["memory"]["retrieved"]) for row in rows]
    config, peaks = parts.config, decoding.peak_name
    return {
        "turn": number,
        **_asked(request),
        "memory": {
            "mode": request.memory,
            "max_memory": config.max_memory,
            "cross_shot_similarity": config.cross_shot_similarity,
            "descriptor": parts.describer.describe(),
        },
        "source": dict(source),
        "num_windows": len(windows),
        "window_frames": parts.sampling.num_frames,
        "window_starts": [window.start for window in windows],
        "shots": 1 + max(window.shot for window in windows),
        "flops": sum(row["flops"] for row in rows),
        "flops_exact": sum(row["flops_exact"] for row in rows),
        "full_size": full_size_rows(parts, request, counts),
        "approximations": sorted({words for row in rows for words in row["approximations"]}),
        "conditioning_is_trained": all(row["conditioning_is_trained"] for row in rows),
        "seconds": _by_name([*(row["seconds"] for row in rows), decoding.seconds], _added),
        peaks: _by_name([*(row.get(peaks, {}) for row in rows), decoding.peak_bytes], max),
        "predicted_peak_bytes": _by_name((row["predicted_peak_bytes"] for row in rows), max),
        **_cache(parts),
        **parts.describe(),
    }


def _asked(request: Request) -> dict[str, Any]:
    return {
        "seed": request.seed,
        "prompt": request.prompt,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
    }


def _run(
    parts: Parts,
    denoiser: Denoiser,
    denoised: Denoised,
    retrieval: Retrieval,
    spans: Spans,
    memory_name: str,
) -> dict[str, Any]:
    """One denoising run: its plan, what it merged, what it computed, kept and spent.

    memory_name: what made the remembered videos, turns or windows.

    `peak_bytes` and `predicted_peak_bytes` are of the same thing, the device's tensors. On a CPU
    nobody can tell them from what else the process holds, so the measured one is left out, and
    what is known of the whole process is called `process_peak_bytes`.
    """
    plan, steps = denoiser.plan, [record.step for record in denoised.records]
    names = segment_names(plan, retrieval.turns, memory_name)
    return {
        "plan": plan.describe(),
        "merged_frames": merge_report(plan, denoised.records, names),
        "forwards": denoised.num_forwards,
        "packed_steps": denoiser.packed_steps,
        **turn_flops(plan, steps, denoised.work, denoised.lesser),
        **_kept_bytes(parts, denoiser, steps),
        **({} if denoised.reuse is None else {"reuse": denoised.reuse}),
        "graphs": denoised.graphs,
        **({} if (shared := denoiser.parallel_report()) is None else {"parallel": shared}),
        "approximations": _approximations(parts, plan),
        "conditioning_is_trained": plan.conditioning in parts.checkpoint.conditioning,
        "seconds": {name: round(value, 4) for name, value in spans.seconds.items()},
        spans.peak_name: dict(spans.peak_bytes),
        "predicted_peak_bytes": Budget(parts).predict(plan).by_span(),
    }


def full_size_rows(parts: Parts, request: Request, counts: Sequence[int]) -> list[dict[str, Any]]:
    """What a window of the 5B model at 480x832 takes by count, a row a number of memories.

    counts: the number of memories of each window of the edit.
    """
    config, rows = parts.config, []
    forwards = request.num_inference_steps * (2 if needs_guidance(request.guidance_scale) else 1)
    for count, windows in sorted(Counter(counts).items()):
        plan = window_plan(
            memory=count,
            size=FULL_SIZE,
            merge=parts.merge,
            fraction=config.merge_fraction,
            conditioning=config.conditioning,
            tokenizers=config.memory_tokenizers,
        )
        flops = turn_flops(plan, plan.merge_steps, forwards)
        rows.append(
            {
                "memory": count,
                "windows": windows,
                "frames": 81,
                "size": list(FULL_SIZE),
                "tokens": plan.length,
                "tokens_by_kind": plan.lengths_by_kind,
                "flops_per_forward": sum(flops["flops_per_forward"].values()),
                "forwards": forwards,
                "flops": flops["flops"],
            }
        )
    return rows


def _by_name(
    rows: Iterable[Mapping[str, Any]], together: Callable[[Any, Any], Any]
) -> dict[str, Any]:
    """The values of all rows under each name, taken together one after the other, from 0 on."""
    found: dict[str, Any] = {}
    for row in rows:
        for name, value in row.items():
            found[name] = together(found.get(name, 0), value)
    return found


def _added(total: float, seconds: float) -> float:
    return round(total + seconds, 4)


def _cache(parts: Parts) -> dict[str, Any]:
    """The memory as it is now."""
    return {
        "cache_bytes": parts.cache.bytes_used,
        "cache_bytes_by_tier": parts.cache.bytes_by_tier(),
        # counted over all the engine's sessions since it was made
        "cache_counters": parts.cache.counters(),
    }


def segment_names(
    plan: TokenPlan, memory_turns: Sequence[int], memory_name: str = "turn"
) -> list[str]:
    """What a report calls each segment: target, source, turn N, or the history of all of them."""
    turns = iter(memory_turns)
    if any(segment.encoder == "history" for segment in plan.segments):
        return ["history" if s.role == "memory" else s.role for s in plan.segments]
    return [
        f"{memory_name} {next(turns)}" if segment.role == "memory" else segment.role
        for segment in plan.segments
    ]


def turn_flops(
    plan: TokenPlan,
    steps: Sequence[MergeStep],
    work: int | Mapping[Work, int],
    lesser: Sequence[tuple[TokenPlan, Mapping[Work, int]]] = (),
) -> dict[str, Any]:
    """FLOPs by part of a turn's first forward and of each later exact one, and of the whole turn.

    With static conditioning the later ones run the target alone. `flops_exact` is what the same
    steps take without approximations. steps: the merges that happened. work: what was run, or how
    many forwards of an exact turn. lesser: what was run of plans with less conditioning, by plan,
    which the totals hold, too.
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
    rows: list[dict[str, Any]] = [
        {
            "tokens": each.length,
            "flops": sum(count * work_flops(each, kind) for kind, count in run.items() if count),
            "flops_exact": sum(run.values()) * work_flops(each, "whole"),
            "work": dict(run),
        }
        for each, run in lesser
    ]
    return {
        "flops_first_forward": first,
        "flops_per_forward": later,
        "flops": totals[0] + sum(row["flops"] for row in rows),
        "flops_exact": totals[1] + sum(row["flops_exact"] for row in rows),
        "work": dict(work),
        **({"lesser": rows} if rows else {}),
    }


def _kept_bytes(parts: Parts, denoiser: Denoiser, steps: Sequence[MergeStep]) -> dict[str, int]:
    """What a turn kept between its steps: conditioning, and what skipped steps add again."""
    element = parts.dtype.itemsize
    kept = {"conditioning_bytes": conditioning_bytes(denoiser.plan, element, steps)}
    if parts.config.step_cache is not None:
        branches = len(denoiser.branches)
        kept["residual_bytes"] = branches * residual_bytes(denoiser.plan, element)
    return kept


def _approximations(parts: Parts, plan: TokenPlan) -> list[str]:
    """Where a turn differs from what its weights were made for, in words; mostly nothing."""
    config, found = parts.config, list[str]()
    if plan.conditioning not in parts.checkpoint.conditioning:
        trained = " and ".join(parts.checkpoint.conditioning)
        found.append(f"{plan.conditioning} conditioning on weights trained for {trained}")
    if config.quantize is not None:
        found.append(f"the blocks' weights rounded to {config.quantize}")
    if config.quantize_text is not None:
        found.append(f"the text encoder's weights rounded to {config.quantize_text}")
    if config.attention in APPROXIMATE_ATTENTION:
        found.append(f"self-attention over {APPROXIMATE_ATTENTION[config.attention]}")
    if config.step_cache is not None:
        found.append(f"steps skipped below a change of {config.step_cache:g}")
    is_few = parts.scheduler in FEW_STEPS and parts.checkpoint.sampling.scheduler not in FEW_STEPS
    if is_few and not parts.checkpoint.report.loras:
        found.append(
            f"{parts.scheduler}'s steps on weights that, by all that is known, are not its"
        )
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
