"""What one forward of a full-size turn costs as the memory grows: from token plans, no weights.

`python profiling/turn_cost.py [--out profiling/results/turn_cost.json]`

Wan2.1-1.3B shape, 81 frames at 480x832. Uniform: every memory video at 1x2x2; dynamic:
tokenizers by rank; merged: with adaptive merging; static: one step with conditioning K/V kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mv2v_engine.evaluation.cost import forward_costs
from mv2v_engine.files import save_json

MEMORY = (0, 1, 3, 4, 6, 10, 16)


def in_pflop(costs: dict[str, Any]) -> dict[str, Any]:
    """A row of `forward_costs` with its FLOPs in PFLOP."""
    return {
        name.replace("flops_", "pflop_"): value / 1e15 if name.startswith("flops_") else value
        for name, value in costs.items()
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table that the README shows."""
    lines = [
        "| memory videos | tokens, all 1x2x2 | tokens, by rank | PFLOP, all 1x2x2 "
        "| by rank | by rank + merging |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['memory']} | {r['tokens_uniform']:,} | {r['tokens_dynamic']:,} "
        f"| {r['pflop_uniform']:.3f} | {r['pflop_dynamic']:.3f} | {r['pflop_merged']:.3f} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [in_pflop(costs) for costs in forward_costs(MEMORY)]
    print(markdown(rows))
    if args.out:
        save_json(args.out, {"shape": "WAN_1_3B", "frames": 81, "size": [480, 832], "rows": rows})


if __name__ == "__main__":
    main()
