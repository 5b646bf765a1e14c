"""What bfloat16 products do on a CPU: whole turns against float32, and blocks of larger width.

`python profiling/bench_bfloat16.py [--scenes 3] [--steps 10] [--out FILE]`

Turns, latents and frames as `bench_quantize` measures them, with `dtype=bfloat16` in the place of
weights of eight bits; the float32 turn is made twice. Widths: a forward of four random blocks over
825 tokens of the token plan that `tiny-nvs` has with three memory videos, float32 and bfloat16 in
turn, the median of the ratios of the process's own seconds.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_quantize import COLUMNS, EXACT, measure
from measure import digits, provenance, table

from mv2v_engine.config import TINY
from mv2v_engine.evaluation.protocol import FIRST_SCENE
from mv2v_engine.files import save_json
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.feed_forward import Linear
from mv2v_engine.testing import randomise
from mv2v_engine.tokens.plan import novel_view_plan

HEADS, ROUNDS = (3, 8, 16), 7
WEIGHTS = {**EXACT, "bfloat16": {"dtype": torch.bfloat16}}


@torch.no_grad()
def width(heads: int) -> dict[str, Any]:
    """The ratio of a forward of so many heads of 64 channels."""
    dim = 64 * heads
    shape = replace(
        TINY,
        num_layers=4,
        num_attention_heads=heads,
        attention_head_dim=64,
        ffn_dim=4 * dim,
        merge_blocks=None,
    )
    plan = novel_view_plan(memory=3, shape=shape, frames=17, size=(96, 160), merge="off")
    models = [MV2VTransformer(shape).eval().requires_grad_(False) for _ in range(2)]
    for model in models:
        randomise(model)
        model.set_backend("native")
    for module in models[1].modules():
        if isinstance(module, Linear):
            module.to(torch.bfloat16)
    latents = [torch.randn(1, shape.in_channels, *segment.grid) for segment in plan.segments]
    text = torch.randn(1, shape.text_len, shape.text_dim)
    size = (1, len(plan.segments), plan.target.num_frames, shape.camera_dim)
    cameras, seconds = torch.randn(size), []
    for _ in range(ROUNDS + 1):
        pair = []
        for model in models:
            start = time.process_time()
            model(latents, torch.tensor([500.0]), text, plan=plan, cameras=cameras)
            pair.append(time.process_time() - start)
        seconds.append(pair)
    pairs = seconds[1:]
    return {
        "width": dim,
        "tokens": plan.length,
        "float32_ms": digits(1e3 * median(pair[0] for pair in pairs)),
        "bfloat16_ms": digits(1e3 * median(pair[1] for pair in pairs)),
        "time_ratio": digits(median(pair[1] / pair[0] for pair in pairs)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", default="tiny-nvs")
    parser.add_argument("--scenes", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    widths = [width(heads) for heads in HEADS]
    print(table(widths, "width tokens float32_ms bfloat16_ms time_ratio"))
    seeds = range(FIRST_SCENE, FIRST_SCENE + args.scenes)
    rows = measure(args.checkpoint, seeds, args.steps, WEIGHTS)
    print(table(rows, f"weights {COLUMNS}"))
    if args.out:
        common = {"checkpoint": args.checkpoint, "scenes": args.scenes, "steps": args.steps}
        common |= {"threads": 1, "capabilities": torch.backends.cpu.get_cpu_capability()}
        where = provenance(torch.device("cpu"))
        save_json(args.out, {**common, **where, "rows": rows, "widths": widths})


if __name__ == "__main__":
    main()
