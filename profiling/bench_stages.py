"""Where a turn's time goes, by count of memory videos: the shares of its stages.

`python profiling/bench_stages.py [--device cpu] [--out profiling/results/stages.jsonl]`
`python profiling/bench_stages.py --engine profiling/results/engine.jsonl`

The second reads the turns that `bench_engine.py` has measured. The source is encoded by a
session's first turn alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from bench_engine import turn_arguments, turns
from measure import Report, digits, existing_device, provenance, read_rows, table

STAGES = ("vae encode", "text", "memory", "sampling", "vae decode")
Row = dict[str, Any]


def shares(row: Row) -> Row:
    """A turn's row with the percentage of every stage that it had."""
    whole = sum(row["stages"].values())
    kept = {name: row[name] for name in ("config", "memory", "steps", "guidance_scale")}
    kept["seconds"] = digits(whole)
    percent = {name: digits(100 * value / whole) for name, value in row["stages"].items()}
    return kept | {f"{name.replace(' ', '_')}_percent": percent.get(name) for name in STAGES}


def measured(rows: Iterable[Row]) -> list[Row]:
    return [shares(row) for row in rows if row.get("stages")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    turn_arguments(parser)
    parser.add_argument("--engine", type=Path, help="rows of bench_engine.py, instead of new turns")
    parser.add_argument("--commit", help="of a copy without its git history")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.engine is not None:
        rows = read_rows(args.engine)
        names = ("threads", *provenance(torch.device("cpu")))
        common = {name: rows[0].get(name) for name in names}
    else:
        device = existing_device(args.device)
        torch.set_num_threads(1)
        with torch.no_grad():
            rows = list(turns(device, args))
        common = provenance(device, args.commit) | {"threads": 1}
    report = Report(args.out, common)
    for row in measured(rows):
        report.add(**row)
    columns = [f"{name.replace(' ', '_')}_percent" for name in STAGES]
    print(table(report.rows, " ".join(["config", "memory", "steps", "seconds", *columns])))


if __name__ == "__main__":
    main()
