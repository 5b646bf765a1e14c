"""An edit's report: its windows', what they spent together, and a full-size one's cost by count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mv2v_engine.engine.editing.request import EditRequest
from mv2v_engine.engine.report import (
    approximations,
    cache_report,
    is_trained,
    run_report,
    spent,
    turn_flops,
)
from mv2v_engine.engine.runner import Denoised, Denoiser
from mv2v_engine.memory.retrieval import Retrieval
from mv2v_engine.progress import Spans
from mv2v_engine.sampling.guidance import needs_guidance
from mv2v_engine.tokens.editing import window_plan
from mv2v_engine.video.windows import EditWindow

if TYPE_CHECKING:
    from mv2v_engine.engine.engine import Engine

FULL_SIZE = (480, 832)


def window_report(
    engine: Engine,
    window: EditWindow,
    denoiser: Denoiser,
    denoised: Denoised,
    retrieval: Retrieval,
    spans: Spans,
) -> dict[str, Any]:
    """One window up to its latents; a `turn` of its memory is a window, counted from 1."""
    plan = denoiser.plan
    first = window.new_frames
    return {
        "window": window.number + 1,
        "shot": window.shot + 1,
        "frames": [window.start, window.stop],
        "new_frames": [window.start + first.start, window.start + first.stop],
        "memory": retrieval.to_dict(),
        **run_report(engine, denoiser, denoised, retrieval, memory_name="window"),
        "approximations": approximations(engine, plan),
        "conditioning_is_trained": is_trained(engine, plan),
        **spent(engine, plan, spans),
    }


def edit_report(
    engine: Engine,
    request: EditRequest,
    source: Mapping[str, Any],
    descriptor: Mapping[str, Any],
    windows: Sequence[EditWindow],
    rows: Sequence[Mapping[str, Any]],
    *,
    number: int,
    decoding: Spans,
) -> dict[str, Any]:
    """The whole edit but for its windows' own reports (`rows`).

    decoding: of the windows that this process decoded meanwhile.
    """
    counts = [len(row["memory"]["retrieved"]) for row in rows]
    config, peaks = engine.config, decoding.peak_name
    return {
        "turn": number,
        "prompt": request.prompt,
        "seed": request.seed,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "memory": {
            "mode": request.memory,
            "max_memory": config.max_memory,
            "cross_shot_similarity": config.cross_shot_similarity,
            "descriptor": dict(descriptor),
        },
        "source": dict(source),
        "num_windows": len(windows),
        "window_frames": engine.sampling.num_frames,
        "window_starts": [window.start for window in windows],
        "shots": 1 + max(window.shot for window in windows),
        "flops": sum(row["flops"] for row in rows),
        "flops_exact": sum(row["flops_exact"] for row in rows),
        "full_size": full_size_rows(engine, request, counts),
        "approximations": sorted({words for row in rows for words in row["approximations"]}),
        "conditioning_is_trained": all(row["conditioning_is_trained"] for row in rows),
        "seconds": _summed([*(row["seconds"] for row in rows), decoding.seconds]),
        peaks: _highest([*(row.get(peaks, {}) for row in rows), decoding.peak_bytes]),
        "predicted_peak_bytes": _highest(row["predicted_peak_bytes"] for row in rows),
        **cache_report(engine),
        **engine.describe(),
    }


def full_size_rows(
    engine: Engine, request: EditRequest, counts: Sequence[int]
) -> list[dict[str, Any]]:
    """What a window of the 5B model at 480x832 takes by count, a row a number of memories.

    counts: of each window of the edit.
    """
    config, rows = engine.config, []
    forwards = request.num_inference_steps * (2 if needs_guidance(request.guidance_scale) else 1)
    for count, windows in sorted(Counter(counts).items()):
        plan = window_plan(
            memory=count,
            size=FULL_SIZE,
            merge=engine.merge,
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


def _summed(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            total[name] = round(total.get(name, 0.0) + value, 4)
    return total


def _highest(rows: Iterable[Mapping[str, int]]) -> dict[str, int]:
    highest: dict[str, int] = {}
    for row in rows:
        for name, value in row.items():
            highest[name] = max(value, highest.get(name, 0))
    return highest
