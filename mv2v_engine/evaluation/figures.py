"""Pictures of an evaluation: frames side by side, consistency by turn, cost by memory count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mv2v_engine.errors import RequestError
from mv2v_engine.evaluation.protocol import ROWS
from mv2v_engine.evaluation.scene import SceneResult
from mv2v_engine.files import replacing

CONSISTENCY, COST = "consistency.png", "cost.png"
_LABELS = {
    "source": "the source",
    "truth": "true view",
    "vae": "true view,\nthrough the VAE",
    **{row.name: row.label for row in ROWS},
}
_SHOWN = ("source", "truth", "vae", "independent", "previous", "memory", "memory_merged", "static")
_COSTS = {
    "flops_uniform": "all videos 1x2x2",
    "flops_dynamic": "tokenizers by rank",
    "flops_merged": "by rank + merging",
    "flops_static": "by rank, static",
}
_DPI = 110


def require_matplotlib() -> None:
    """Refuse before the work rather than after it.

    Raises:
        RequestError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise RequestError(
            "the figures of an evaluation need matplotlib; install mv2v_engine[eval]"
        ) from error
    matplotlib.use("Agg")


def save_side_by_side(path: Path, scene: SceneResult) -> None:
    """The last frame of every turn, a row a method; lines bound what the source never shows."""
    from matplotlib import pyplot

    rows = [name for name in _SHOWN if name in scene.frames]
    columns = len(scene.views)
    height, width = scene.frames["truth"]["1"].shape[1:3]
    cell = 2.6
    figure, axes = pyplot.subplots(
        len(rows),
        columns,
        figsize=(cell * columns, cell * len(rows) * height / width + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for name, line in zip(rows, axes, strict=True):
        for (turn, view), axis in zip(scene.views.items(), line, strict=True):
            axis.imshow(scene.frames[name][turn][-1].numpy())
            invented = view.invented[-1].float()
            if name != "source" and 0 < invented.mean() < 1:
                # single pixels of the mask would draw as confetti
                smooth = torch.nn.functional.avg_pool2d(invented[None], 5, stride=1, padding=2)[0]
                # white on black is seen on whatever colour
                for colour, linewidth in (("black", 1.8), ("white", 0.7)):
                    edge = {"colors": colour, "linewidths": linewidth}
                    axis.contour(smooth.numpy(), [0.5], **edge)
            axis.set_xticks([])
            axis.set_yticks([])
            if name == rows[0]:
                which = f"turn {turn}" if turn.isdecimal() else turn
                axis.set_title(f"{which}: {view.camera.name}", fontsize=9)
        line[0].set_ylabel(_LABELS[name].replace(" as ", "\nas "), fontsize=8)
    save_figure(figure, path)


def save_consistency(path: Path, results: dict[str, Any]) -> None:
    """Difference from the turns before, where the source sees nothing, against the turn."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    bounds = {name: results["references"][name] for name in ("truth", "vae")}
    rows = results["rows"] | bounds
    for index, (name, row) in enumerate(rows.items()):
        known = {int(n): v for n, v in row["by_turn"].items() if n.isdecimal()}
        if not known:
            continue
        values = [v["value"] for v in known.values()]
        errors = [
            [max(v["value"] - v["ci"][0], 0) for v in known.values()],
            [max(v["ci"][1] - v["value"], 0) for v in known.values()],
        ]
        # a little apart, so that intervals do not hide each other
        places = [number + 0.03 * (index - len(rows) / 2) for number in known]
        style: dict[str, Any] = {"label": _LABELS[name].replace("\n", " ")}
        if name in bounds:
            style |= {"color": "black" if name == "truth" else "gray", "linestyle": ":"}
        axis.errorbar(places, values, errors, marker="o", capsize=2, **style)
    axis.set_xlabel("turn")
    axis.set_ylabel("L1 to earlier turns, unseen by the source")
    axis.locator_params(axis="x", integer=True)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    save_figure(figure, path)


def save_cost(path: Path, results: dict[str, Any]) -> None:
    """FLOPs of a forward against the number of memory videos, on two plans; seconds as measured."""
    from matplotlib import pyplot

    panels = list(results["cost"].items())
    figure, axes = pyplot.subplots(
        1, len(panels) + 1, figsize=(4.2 * (len(panels) + 1), 3.6), layout="constrained"
    )
    for axis, (title, rows) in zip(axes, panels, strict=False):
        for key, label in _COSTS.items():
            axis.plot([r["memory"] for r in rows], [r[key] for r in rows], marker=".", label=label)
        axis.set_title(title, fontsize=9)
        axis.set_ylabel("FLOPs of a forward")
        axis.set_yscale("log")
    for name, points in results["seconds_by_memory"].items():
        counts = [int(count) for count in points]
        axes[-1].plot(counts, list(points.values()), marker=".", label=_LABELS[name])
    axes[-1].set_title(f"measured on {results['engine']['device']}", fontsize=9)
    axes[-1].set_ylabel("seconds of denoising a turn")
    axes[-1].set_ylim(bottom=0)
    for axis in axes:
        axis.set_xlabel("memory videos")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure and forget it."""
    from matplotlib import pyplot

    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=_DPI)
    pyplot.close(figure)
