"""Novel views measured on worlds of known geometry, scene by scene, into a folder.

results.json  table.md  side_by_side.png  consistency.png  cost.png
scenes/scene_2000000.json ...     one file a finished scene, what an evaluation resumes from
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from mv2v_engine.config import WAN_1_3B
from mv2v_engine.engine.engine import Engine
from mv2v_engine.errors import CheckpointError
from mv2v_engine.evaluation import figures
from mv2v_engine.evaluation.cost import forward_costs
from mv2v_engine.evaluation.folder import EvaluationFolder, EvaluationKind, measure_missing
from mv2v_engine.evaluation.parallel import Processes
from mv2v_engine.evaluation.perceptual import load_perceptual_distance
from mv2v_engine.evaluation.protocol import SIDE_BY_SIDE, Protocol
from mv2v_engine.evaluation.report import markdown, summarise
from mv2v_engine.evaluation.scene import SceneEvaluator

VIEWS = EvaluationKind(
    format="mv2v-evaluation",
    version=2,
    item="scene",
    pictures=(SIDE_BY_SIDE, figures.CONSISTENCY, figures.COST),
    evaluator=SceneEvaluator,
    draw=figures.save_side_by_side,
)
_MEMORY_COUNTS = range(0, 11)


def evaluate(
    engine: Engine,
    protocol: Protocol,
    folder: EvaluationFolder,
    *,
    processes: Processes | None = None,
    is_quiet: bool = False,
) -> dict[str, Any]:
    """Measure what is missing of a protocol's scenes, and write the result.

    Args:
        processes: measure in several at once, with engines like this one.

    Returns:
        what `results.json` holds.

    Raises:
        CheckpointError: a model without cameras has no views to evaluate.
        StorageError: the folder holds something else, or cannot be written.
        MemoryBudgetError: one of the processes was killed.
    """
    shape = engine.transformer.config
    if not shape.has_camera:
        raise CheckpointError(
            f"{engine.checkpoint.name} takes no camera; this evaluates novel views of several turns"
        )
    figures.require_matplotlib()
    measured = measure_missing(
        engine,
        folder,
        protocol,
        processes=processes,
        is_quiet=is_quiet,
        # scenes with and without it make no mean
        st_lpips=load_perceptual_distance() is not None,
    )
    costs = _costs(engine)
    results = measured.results(
        **summarise(measured.items, protocol),
        cost=costs,
        merging_saves={plan: _merging_saves(rows) for plan, rows in costs.items()},
        seconds_by_memory=_seconds_by_memory(measured.items),
    )
    folder.publish(results, markdown(results))
    figures.save_consistency(folder.folder / figures.CONSISTENCY, results)
    figures.save_cost(folder.folder / figures.COST, results)
    return results


def _costs(engine: Engine) -> dict[str, list[dict[str, Any]]]:
    """FLOPs by number of memory videos: on this checkpoint's plan and on the full-size one."""
    sampling = engine.sampling
    own = forward_costs(
        _MEMORY_COUNTS,
        shape=engine.transformer.config,
        frames=sampling.num_frames,
        size=sampling.size,
        spatial_stride=engine.vae.spatial_stride,
    )
    full = forward_costs(_MEMORY_COUNTS, shape=WAN_1_3B)
    height, width = sampling.size
    name = f"{engine.checkpoint.name}: {sampling.num_frames} frames of {width}x{height}"
    return {name: own, "Wan2.1-1.3B: 81 frames of 832x480": full}


def _merging_saves(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Share of a forward's FLOPs that merging saves, by number of memory videos."""
    return {
        str(row["memory"]): round(1 - row["flops_merged"] / row["flops_dynamic"], 4) for row in rows
    }


def _seconds_by_memory(scenes: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median seconds of denoising by row and number of memory videos."""
    table: dict[str, dict[str, float]] = {}
    for name in scenes[0]["rows"]:
        found: dict[int, list[float]] = {}
        for scene in scenes:
            for turn in scene["rows"][name]["turns"]:
                found.setdefault(turn["memory"], []).append(turn["seconds"])
        table[name] = {str(n): round(median(v), 4) for n, v in sorted(found.items())}
    return table
