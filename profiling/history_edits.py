"""Long edits with a history, by what encodes it, against today's memory on the same clips.

`python profiling/history_edits.py --models both=FOLDER kernel=FOLDER ... --work runs/history_edits
[--clips 16] [--out profiling/results/history_edits.json]`

A folder is what `training.history --stage 2` writes. Clips, measures and rows are those of
`run evaluate --task edit`: without memory, all windows in patches by rank, and two of them, of
`tiny-edit`; of each model all windows in one history, and that with its last latent frame whole.
Ratios to the first memory are bootstraps over clips, of one training each. A run that was cut off
goes on where it stood; several may share a folder, each with models of its own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from measure import provenance
from memory_models import as_json, begin

from mv2v_engine import Engine
from mv2v_engine.evaluation import bootstrap
from mv2v_engine.evaluation.edit_clip import ClipEvaluator
from mv2v_engine.evaluation.edit_protocol import EditProtocol
from mv2v_engine.files import make_folder, save_json

BASE, MEMORY = "tiny-edit", "memory"
ROWS = {BASE: ("independent", MEMORY, "recent_2")}
HISTORIES = ("history", "history_1")
MEASURES = ("subject_error", "agreement", "background_error", "psnr", "seam_ratio", "flops")
RATIOS = ("subject_error", "background_error")
Values = dict[str, list[float | None]]


def measured(name: str, checkpoint: str, args: argparse.Namespace) -> dict[str, Values]:
    """Values of every clip by row and measure; kept clip by clip in the working folder."""
    rows = ROWS.get(name, HISTORIES)
    protocol = EditProtocol(clips=args.clips, grade=args.grade, windows=5, rows=rows)
    folder = args.work / name
    make_folder(folder)
    evaluator = None
    values: dict[str, Values] = {row: {} for row in rows}
    for seed in protocol.seeds:
        path = folder / f"clip_{seed}.json"
        if not path.exists():
            evaluator = evaluator or ClipEvaluator(
                Engine.from_pretrained(checkpoint, device="cpu"), protocol
            )
            save_json(path, evaluator.measure(seed).measures)
            print(name, seed, flush=True)
        found = json.loads(path.read_text(encoding="utf-8"))["rows"]
        for row in rows:
            for measure in MEASURES:
                values[row].setdefault(measure, []).append(found[row][measure])
    return values


def row_of(own: Values, base: Values) -> dict[str, Any]:
    """Means, and ratios to the base's."""
    row: dict[str, Any] = {name: as_json(bootstrap.mean(own[name])) for name in MEASURES}
    if own is not base:
        row |= {f"{n}_ratio": as_json(bootstrap.ratio(own[n], base[n])) for n in RATIOS}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--grade", default="textured")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    models = {BASE: BASE} | dict(model.split("=", 1) for model in args.models)
    settings = {"clips": args.clips, "grade": args.grade}
    begin(args.work, settings)
    found = {name: measured(name, folder, args) for name, folder in models.items()}
    base = found[BASE][MEMORY]
    rows = {
        name: {row: row_of(values, base) for row, values in own.items()}
        for name, own in found.items()
    }
    print(json.dumps(rows, indent=1))
    if args.out is not None:
        record = {
            "command": "python profiling/history_edits.py --models NAME=FOLDER ... "
            f"--clips {args.clips} --grade {args.grade}",
            **settings,
            "base": BASE,
            "rows": rows,
            **provenance(torch.device("cpu")),
        }
        save_json(args.out, record)


if __name__ == "__main__":
    main()
