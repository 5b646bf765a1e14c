"""What is measured of the two tasks, on worlds of known geometry.

Of novel views, scene by scene:

results.json  table.md  side_by_side.png  consistency.png  cost.png
scenes/scene_2000000.json ...     one file a finished scene, what an evaluation resumes from

Of long edits, clip by clip:

results.json  table.md  windows_colour.png ... (a clip of every kind)  measures.png
clips/clip_3000000.json ...
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from mv2v_engine.config import WAN_1_3B
from mv2v_engine.engine.engine import Engine
from mv2v_engine.evaluation import edit_figures, figures
from mv2v_engine.evaluation.cost import forward_costs
from mv2v_engine.evaluation.edit_clip import ClipEvaluator
from mv2v_engine.evaluation.edit_protocol import QUICK_EDITS, EditProtocol, picture_of
from mv2v_engine.evaluation.edit_report import edits_markdown, summarise_edits
from mv2v_engine.evaluation.folder import EvaluationKind
from mv2v_engine.evaluation.parallel import Measures
from mv2v_engine.evaluation.perceptual import load_perceptual_distance
from mv2v_engine.evaluation.protocol import QUICK, SIDE_BY_SIDE, Protocol
from mv2v_engine.evaluation.report import markdown, summarise
from mv2v_engine.evaluation.scene import SceneEvaluator
from mv2v_engine.synthetic.instructions import KINDS

_MEMORY_COUNTS = range(0, 11)


# a kind goes to other processes, which find its functions by their names


def _agreed_of_views() -> dict[str, Any]:
    """Scenes with and without it make no mean."""
    return {"st_lpips": load_perceptual_distance() is not None}


def _sum_up_edits(_: Engine, clips: Sequence[Measures], protocol: EditProtocol) -> dict[str, Any]:
    return summarise_edits(clips, protocol)


def _sum_up_views(engine: Engine, scenes: Sequence[Measures], protocol: Protocol) -> dict[str, Any]:
    costs = _costs(engine)
    return {
        **summarise(scenes, protocol),
        "cost": costs,
        "merging_saves": {plan: _merging_saves(rows) for plan, rows in costs.items()},
        "seconds_by_memory": _seconds_by_memory(scenes),
    }


def _plot_views(folder: Path, results: dict[str, Any]) -> None:
    figures.save_consistency(folder / figures.CONSISTENCY, results)
    figures.save_cost(folder / figures.COST, results)


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


VIEWS = EvaluationKind(
    format="mv2v-evaluation",
    version=2,
    item="scene",
    protocol=Protocol(),
    quick=QUICK,
    pictures=(SIDE_BY_SIDE, figures.CONSISTENCY, figures.COST),
    evaluator=SceneEvaluator,
    draw=figures.save_side_by_side,
    agreed=_agreed_of_views,
    sum_up=_sum_up_views,
    table=markdown,
    plot=_plot_views,
)
EDITS = EvaluationKind(
    format="mv2v-edit-evaluation",
    version=1,
    item="clip",
    protocol=EditProtocol(),
    quick=QUICK_EDITS,
    pictures=(*(picture_of(kind) for kind in KINDS), edit_figures.BARS),
    evaluator=ClipEvaluator,
    draw=edit_figures.save_windows,
    sum_up=_sum_up_edits,
    table=edits_markdown,
    plot=edit_figures.save_bars,
)
