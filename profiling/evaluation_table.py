"""The README's table of an evaluation: `python profiling/evaluation_table.py results.json`.

The file is what `python -m mv2v_engine.run evaluate` writes; its `table.md` says more.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mv2v_engine.evaluation.protocol import ROWS

LABELS = {
    **{row.name: row.label for row in ROWS},
    "truth": "*the true views*",
    "vae": "*the true views through the VAE*",
    "source": "*the source's own frames*",
}


def markdown(results: dict[str, Any]) -> str:
    """Means with 95 % intervals, one row a method, then the references."""
    lines = [
        "| | consistency where the source sees nothing (L1, lower is better) "
        "| PSNR where it sees, dB | camera error, pixels | tokens | GFLOP a turn |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in {**results["rows"], **results["references"]}.items():
        cells = [_interval(row, "consistency", 3), _interval(row, "source_psnr", 2)]
        cells.append(_interval(row, "camera_error", 2))
        cells += (
            [f"{row['tokens']:.0f}", f"{row['flops'] / 1e9:.1f}"] if "tokens" in row else ["", ""]
        )
        lines.append(f"| {LABELS[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(row: dict[str, Any], name: str, digits: int) -> str:
    low, high = row[f"{name}_ci"]
    return f"{row[name]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
