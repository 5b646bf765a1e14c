"""Whether a stream stays as fast and as small as it began: blocks 20 on beside blocks 1,000 on.

`python profiling/bench_stream.py [--blocks 1000 2500] [--out profiling/results/stream.jsonl]`
`python profiling/bench_stream.py --edit memrope --blocks 1000 --out ...live_edit.jsonl`
`python profiling/bench_stream.py --checkpoint tiny-stream --blocks 24 --out ...tiny_stream.jsonl`

A small random causal model on one thread of a CPU, by the process's own time; blocks of one latent
frame, which is four of the video's, and two steps. For every policy of fixed size one stream: the
median milliseconds of `window` blocks from block 20 on and from each of `blocks` on, with the
quartiles of the later ones over the earlier median; the bytes of the cache and of what the VAE
keeps; and what the process holds at these blocks. `--edit`: of streams that edit a source in
Lucy-Edit's layout, frames of a generator that never ends, encoding included; with the report's
latency. `--checkpoint`: of an embedded editor on a rendered clip, so many blocks after the first
four; frames a second by the process's own time and by the clock, and the load of the machine.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from measure import Report, digits, provenance, table
from torch import Tensor

from mv2v_engine import Engine, EngineConfig
from mv2v_engine.checkpoints import Checkpoint, LoadReport
from mv2v_engine.config import SamplingConfig, StreamConfig, StreamPolicy
from mv2v_engine.engine.stream import Stream
from mv2v_engine.models.autoencoder import Autoencoder
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.progress import host_bytes
from mv2v_engine.synthetic.edit_clips import make_loop_clip
from mv2v_engine.testing import randomise, tiny_config
from mv2v_engine.vae import VideoVAE

FIRST = 20
VAE = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
COLUMNS = (
    "policy blocks frames early_ms late_ms ratio low high cache_kib decoder_kib early_mib late_mib"
)
EDIT_COLUMNS = f"{COLUMNS} encoder_kib first_frame_ms fps p99_ms"


def random_causal(stream: StreamConfig, *, edits: bool = False) -> Engine:
    """A model of 32x32 pixels, without text."""
    changes: dict[str, Any] = {"camera_conditioning": "none", "tokenizers": (), "merger": None}
    changes |= {"in_channels": 32, "source_channels": 16} if edits else {"in_channels": 16}
    shape = tiny_config(out_channels=16, attention_head_dim=24, **changes)
    transformer = MV2VTransformer(shape).eval().requires_grad_(False)
    randomise(transformer)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = VideoVAE(Autoencoder(VAE))
    checkpoint = Checkpoint(
        name="random",
        format="mv2v_engine",
        transformer=transformer,
        config=shape,
        sampling=SamplingConfig(num_frames=5, size=(32, 32), guidance_scale=1.0),
        vae_path=None,
        text_path=None,
        tokenizer_path=None,
        report=LoadReport("mv2v_engine", "random weights", Path(), 0, (), (), {}),
        conditioning=("joint",),
        stream=stream,
    )
    return Engine(checkpoint, vae, None, device=torch.device("cpu"), config=EngineConfig())


def arriving() -> Iterator[Tensor]:
    """Frames without end, each other than the one before."""
    picture = torch.arange(32 * 32 * 3, dtype=torch.uint8).reshape(32, 32, 3)
    while True:
        yield picture
        picture = picture.roll(1, 1)


def measured(
    policy: StreamPolicy, blocks: list[int], window: int, *, edits: bool = False
) -> Iterator[dict[str, Any]]:
    """A row for each of `blocks`, of one stream."""
    config = StreamConfig(policy=policy, block_frames=1, window=12, timesteps=(1000, 500))
    stream = random_causal(config, edits=edits).stream(source=arriving() if edits else None)
    spent, memory, before = list[float](), dict[int, int](), time.process_time()
    for block in stream.blocks(max(blocks) + window):
        now = time.process_time()
        spent.append(1000 * (now - before))
        if block.number in (FIRST, *blocks):
            memory[block.number] = host_bytes()
        before = time.process_time()
    middle = statistics.median(spent[FIRST : FIRST + window])
    for first in blocks:
        late = spent[first : first + window]
        low, ratio, high = (each / middle for each in statistics.quantiles(late, n=4))
        yield {
            "policy": policy,
            "blocks": first,
            "frames": stream.first_frame(first + 1),
            "window": window,
            "early_ms": digits(middle),
            "late_ms": digits(statistics.median(late)),
            "ratio": digits(ratio),
            "low": digits(low),
            "high": digits(high),
            "cache_kib": digits(stream.cache.num_bytes / 1024),
            "decoder_kib": digits(stream.decoder.num_bytes / 1024),
            "early_mib": digits(memory[FIRST] / 2**20),
            "late_mib": digits(memory[first] / 2**20),
            **(_latency(stream) if edits else {}),
        }


def _latency(stream: Stream) -> dict[str, Any]:
    """What the report says of all blocks, by the clock."""
    report = stream.report()
    latency = report["latency"]
    return {
        "encoder_kib": digits(report["encoder_bytes"] / 1024),
        "first_frame_ms": digits(1000 * latency["first_frame_seconds"]),
        "fps": digits(latency["frames_per_second"]),
        "p99_ms": digits(1000 * latency["block_seconds_p99"]),
    }


def measured_checkpoint(name: str, blocks: int) -> dict[str, Any]:
    """A row of an embedded checkpoint that edits a rendered clip."""
    engine, warm = Engine.from_pretrained(name, device="cpu"), 4
    clip = make_loop_clip(3_000_001, kind="colour")
    frames = (clip.source.frames[i % clip.num_frames] for i in itertools.count())
    with engine.stream(clip.prompt, source=frames) as stream:
        spent, count, before = list[float](), 0, time.process_time()
        for block in stream.blocks(warm + blocks):
            now = time.process_time()
            if block.number > warm:
                spent.append(now - before)
                count += len(block.frames)
            before = time.process_time()
        latency = stream.report()["latency"]
    rate = count / sum(spent)
    return {
        "checkpoint": name,
        "blocks": blocks,
        "steps": len(stream.config.timesteps),
        "process_fps": digits(rate),
        "process_to_real_time": digits(rate / stream.fps),
        "process_block_ms_p99": digits(1000 * sorted(spent)[int(0.99 * len(spent))]),
        "clock_fps": digits(latency["frames_per_second"]),
        "clock_first_frame_ms": digits(1000 * latency["first_frame_seconds"]),
        "clock_block_ms_p99": digits(1000 * latency["block_seconds_p99"]),
        "load": digits(os.getloadavg()[0]),
        "cores": os.cpu_count(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1000, 2500])
    parser.add_argument("--window", type=int, default=60)
    parser.add_argument("--edit", nargs="*", choices=get_args(StreamPolicy), metavar="POLICY")
    parser.add_argument("--checkpoint", metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("profiling/results/stream.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(args.out, {**provenance(torch.device("cpu")), "threads": 1})
    if args.checkpoint is not None:
        report.add(**measured_checkpoint(args.checkpoint, args.blocks[0]))
        print(report.rows[0])
        return
    edits = args.edit is not None
    for policy in args.edit or get_args(StreamPolicy):
        if policy != "all":  # its cache grows
            for row in measured(policy, args.blocks, args.window, edits=edits):
                report.add(**row)
    print(table(report.rows, EDIT_COLUMNS if edits else COLUMNS))


if __name__ == "__main__":
    main()
