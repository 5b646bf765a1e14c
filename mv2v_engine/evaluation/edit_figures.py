"""Pictures of an evaluation of edits: windows side by side, measures with their intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mv2v_engine.evaluation.edit_clip import ClipResult
from mv2v_engine.evaluation.edit_protocol import EDIT_ROWS
from mv2v_engine.evaluation.figures import save_figure

BARS = "measures.png"
_LABELS = {"source": "source", "truth": "true edit", "vae": "true edit, VAE"} | {
    row.name: row.label for row in EDIT_ROWS
}
_SHOWN = ("source", "truth", "independent", "one_noise", "fifo", "memory", "memory_merged")
_BARS = {
    "subject_error": "subject error between windows",
    "agreement": "agreement with the words",
    "background_psnr": "PSNR outside the edit, dB",
    "seam_ratio": "flicker at seams / beside them",
}


def save_windows(path: Path, result: ClipResult) -> None:
    """The middle of every window's new frames, one row a window, one column a method."""
    from matplotlib import pyplot

    names = [name for name in _SHOWN if name in result.frames]
    height, width = result.clip.camera.size
    cell, count = 1.9, len(result.windows)
    figure, axes = pyplot.subplots(
        count,
        len(names),
        figsize=(cell * len(names), cell * count * height / width + 0.7),
        squeeze=False,
        layout="constrained",
    )
    figure.suptitle(f'"{result.clip.prompt}"', fontsize=10)
    for window, line in zip(result.windows, axes, strict=True):
        for name, axis in zip(names, line, strict=True):
            axis.imshow(result.frames[name][(window.first_new + window.stop) // 2].numpy())
            axis.set_xticks([])
            axis.set_yticks([])
            if window.number == 0:
                axis.set_title(_LABELS[name], fontsize=8)
        line[0].set_ylabel(f"window {window.number + 1}", fontsize=8)
    save_figure(figure, path)


def save_bars(folder: Path, results: dict[str, Any]) -> None:
    """Means with their 95 % intervals, a panel a measure, as `BARS` in a folder."""
    from matplotlib import pyplot

    rows = results["rows"] | results["references"]
    names = [*reversed(rows)]
    figure, axes = pyplot.subplots(
        1, len(_BARS), figsize=(3.4 * len(_BARS), 0.34 * len(rows) + 1), layout="constrained"
    )
    for (measure, title), axis in zip(_BARS.items(), axes, strict=True):
        for place, name in enumerate(names):
            value, interval = rows[name][measure], rows[name][f"{measure}_ci"]
            is_exact = measure == "background_psnr" and name in ("source", "truth")
            if value is None or is_exact:
                continue
            around = [[max(value - interval[0], 0)], [max(interval[1] - value, 0)]]
            colour = "#9a9a9a" if name in results["references"] else "#3b6ea5"
            axis.barh(place, value, xerr=around, color=colour, capsize=2, height=0.7)
        axis.set_yticks(range(len(names)))
        axis.set_yticklabels([_LABELS[name] for name in names] if axis is axes[0] else [])
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.3)
    save_figure(figure, folder / BARS)
