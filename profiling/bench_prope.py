"""What cameras inside attention cost: one block of `tiny-nvs`'s shape with PRoPE, and without.

`python profiling/bench_prope.py [--out profiling/results/prope.jsonl]`

Target, source and three memory videos, random weights, one CPU thread and its own time. The forms
take turns; `percent` is the median over rounds of what a form takes longer than no camera attention
does in the same round, with its quartiles. "forward and backward" is the reference, which trains.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from measure import Report, Timer, digits, provenance, table

from mv2v_engine.config import TINY, CameraAttention
from mv2v_engine.models.block import Block
from mv2v_engine.models.camera_encoder import frame_cameras
from mv2v_engine.models.rope import rotary_table
from mv2v_engine.models.sequence import Sequence
from mv2v_engine.ops.backend import resolve
from mv2v_engine.testing import as_cameras, randomise
from mv2v_engine.tokens.plan import turn_plan

FORMS: tuple[CameraAttention, ...] = ("none", "prope", "prope_fused")
GRID = (5, 12, 20)  # the grid of tiny-nvs: 17 frames of 96x160


def block(form: CameraAttention, backend: str, *, trains: bool) -> Callable[[], None]:
    """A call of a block, forward or forward and backward."""
    shape = replace(TINY, camera_attention=form)
    plan = turn_plan(shape, GRID, (4, 4, 4), merge="off")
    made = Block(shape).requires_grad_(trains)
    randomise(made, std=0.02)
    for module in made.modules():
        if hasattr(module, "backend"):
            module.backend = backend  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, plan.length, shape.dim, generator=generator)
    frames = torch.arange(len(plan.frame_table))[None]
    temb = torch.randn(1, 6, shape.dim, generator=generator)
    text = torch.randn(1, shape.text_len, shape.dim, generator=generator)
    drawn = torch.randn(1, len(plan.segments), GRID[0], 12, generator=generator)
    sequence = Sequence.of(
        x,
        rotary_table(plan)[None],
        frames,
        plan.layout,
        temb=temb[:, 0],
        temb_6=temb,
        text=text,
        cameras=frame_cameras(plan, as_cameras(drawn, shape)),
    )

    def run() -> None:
        with torch.set_grad_enabled(trains):
            out, _ = made(sequence)
            if trains:
                out.backward(x)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--commit", help="of a copy without its git history")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    timer = Timer(device, seconds=0, clock=time.process_time)
    report = Report(args.out, provenance(device, args.commit) | {"threads": 1})
    fast = resolve("auto", device)
    for case, backend, trains in (
        (f"forward, {fast}", fast, False),
        ("forward, reference", "reference", False),
        ("forward and backward", "reference", True),
    ):
        rivals = [block(form, backend, trains=trains) for form in FORMS]
        for run in rivals:
            run()
        rounds = timer.rounds(rivals, args.rounds)
        for place, form in enumerate(FORMS):
            row = {"case": case, "camera_attention": form, "rounds": args.rounds}
            row["ms"] = digits(1e3 * statistics.median(times[place] for times in rounds))
            if place:
                ratios = [100 * times[place] / times[0] - 100 for times in rounds]
                low, middle, high = statistics.quantiles(ratios, n=4)
                row |= {"percent": digits(middle), "low": digits(low), "high": digits(high)}
            report.add(**row)
    print(table(report.rows, "case camera_attention ms percent low high"))


if __name__ == "__main__":
    main()
