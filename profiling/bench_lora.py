"""What a LoRA adds to loading a checkpoint of the 1.3B shape.

`python profiling/bench_lora.py [--device cpu] [--out profiling/results/lora.jsonl]`

Random bfloat16 weights, loaded as bfloat16 from a file in the page cache; LoRAs of the ranks that
are published (32 to 128), bfloat16, on all ten products of every block. With and without take
turns: `added_seconds` is the median over rounds of the difference, with its quartiles. It is all of
`load_checkpoint`: headers, the file's digest, the merge and the check of its numbers. On a CPU one
thread and its own time, which leaves out what else the machine does.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from measure import Report, Timer, digits, existing_device, provenance, table
from safetensors.torch import save_file
from torch import nn

from mv2v_engine.checkpoints import load_checkpoint, save_checkpoint
from mv2v_engine.config import WAN_1_3B, SamplingConfig
from mv2v_engine.defaults import without_memory
from mv2v_engine.models.dit import MV2VTransformer

RANKS = (32, 64, 128)
LAYERS = (
    *(f"{attention}.{p}" for attention in ("self_attn", "cross_attn") for p in "qkvo"),
    "ffn.0",
    "ffn.2",
)
COLUMNS = "case lora_mib seconds with_seconds added_seconds low high"


def save_base(folder: Path) -> Path:
    """Weights of the whole shape; random, the same few over and over."""
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16() / 40
    with without_memory():
        model = MV2VTransformer(WAN_1_3B)
    for name, parameter in list(model.named_parameters()):
        count = parameter.numel()
        values = noise.repeat(-(-count // len(noise)))[:count].reshape(parameter.shape)
        module, _, leaf = name.rpartition(".")
        model.get_submodule(module).register_parameter(leaf, nn.Parameter(values))
    save_checkpoint(folder, model, WAN_1_3B, SamplingConfig(), "base", torch.bfloat16)
    return folder


def save_lora(path: Path, rank: int) -> Path:
    """A LoRA of every product in the blocks, under ComfyUI's names."""
    width, hidden = WAN_1_3B.dim, WAN_1_3B.ffn_dim
    factors = {}
    for block in range(WAN_1_3B.num_layers):
        for layer in LAYERS:
            rows, columns = width, width
            if layer.startswith("ffn"):
                rows, columns = (hidden, width) if layer == "ffn.0" else (width, hidden)
            key = f"diffusion_model.blocks.{block}.{layer}"
            factors[f"{key}.lora_down.weight"] = torch.randn(rank, columns).bfloat16()
            factors[f"{key}.lora_up.weight"] = torch.randn(rows, rank).bfloat16()
    save_file(factors, str(path))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--commit", help="of a copy without its git history")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = existing_device(args.device)
    torch.set_num_threads(1)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    timer = Timer(torch.device("cpu"), seconds=1, clock=clock)
    about = provenance(device, args.commit) | {"threads": 1}
    report = Report(args.out, about)
    with torch.no_grad(), tempfile.TemporaryDirectory() as temporary:
        load = partial(
            load_checkpoint, save_base(Path(temporary)), device=device, dtype=torch.bfloat16
        )
        for rank in RANKS:
            path = save_lora(Path(temporary) / f"rank{rank}.safetensors", rank)
            merged = partial(load, lora=[(path, 1.0)])
            rivals = [load, merged]
            for call in rivals:
                call()
            rounds = timer.rounds(rivals, args.rounds)
            low, middle, high = statistics.quantiles([b - a for a, b in rounds], n=4)
            report.add(
                case=f"rank {rank}",
                rounds=args.rounds,
                lora_mib=digits(path.stat().st_size / 2**20),
                seconds=digits(statistics.median(times[0] for times in rounds)),
                with_seconds=digits(statistics.median(times[1] for times in rounds)),
                added_seconds=digits(middle),
                low=digits(low),
                high=digits(high),
            )
    print(table(report.rows, COLUMNS))


if __name__ == "__main__":
    main()
