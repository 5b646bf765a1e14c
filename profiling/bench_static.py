"""What a static turn with ten memory videos costs against a joint turn with none, on a CPU thread.

`python profiling/bench_static.py [--steps 20] [--out profiling/results/static_turn.json]`

The embedded model's denoising alone, on random latents: time does not depend on them. Seconds are
the process's own, so that other load on the machine counts little; every plan runs once a round,
and ratios are within a round. FLOPs are those of the turn's report.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import digits, provenance, table

from mv2v_engine import CancelToken
from mv2v_engine.checkpoints import Checkpoint, load_checkpoint
from mv2v_engine.config import MergeMode
from mv2v_engine.engine.report import turn_flops
from mv2v_engine.engine.runner import Conditioning, Denoised, Denoiser, denoise
from mv2v_engine.files import save_json
from mv2v_engine.sampling.flow_match import make_solver
from mv2v_engine.tokens.flops import conditioning_bytes
from mv2v_engine.tokens.plan import TokenPlan, novel_view_plan

MERGES: tuple[MergeMode, ...] = ("off", "conv")
COLUMNS = "merge conditioning memory tokens gflop seconds kept_mib flop_ratio time_ratio"


def turn_plans(checkpoint: Checkpoint, merge: MergeMode, memory: int) -> list[TokenPlan]:
    """The joint turn that remembers nothing, which is the measure; then what is held against it."""
    sampling = checkpoint.sampling
    common: dict[str, Any] = {
        "frames": sampling.num_frames,
        "size": sampling.size,
        "shape": checkpoint.config,
        "merge": merge,
    }
    return [
        novel_view_plan(memory=0, **common),
        novel_view_plan(memory=0, conditioning="static", **common),
        novel_view_plan(memory=memory, conditioning="static", **common),
        novel_view_plan(memory=memory, **common),
    ]


def denoised(checkpoint: Checkpoint, plan: TokenPlan, steps: int) -> tuple[Denoised, float]:
    """A whole denoising and its seconds of this process."""
    generator, config = torch.Generator().manual_seed(0), checkpoint.config
    videos = [
        torch.randn(1, config.in_channels, *s.grid, generator=generator) for s in plan.segments
    ]
    cameras = torch.randn(1, len(plan.segments), plan.target.num_frames, 12, generator=generator)
    text = torch.zeros(1, config.text_len, config.text_dim)
    began = time.process_time()
    denoiser = Denoiser(
        checkpoint.transformer,
        plan,
        Conditioning(videos[1:], cameras, text, None),
        videos[0],
        make_solver("euler", steps, checkpoint.sampling.flow_shift),
        guidance_scale=1.0,
    )
    turn = denoise(denoiser, CancelToken())
    while True:
        try:
            next(turn)
        except StopIteration as stop:
            return stop.value, time.process_time() - began


def compare(checkpoint: Checkpoint, steps: int, rounds: int, memory: int) -> list[dict[str, Any]]:
    """A row a plan; ratios to the joint turn without memory of the same merging."""
    rows = []
    for merge in MERGES:
        plans = turn_plans(checkpoint, merge, memory)
        for plan in plans:
            denoised(checkpoint, plan, 2)  # tables, thread pools and caches
        times = [[denoised(checkpoint, plan, steps)[1] for plan in plans] for _ in range(rounds)]
        flops = [turn_flops(plan, plan.merge_steps, steps)["flops"] for plan in plans]
        for i, plan in enumerate(plans):
            kept = conditioning_bytes(plan, torch.float32.itemsize)
            rows.append(
                {
                    "merge": merge,
                    "conditioning": plan.conditioning,
                    "memory": plan.num_memory,
                    "tokens": plan.length,
                    "gflop": digits(flops[i] / 1e9),
                    "seconds": digits(median(row[i] for row in times)),
                    "kept_mib": digits(kept / 2**20),
                    "flop_ratio": digits(flops[i] / flops[0]),
                    "time_ratio": digits(median(row[i] / row[0] for row in times)),
                    "time_ratios": [digits(row[i] / row[0]) for row in times],
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = load_checkpoint("tiny-nvs", device=torch.device("cpu"), dtype=torch.float32)
    rows = compare(checkpoint, args.steps, args.rounds, args.memory)
    print(table(rows, COLUMNS))
    if args.out:
        common = {
            "checkpoint": "tiny-nvs",
            "steps": args.steps,
            "rounds": args.rounds,
            "threads": 1,
        }
        where = provenance(torch.device("cpu"))
        save_json(args.out, {**common, **where, "rows": rows})


if __name__ == "__main__":
    main()
