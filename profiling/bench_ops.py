"""Every operation at the shapes of real turns: reference, Triton, and what torch itself has.

`python profiling/bench_ops.py [--out profiling/results/gpu_ops.jsonl] [--ops adaln attention]`

Needs CUDA; `--device cpu --quick` runs tiny shapes, to see that it runs. An implementation whose
result strays from float64 is not timed. `functional` is a composition of torch's library
calls, `compiled` the reference through torch.compile, on the first shapes alone.
`percent_of_floor` is the floor over the median: the floor is what the operation's bytes and FLOPs
take at this device's measured copy bandwidth and bf16 matrix rate. The last rows are the targets.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from attention_cases import ALL_MAKERS, ONCE
from measure import (
    TINY_NOTE,
    Ceilings,
    Report,
    Timer,
    digits,
    figures,
    measure_ceilings,
    provenance,
    reason,
    table,
    usable_device,
)
from op_cases import OpCase, plans
from targets import op_targets

from mv2v_engine.testing import relative_error

# bfloat16 keeps eight bits: eager torch is off by about 3e-3 on these inputs
MAX_ERROR = 2e-2
COLUMNS = "op workload width implementation ms ms_low ms_high gb_per_s "
COLUMNS += "tflop_per_s percent_of_floor relative_error skipped"


def implementations(case: OpCase, *, compiled: bool) -> Iterator[tuple[str, Any]]:
    """Names with what to call, or with the reason why it cannot be."""
    for backend, missing in case.backends.items():
        yield backend, missing or (lambda backend=backend: case.run(backend))
    if case.functional is not None:
        yield "functional", case.functional
    # seconds of the compiler for each of them
    if compiled and case.compilable is not None:
        yield "compiled", torch.compile(case.compilable, dynamic=False)


def measure_case(
    case: OpCase, timer: Timer, ceilings: Ceilings, report: Report, *, compiled: bool
) -> None:
    common = {"op": case.op, "workload": case.workload, "tokens": case.tokens, "width": case.width}
    oracle = case.expected(torch.float64)
    for name, run in implementations(case, compiled=compiled):
        row = common | {"implementation": name}
        if isinstance(run, str):
            report.add(**row, skipped=run)
            continue
        try:
            report.add(**row, **_measure(run, case, oracle, timer, ceilings))
        # whatever a kernel, a compiler or a library raises is this row's result
        except Exception as error:
            report.add(**row, skipped=reason(error))


def _measure(
    run: Callable[[], Any], case: OpCase, oracle: torch.Tensor, timer: Timer, ceilings: Ceilings
) -> dict[str, Any]:
    error = relative_error(case.pick(run()), oracle)
    if not error <= MAX_ERROR:
        raise ValueError(f"it is off by {error:.3g} from float64: not timed")
    return figures(timer(run), ceilings, case.phases) | {"relative_error": digits(error)}


def measure_all(
    makers: dict[str, Any], timer: Timer, report: Report, *, tiny: bool, seconds: float
) -> Ceilings:
    """All cases, the first plan's first; those that the time does not suffice for say so."""
    deadline = time.monotonic() + seconds
    ceilings = measure_ceilings(timer, tiny=tiny)
    copied, multiplied = ceilings.bytes_per_second / 1e9, ceilings.flops_per_second / 1e12
    report.add(op="copy", implementation="torch", gb_per_s=digits(copied))
    report.add(op="product", implementation="torch", tflop_per_s=digits(multiplied))
    for index, plan in enumerate(plans(tiny=tiny)):
        for name, make in makers.items():
            if index and name in ONCE:
                continue
            row = {"op": name, "tokens": plan.length, "width": plan.shape.dim}
            if time.monotonic() > deadline:
                report.add(**row, skipped=f"{seconds:.0f} s were used up")
                continue
            try:
                for case in make(plan, timer.device):
                    measure_case(case, timer, ceilings, report, compiled=not tiny and not index)
            # inputs or oracles that do not fit the device, say
            except Exception as error:
                report.add(**row, skipped=reason(error))
            # inputs of full size would otherwise stand beside the next one's
            gc.collect()
    return ceilings


def main() -> None:
    makers = ALL_MAKERS | ONCE
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--ops", nargs="+", choices=makers, default=list(makers))
    parser.add_argument("--seconds", type=float, default=600, help="when to start no more cases")
    parser.add_argument("--commit", help="of a copy without its git history")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = usable_device(args.device, quick=args.quick)
    notes = {"note": TINY_NOTE} if args.quick else {}
    report = Report(args.out, provenance(device, args.commit) | notes)
    timer = Timer(device, seconds=0.01 if args.quick else 0.3)
    chosen = {name: makers[name] for name in makers if name in args.ops}
    with torch.inference_mode():
        ceilings = measure_all(chosen, timer, report, tiny=args.quick, seconds=args.seconds)
    print(table(report.rows, COLUMNS))
    if not args.quick:
        targets = op_targets(report.rows, ceilings)
        for row in targets:
            report.add(**row)
        print(f"\n{table(targets, 'target wanted measured met')}")
    print(f"\n{', '.join(f'{name} {value}' for name, value in report.common.items())}")


if __name__ == "__main__":
    main()
