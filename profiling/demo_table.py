"""The README's table of a demo run: `python profiling/demo_table.py profiling/results/demo.json`.

The file is the `report.json` that `make demo` leaves in demo/out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def markdown(report: dict[str, Any]) -> str:
    """One row a turn."""
    lines = [
        "| turn | camera | remembered (score) | tokens target + source + memory | merged frames "
        "| GFLOP a forward | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for turn in report["turns"]:
        tokens = turn["plan"]["tokens_by_kind"]
        remembered = ", ".join(
            f"turn {row['turn']} ({row['score']:.2f})" for row in turn["memory"]["retrieved"]
        )
        merged = [
            sum(len(frames) for frames in merge["frames"].values())
            for merge in turn["merged_frames"]
        ]
        per_forward = sum(turn["flops_per_forward"].values()) / 1e9
        lines.append(
            f"| {turn['turn']} | `{turn['camera']}` | {remembered or 'nothing yet'} "
            f"| {tokens['target']} + {tokens['source']} + {tokens['memory']} "
            f"| {' + '.join(map(str, merged))} | {per_forward:.1f} "
            f"| {sum(turn['seconds'].values()):.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
