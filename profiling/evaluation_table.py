"""An evaluation as the table of README and guides: `python profiling/evaluation_table.py FILE`.

The file is what `python -m mv2v_engine.run evaluate` writes; its `table.md` says more.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mv2v_engine.evaluation.edit_protocol import EDIT_ROWS
from mv2v_engine.evaluation.protocol import ROWS


@dataclass(frozen=True)
class Table:
    """measures: a title, a measure and its digits; one that a file lacks is left out. costs: a
    title, a number and what it counts in. labels: of rows and references.
    """

    measures: tuple[tuple[str, str, int], ...]
    costs: tuple[tuple[str, str, float, int], ...]
    labels: dict[str, str]


VIEWS = Table(
    (
        ("consistency where the source sees nothing (L1, lower is better)", "consistency", 3),
        ("PSNR where it sees, dB", "source_psnr", 2),
        ("gradient energy, of the true views' through the VAE", "sharpness", 2),
        ("ST-LPIPS", "st_lpips", 3),
        ("camera error, pixels", "camera_error", 2),
    ),
    (("tokens", "tokens", 1, 0), ("GFLOP a turn", "flops", 1e9, 1)),
    {
        **{row.name: row.label for row in ROWS},
        "truth": "*the true views*",
        "vae": "*the true views through the VAE*",
        "source": "*the source's own frames*",
    },
)
EDITS = Table(
    (
        ("edited thing, window against window (L1, lower is better)", "subject_error", 3),
        ("shows what was asked, share", "agreement", 2),
        ("PSNR outside the edit, dB", "background_psnr", 2),
        ("flicker at seams / beside them", "seam_ratio", 2),
    ),
    (("GFLOP a clip", "flops", 1e9, 1),),
    {
        **{row.name: row.label for row in EDIT_ROWS},
        "truth": "*the true edit*",
        "vae": "*the true edit through the VAE*",
        "source": "*the source itself*",
    },
)
TABLES = {"mv2v-evaluation": VIEWS, "mv2v-edit-evaluation": EDITS}


def markdown(results: dict[str, Any], rows: Sequence[str] | None = None) -> str:
    """Means with 95 % intervals, one row a method, then the references.

    rows: the methods that are shown; None shows all.
    """
    table = TABLES[results["format"]]
    some = next(iter(results["rows"].values()))
    measures = [column for column in table.measures if column[1] in some]
    titles = [str(title) for title, *_ in (*measures, *table.costs)]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    shown = {n: row for n, row in results["rows"].items() if rows is None or n in rows}
    for name, row in {**shown, **results["references"]}.items():
        cells = [_interval(row, measure, digits) for _, measure, digits in measures]
        cells += [
            f"{row[cost] / unit:.{digits}f}" if cost in row else ""
            for _, cost, unit, digits in table.costs
        ]
        lines.append(f"| {table.labels[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(row: dict[str, Any], name: str, digits: int) -> str:
    if row[name] is None:
        return "-"
    low, high = row[f"{name}_ci"]
    return f"{row[name]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
