"""How near whole forwards come to the floor: achieved FLOP/s of attention, products and the rest.

`python profiling/roofline.py [--device cpu] [--out profiling/results/roofline.jsonl]`

The floor is what a plan's FLOPs take at the device's rates and nothing else. On CUDA, the 1.3B
shape, there are two: the rates that the targets name (attention 650, products 790 TFLOP/s) and
this device's own matrix rate, measured in the same run. On a CPU, `tiny-nvs` on one thread, the
measured rate alone. Where the time goes is read off torch's profiler in one more forward.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from forwards import Inputs, Setting, attention_flops, chosen, flops
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

from mv2v_engine.config import WAN_1_3B
from mv2v_engine.tokens.plan import TokenPlan, turn_plan

# FLOP/s of an H200 in bfloat16, which the targets reckon with
ATTENTION_RATE, PRODUCT_RATE = 650e12, 790e12
# a forward's name, and the seconds that it may take on an H200
SECONDS = {"target only": 0.53, "3 memory videos, merged": 2.4, "10 memory videos, static": 1.2}
PERCENT = 80
ATTENTION_WORDS = ("attention", "flash", "fmha", "sdpa")
PRODUCT_WORDS = ("addmm", "gemm", "linear", "nvjet", "cutlass", "aten::mm", "bmm", "conv")
COLUMNS = "forward tokens tflop ms tflop_per_s floor_ms percent_of_floor own_floor_ms "
COLUMNS += "percent_of_own_floor peak_mib held_mib skipped"
PARTS = "forward part tflop ms percent_of_forward tflop_per_s"
Row = dict[str, Any]


def cases(setting: Setting) -> dict[str, TokenPlan]:
    """The forwards that the targets name."""
    target_only = turn_plan(
        setting.transformer.config, setting.plan("dynamic", 0).target.grid, (), source=False
    )
    return {
        "target only": target_only,
        "3 memory videos, merged": setting.plan("merged", 3),
        "10 memory videos, static": setting.plan("static", 10),
    }


def measured_rate(timer: Timer, device: torch.device) -> float:
    """FLOP/s of a product of square matrices, in the dtype of the forwards."""
    is_cuda = device.type == "cuda"
    side, dtype = (8192, torch.bfloat16) if is_cuda else (1024, torch.float32)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype).unbind()
    return 2 * side**3 / timer(lambda: a @ b).median


def part_of(name: str) -> str:
    """Attention, product or the rest: by the name of an operation on a CPU, a kernel on CUDA."""
    lowered = name.lower()
    if any(word in lowered for word in ATTENTION_WORDS):
        return "attention"
    return "product" if any(word in lowered for word in PRODUCT_WORDS) else "rest"


def parts(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Seconds of one call by part."""
    is_cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CUDA if is_cuda else activity.CPU]
    for _ in range(2):  # the first one also sets up the profiler
        with torch.profiler.profile(activities=activities) as profile:
            run()
            if is_cuda:
                torch.cuda.synchronize(device)
    seconds = dict.fromkeys(("attention", "product", "rest"), 0.0)
    for event in profile.key_averages():
        spent = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        seconds[part_of(event.key)] += spent / 1e6
    return seconds


def measure_case(
    setting: Setting, name: str, plan: TokenPlan, timer: Timer, rate: float, report: Report
) -> None:
    given = Inputs(setting, plan)
    timing = timer(given.later)
    total, attending = flops(plan, later=True), attention_flops(plan, later=True)
    row: Row = {
        "what": "forward",
        "forward": name,
        "tokens": plan.length,
        "tflop": digits(total / 1e12),
        "ms": digits(timing.median * 1e3),
        "ms_low": digits(timing.low * 1e3),
        "ms_high": digits(timing.high * 1e3),
        "tflop_per_s": digits(total / timing.median / 1e12),
    }
    own_floor = total / rate
    row |= {"own_floor_ms": digits(own_floor * 1e3)}
    row |= {"percent_of_own_floor": digits(100 * own_floor / timing.median)}
    if setting.device.type == "cuda" and plan.shape == WAN_1_3B:
        floor = attending / ATTENTION_RATE + (total - attending) / PRODUCT_RATE
        row |= {"floor_ms": digits(floor * 1e3)}
        row |= {"percent_of_floor": digits(100 * floor / timing.median)}
    peak = digits(peak_bytes(given.later, setting.device) / 2**20)
    report.add(**row, peak_mib=peak, held_mib=held_mib(setting.device))
    flops_of = {"attention": attending, "product": total - attending}
    spent = parts(given.later, setting.device)
    whole = sum(spent.values())
    for part, seconds in spent.items():
        count = flops_of.get(part)
        report.add(
            what="part",
            forward=name,
            part=part,
            tflop=digits(count / 1e12) if count else None,
            ms=digits(seconds * 1e3),
            percent_of_forward=digits(100 * seconds / whole),
            tflop_per_s=digits(count / seconds / 1e12) if count and seconds else None,
        )


def targets(rows: Sequence[Row]) -> list[Row]:
    """Seconds and shares of the floor on an H200; without one, nothing was measured."""
    found = []
    for name, seconds in SECONDS.items():
        timed = [
            {"seconds": row["ms"] / 1e3, "share": row["percent_of_floor"]}
            for row in rows
            if row.get("forward") == name and row.get("floor_ms")
        ]
        found.append(target(f"{name}: seconds on an H200", seconds, timed, "seconds", at_most=True))
        found.append(target(f"{name}: % of the floor on an H200", PERCENT, timed, "share"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", choices=("tiny", "full"), help="else full on CUDA alone")
    parser.add_argument("--seconds", type=float, help="of one measurement, about")
    parser.add_argument("--commit", help="of a copy without its git history")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = existing_device(args.device)
    torch.set_num_threads(1)
    seconds = args.seconds if args.seconds is not None else (5.0 if device.type == "cuda" else 2.0)
    timer = Timer(device, seconds=seconds, clock=time.process_time)
    setting = chosen(device, args.model)
    notes = {"model": setting.name, "threads": 1}
    report = Report(args.out, provenance(device, args.commit) | notes)
    with torch.no_grad():
        rate = measured_rate(timer, device)
        report.add(what="matrix rate", tflop_per_s=digits(rate / 1e12))
        for name, plan in cases(setting).items():
            try:
                measure_case(setting, name, plan, timer, rate, report)
            # a kernel that fails is the result of its row
            except Exception as error:
                report.add(what="forward", forward=name, skipped=reason(error))
    found = targets(report.rows)
    print(table([row for row in report.rows if row["what"] == "forward"], COLUMNS))
    print(f"\n{table([row for row in report.rows if row['what'] == 'part'], PARTS)}")
    for row in found:
        report.add(what="target", **row)
    print(f"\n{table(found, 'target wanted measured met')}")


if __name__ == "__main__":
    main()
