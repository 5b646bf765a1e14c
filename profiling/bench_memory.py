"""What a forward costs as the memory grows: seconds, FLOPs and peak bytes, by count of videos.

`python profiling/bench_memory.py [--device cpu] [--out profiling/results/memory.jsonl]`

uniform: every memory video at 1x2x2; dynamic: tokenizers by rank; merged: with adaptive merging;
static: K and V of the conditioning kept, a step after the first and the mean over a turn's steps.
On a CPU `tiny-nvs` on one thread, in seconds of the process; on CUDA the 1.3B shape. Everything
of one count runs turn about with the joint forward of no memory, and ratios are to that one within
a round. The 1.3B shape is also counted by its plans, wherever this runs; plot and table are
`memory_plot.py`'s and `memory_table.py`'s.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from forwards import KINDS, Inputs, Setting, chosen, flops
from measure import (
    Report,
    Timer,
    digits,
    existing_device,
    held_mib,
    peak_bytes,
    provenance,
    reason,
    table,
)
from targets import target

from mv2v_engine.evaluation.cost import forward_costs
from mv2v_engine.tokens.flops import conditioning_bytes

COUNTS = (0, 1, 2, 3, 4, 6, 8, 10, 16)
COLUMNS = "kind memory tokens gflop ms gflop_per_s flop_ratio time_ratio off_percent "
COLUMNS += "turn_flop_ratio turn_time_ratio peak_mib kept_mib held_mib skipped"
Row = dict[str, Any]


def count_full_size(report: Report) -> None:
    """PFLOP and tokens of the 1.3B shape, 81 frames at 480x832, by count of videos."""
    for costs in forward_costs(COUNTS):
        row = {
            name.replace("flops_", "pflop_"): round(value / 1e15, 6) if "flops" in name else value
            for name, value in costs.items()
        }
        report.add(what="counted", shape="1.3B", **row)


def measure_count(
    setting: Setting, memory: int, timer: Timer, report: Report, args: argparse.Namespace
) -> None:
    """All kinds at one count, against the joint forward of no memory."""
    reference = setting.plan("dynamic", 0)
    kinds = [kind for kind in KINDS if kind != "uniform" or memory <= args.most_uniform]
    inputs = {kind: Inputs(setting, setting.plan(kind, memory)) for kind in kinds}
    rivals = [Inputs(setting, reference).first, *(inputs[kind].later for kind in kinds)]
    inputs["static"].first()  # its peak is no later step's
    # their first calls, which also warm up
    _, *peaks = (peak_bytes(run, setting.device) for run in rivals)
    rounds = timer.rounds([*rivals, inputs["static"].first], args.rounds)
    base = flops(reference, later=False)
    for index, (kind, given) in enumerate(inputs.items(), start=1):
        plan = given.plan
        later, first = flops(plan, later=True), flops(plan, later=False)
        ratio = median(times[index] / times[0] for times in rounds)
        seconds = median(times[index] for times in rounds)
        flop_ratio, steps = later / base, args.steps
        # a static turn's first step is a row of its own
        begun = -1 if kind == "static" else index
        turn = median(
            (times[begun] + (steps - 1) * times[index]) / (steps * times[0]) for times in rounds
        )
        kept = conditioning_bytes(plan, setting.transformer.patch_embedding.weight.itemsize)
        report.add(
            what="forward",
            kind=kind,
            memory=memory,
            tokens=plan.length,
            gflop=digits(later / 1e9),
            ms=digits(seconds * 1e3),
            gflop_per_s=digits(later / seconds / 1e9),
            flop_ratio=digits(flop_ratio),
            time_ratio=digits(ratio),
            off_percent=digits(100 * (ratio / flop_ratio - 1)),
            turn_flop_ratio=digits((first + (steps - 1) * later) / (steps * base)),
            turn_time_ratio=digits(turn),
            first_ms=digits(median(times[begun] for times in rounds) * 1e3),
            peak_mib=digits(peaks[index - 1] / 2**20),
            kept_mib=digits(kept / 2**20),
            held_mib=held_mib(setting.device),
        )


def targets(rows: Sequence[Row], *, steps: int) -> list[Row]:
    """Time follows FLOPs within 15 %; ten memory videos kept cost no more than none."""
    timed = [row for row in rows if row.get("what") == "forward"]
    found = []
    for kind in KINDS:
        off = [{"off": abs(row["off_percent"])} for row in timed if row["kind"] == kind]
        name = f"{kind}: time ratio off the FLOP ratio at most, %"
        found.append(target(name, 15, off, "off", pick=max, at_most=True))
    ten = [row for row in timed if (row["kind"], row["memory"]) == ("static", 10)]
    name = f"static turn of {steps} steps, 10 memory videos / joint turn, none"
    found.append(target(name, 1, ten, "turn_time_ratio", at_most=True))
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", choices=("tiny", "full"), help="else full on CUDA alone")
    parser.add_argument("--memory", type=int, nargs="+", default=COUNTS, metavar="COUNT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of the turn whose mean is taken")
    parser.add_argument(
        "--most-uniform",
        type=int,
        default=16,
        metavar="COUNT",
        help="memory videos up to which all at 1x2x2 is run; beyond it is only counted",
    )
    parser.add_argument(
        "--seconds", type=float, default=600, help="when to start no more counts of videos"
    )
    parser.add_argument("--commit", help="of a copy without its git history")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    device = existing_device(args.device)
    torch.set_num_threads(1)
    setting = chosen(device, args.model)
    notes = {"model": setting.name, "steps": args.steps, "rounds": args.rounds, "threads": 1}
    report = Report(args.out, provenance(device, args.commit) | notes)
    count_full_size(report)
    timer = Timer(device, seconds=0.0, clock=time.process_time)
    deadline = time.monotonic() + args.seconds
    for memory in args.memory:
        if time.monotonic() > deadline:
            report.add(what="forward", memory=memory, skipped=f"{args.seconds:g} s were used up")
            continue
        try:
            with torch.no_grad():
                measure_count(setting, memory, timer, report, args)
        # inputs that do not fit the device, say
        except Exception as error:
            report.add(what="forward", memory=memory, skipped=reason(error))
        gc.collect()
    found = targets(report.rows, steps=args.steps)
    print(table([row for row in report.rows if row["what"] == "forward"], COLUMNS))
    for row in found:
        report.add(what="target", **row)
    print(f"\n{table(found, 'target wanted measured met')}")


if __name__ == "__main__":
    main()
