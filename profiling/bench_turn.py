"""What the embedded model's turn costs on a device: one forward, and a whole turn.

`python profiling/bench_turn.py [--device cpu] [--out profiling/results/gpu_turn.jsonl]`

A forward with no, three and six memory videos, on torch and on this device's kernels; the launches
and not the products bound so small a model. A whole turn, with the VAE, needs diffusers.
"""

from __future__ import annotations

import argparse
import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Report, Timer, figures, measure_ceilings, provenance, reason, table
from op_cases import random_tensors

from mv2v_engine import Engine
from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.checkpoints import Checkpoint, load_checkpoint
from mv2v_engine.ops.backend import resolve
from mv2v_engine.synthetic.render import render
from mv2v_engine.synthetic.worlds import make_world
from mv2v_engine.tokens.flops import flop_table
from mv2v_engine.tokens.plan import novel_view_plan

COLUMNS = "what workload implementation ms ms_low ms_high tflop_per_s seconds skipped"
WORLD = 3_000_001


def measure_forwards(checkpoint: Checkpoint, timer: Timer, report: Report, *, tiny: bool) -> None:
    model, sampling = checkpoint.transformer, checkpoint.sampling
    config, new = checkpoint.config, random_tensors(timer.device)
    ceilings = measure_ceilings(timer, tiny=tiny)
    backends = dict.fromkeys(("reference", resolve("auto", timer.device)))
    for memory in (0, 3, 6):
        plan = novel_view_plan(
            memory=memory, frames=sampling.num_frames, size=sampling.size, shape=config
        )
        latents = [new(1, config.in_channels, *segment.grid) for segment in plan.segments]
        text = new(1, config.text_len, config.text_dim)
        cameras = new(1, len(plan.segments), plan.target.num_frames, 12, dtype=torch.float32)
        timestep = torch.full((1,), 500.0, device=timer.device)
        phases = ((0, sum(flop_table(plan).values())),)
        for backend in backends:
            row: dict[str, Any] = {"what": "forward"}
            row |= {"workload": f"{memory} memory videos, {plan.length:,} tokens"}
            row |= {"tokens": plan.length, "implementation": backend}
            model.set_backend(backend)
            try:
                timing = timer(partial(model, latents, timestep, text, plan=plan, cameras=cameras))
            # whatever a kernel raises is this row's result
            except Exception as error:
                report.add(**row, skipped=reason(error))
                continue
            report.add(**row, **figures(timing, ceilings, phases))


def measure_turns(device: torch.device, report: Report) -> None:
    """A first turn, which also warms up, and a second that remembers it."""
    row: dict[str, Any] = {"what": "turn", "implementation": resolve("auto", device)}
    if importlib.util.find_spec("diffusers") is None:
        report.add(**row, skipped="the VAE needs the package diffusers, which is not installed")
        return
    engine = Engine.from_pretrained("tiny-nvs", device=device)
    camera = named_trajectory("static", engine.sampling.num_frames, engine.sampling.size)
    session = engine.session(render(make_world(WORLD), camera).frames, fps=8.0)
    for number, name in enumerate(("pan_right", "arc_left"), start=1):
        seconds = session.render(name).report["seconds"]
        total = round(sum(seconds.values()), 4)
        report.add(**row, workload=f"turn {number}", seconds=total, stages=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", help="of a copy without its git history")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    is_cuda = device.type == "cuda"
    if is_cuda and not torch.cuda.is_available():
        raise SystemExit("no CUDA device was found; use --device cpu")
    report = Report(args.out, provenance(device, args.commit))
    dtype = torch.bfloat16 if is_cuda else torch.float32
    checkpoint = load_checkpoint("tiny-nvs", device=device, dtype=dtype)
    with torch.inference_mode():
        timer = Timer(device, seconds=1.0)
        measure_forwards(checkpoint, timer, report, tiny=not is_cuda)
    measure_turns(device, report)
    print(table(report.rows, COLUMNS))


if __name__ == "__main__":
    main()
