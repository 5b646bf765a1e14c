"""The plot of what memory costs, from the rows of `bench_memory.py`.

`python profiling/memory_plot.py [profiling/results/memory.jsonl] [--out docs/cost_of_memory.svg]`

Left: PFLOP of one forward of the 1.3B shape, by count. Right: seconds and FLOPs of a forward of
the measured model, relative to its joint forward without memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import ROOT, read_rows

LABELS = {
    "uniform": "every video at 1x2x2",
    "dynamic": "tokenizers by rank",
    "merged": "by rank, merging",
    "static": "by rank, static: a step after the first",
}
COLORS = {"uniform": "#888888", "dynamic": "#1f77b4", "merged": "#2ca02c", "static": "#d62728"}
Row = dict[str, Any]


def draw(rows: Sequence[Row], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counted = [row for row in rows if row["what"] == "counted"]
    timed = [row for row in rows if row["what"] == "forward" and "ms" in row]
    settings: Any = {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "cost of memory"}
    with pyplot.rc_context(settings):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
        for kind, label in LABELS.items():
            memory = [row["memory"] for row in counted]
            color = COLORS[kind]
            left.plot(memory, [row[f"pflop_{kind}"] for row in counted], "o-", color=color, ms=3)
            own = [row for row in timed if row["kind"] == kind]
            memory = [row["memory"] for row in own]
            right.plot(memory, [row["flop_ratio"] for row in own], "-", color=color, label=label)
            right.plot(memory, [row["time_ratio"] for row in own], "o", color=color, ms=4)
        left.set_title("1.3B shape, 81 frames at 480x832, by count")
        left.set_ylabel("PFLOP of one forward")
        model, device = (timed[0][name] for name in ("model", "device")) if timed else ("", "")
        right.set_title(f"{model} on {device}: lines FLOPs, points seconds")
        right.set_ylabel("of a joint forward without memory")
        figure.legend(frameon=False, loc="outside lower center", ncols=4)
        for axes in (left, right):
            axes.set_yscale("log")
            axes.set_xlabel("memory videos")
            axes.grid(alpha=0.3)
        out.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if out.suffix == ".svg" else None
        figure.savefig(out, metadata=metadata)
        pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    results = ROOT / "profiling" / "results" / "memory.jsonl"
    parser.add_argument("rows", type=Path, nargs="?", default=results)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "cost_of_memory.svg")
    args = parser.parse_args()
    draw(read_rows(args.rows), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
