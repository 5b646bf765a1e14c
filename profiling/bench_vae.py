"""The embedded VAE on a CPU: PyTorch's 3-D convolutions against ours by taps.

`python profiling/bench_vae.py [--out profiling/results/vae_taps.json]`

Both in one run, turn about, one thread; medians of CPU seconds, which a busy machine changes less
than the clock. The results' largest difference stands beside them.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mv2v_engine import Engine
from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.files import save_json
from mv2v_engine.ops.conv3d import speed_up_conv3d
from mv2v_engine.synthetic.render import render
from mv2v_engine.synthetic.worlds import HELD_OUT, make_world


@contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """The model with the convolutions that PyTorch gave it."""
    for module in model.modules():
        vars(module).pop("_conv_forward", None)
    try:
        yield
    finally:
        speed_up_conv3d(model)


def seconds(run: Callable[[], Any]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def compare(model: nn.Module, run: Callable[[], Tensor], runs: int) -> dict[str, float]:
    """CPU seconds of both ways, after one call each that is not timed."""
    ours = run().float()
    with plain(model):
        difference = float((run().float() - ours).abs().max())
    times: dict[str, list[float]] = {"plain": [], "taps": []}
    for _ in range(runs):
        times["taps"].append(seconds(run))
        with plain(model):
            times["plain"].append(seconds(run))
    before, after = (statistics.median(times[name]) for name in ("plain", "taps"))
    return {
        "plain_cpu_seconds": round(before, 4),
        "taps_cpu_seconds": round(after, 4),
        "ratio": round(before / after, 2),
        "largest_difference": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    engine = Engine.from_pretrained("tiny-nvs", device="cpu")
    vae, sampling = engine.vae, engine.sampling
    camera = named_trajectory("static", sampling.num_frames, sampling.size)
    frames = render(make_world(HELD_OUT), camera).frames
    latents = vae.encode(frames)
    result = {
        "frames": sampling.num_frames,
        "size": sampling.size,
        "encode": compare(vae.model, lambda: vae.encode(frames), args.runs),
        "decode": compare(vae.model, lambda: vae.decode(latents), args.runs),
        "torch": torch.__version__,
        "cpu": platform.machine(),
        "threads": 1,
        "runs": args.runs,
    }
    for name in ("encode", "decode"):
        print(name, result[name])
    if args.out:
        save_json(args.out, result)


if __name__ == "__main__":
    main()
