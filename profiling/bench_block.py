"""One block of the 1.3B transformer: with the fused operations, in eager PyTorch, in diffusers.

`python profiling/bench_block.py [--out profiling/results/gpu_block.jsonl]`

At 90,090 tokens (three memory videos) and 16,380 (240p, none), all with the same attention but
diffusers, which takes its own default. Against diffusers the block is without the camera modules,
which that one lacks. All are timed turn about; `speedup` is a row's time over the fused
block's. Needs CUDA; `--device cpu --quick` runs a tiny block, to see that it runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from eager_block import EagerBlock, diffusers_block
from forwards import half_precision
from measure import (
    TINY_NOTE,
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
from op_cases import random_tensors
from targets import target
from torch import Tensor

from mv2v_engine.config import EngineConfig
from mv2v_engine.models.block import Block
from mv2v_engine.models.sequence import Sequence
from mv2v_engine.ops.attention_backends import resolve_attention
from mv2v_engine.ops.backend import resolve
from mv2v_engine.testing import randomise, relative_error, tiny_config
from mv2v_engine.tokens.flops import block_flops
from mv2v_engine.tokens.plan import TokenPlan, novel_view_plan, turn_plan

MAX_ERROR = 2e-2  # between bfloat16 blocks and the float32 one, or one another
COLUMNS = "workload implementation attention ms ms_low ms_high tflop_per_s "
COLUMNS += "speedup relative_error skipped"


def plans(*, tiny: bool) -> list[TokenPlan]:
    if tiny:
        return [turn_plan(tiny_config(), (3, 12, 20), (4, 8), merge="off")]
    return [
        novel_view_plan(memory=3, merge="off"),
        novel_view_plan(memory=0, merge="off", size=(240, 416)),
    ]


def without_cameras(plan: TokenPlan) -> TokenPlan:
    segments = tuple(replace(segment, camera=None) for segment in plan.segments)
    return replace(plan, shape=replace(plan.shape, camera_conditioning="none"), segments=segments)


class Bench:
    """One block on one plan, with everything that it is called with."""

    def __init__(self, plan: TokenPlan, device: torch.device) -> None:
        shape, new = plan.shape, random_tensors(device)
        self.plan, width = plan, shape.dim
        self.block = Block(shape)
        randomise(self.block, std=0.02)
        half_precision(self.block.to(device)).eval().requires_grad_(False)
        angles = new(1, plan.length, shape.attention_head_dim // 2, dtype=torch.float32)
        rope = torch.cat([angles.cos(), angles.sin()], -1)
        frames = torch.arange(len(plan.frame_table), device=device)[None]
        x = new(1, plan.length, width)
        self.temb = new(1, 6, width, dtype=torch.float32)
        self.text = new(1, shape.text_len, width)
        self.cameras = new(1, len(plan.frame_table), 12) if shape.has_camera else None
        self.sequence = Sequence.of(
            x,
            rope,
            frames,
            plan.layout,
            temb=self.temb[:, 0],
            temb_6=self.temb,
            text=self.text,
            cameras=self.cameras,
        )
        self.fused_backend = resolve("auto", device)
        heads = {"num_heads": shape.num_attention_heads, "head_dim": shape.attention_head_dim}
        self.attention = resolve_attention(EngineConfig(), device, torch.bfloat16, **heads)

    def ours(self, backend: str) -> Callable[[], Tensor]:
        """The same attention whatever the backend of the other operations."""

        def run() -> Tensor:
            for module in self.block.modules():
                if hasattr(module, "backend"):
                    module.backend = backend  # type: ignore[assignment]
                if hasattr(module, "attention_backend"):
                    module.attention_backend = self.attention  # type: ignore[assignment]
            out: Tensor = self.block(self.sequence)[0]
            return out

        return run

    def eager(self) -> Callable[[], Tensor]:
        block = EagerBlock(self.block, self.sequence, attention_backend=self.attention)
        return lambda: block(self.sequence.x, self.temb, self.text, self.cameras)

    def diffusers(self) -> Callable[[], Tensor]:
        block = diffusers_block(self.block, self.sequence)
        return lambda: block(self.sequence.x, self.temb, self.text)

    @property
    def phases(self) -> tuple[tuple[int, int]]:
        return ((0, block_flops(self.plan) // self.plan.shape.num_layers),)


def measure_plan(plan: TokenPlan, timer: Timer, report: Report, ceilings: Any) -> None:
    cameras = "with cameras" if plan.shape.has_camera else "without cameras"
    workload = f"{plan.length:,} tokens {cameras}"
    bench = Bench(plan, timer.device)
    makers: dict[str, Callable[[], Callable[[], Tensor]]] = {
        "fused": lambda: bench.ours(bench.fused_backend),
        "eager": bench.eager,
        "reference": lambda: bench.ours("reference"),
    }
    if not plan.shape.has_camera:
        makers["diffusers"] = bench.diffusers
    common = {"bench": "block", "workload": workload, "tokens": plan.length}
    common |= {"backend": bench.fused_backend}
    ready: dict[str, tuple[Callable[[], Tensor], float]] = {}
    expected = bench.ours("reference")().clone()
    for name, make in makers.items():
        try:
            run = make()
            error = relative_error(run() - bench.sequence.x, expected - bench.sequence.x)
            if not error <= MAX_ERROR:
                raise ValueError(f"it is off by {error:.3g} from the reference: not timed")
            ready[name] = run, error
        # a library that is missing, or that refuses, is the result of its row
        except Exception as failed:
            report.add(**common, implementation=name, skipped=reason(failed))
    timings = timer.turn_about([run for run, _ in ready.values()])
    timed = dict(zip(ready, timings, strict=True))
    for name, timing in timed.items():
        row = common | {"implementation": name, "relative_error": digits(ready[name][1])}
        row["attention"] = "diffusers' default" if name == "diffusers" else bench.attention
        if "fused" in timed:
            row["speedup"] = round(timing.median / timed["fused"].median, 3)
        report.add(**row, **figures(timing, ceilings, bench.phases))


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fused block against the others at the full-size plans."""

    def against(name: str, tokens: int, cameras: str) -> list[dict[str, Any]]:
        wanted = (name, f"{tokens:,} tokens {cameras}")
        return [r for r in rows if (r.get("implementation"), r.get("workload")) == wanted]

    found = []
    for tokens, ratio in ((90_090, 1.03), (16_380, 1.10)):
        for name, wanted, cameras in (
            ("eager PyTorch", ratio, "with cameras"),
            ("diffusers", 1.35, "without cameras"),
        ):
            rows_of = against(name.split()[0], tokens, cameras)
            found.append(
                target(f"block at {tokens:,} tokens, x {name}", wanted, rows_of, "speedup")
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny block")
    parser.add_argument("--commit", help="of a copy without its git history")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = usable_device(args.device, quick=args.quick)
    notes = {"note": TINY_NOTE} if args.quick else {}
    report = Report(args.out, provenance(device, args.commit) | notes)
    timer = Timer(device, seconds=0.01 if args.quick else 1.0)
    with torch.inference_mode():
        ceilings = measure_ceilings(timer, tiny=args.quick)
        for plan in plans(tiny=args.quick):
            for variant in (plan, without_cameras(plan)):
                measure_plan(variant, timer, report, ceilings)
    print(table(report.rows, COLUMNS))
    if not args.quick:
        found = targets(report.rows)
        for row in found:
            report.add(**row)
        print(f"\n{table(found, 'target wanted measured met')}")


if __name__ == "__main__":
    main()
