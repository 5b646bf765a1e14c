"""A trace of one turn, with the stages, steps, forwards and blocks as named ranges.

`python profiling/trace_turn.py --out trace.json [--device cpu] [--memory 2] [--steps 2] [--static]`

Open it in https://ui.perfetto.dev or chrome://tracing. On CUDA it holds the kernels too; `--nvtx`
opens the same ranges for Nsight Systems instead (`nsys profile -t cuda,nvtx python ...`). Outside
of this script steps and blocks have no ranges, and cost nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from mv2v_engine import Engine
from mv2v_engine.camera.trajectories import PRESETS, named_trajectory
from mv2v_engine.config import EngineConfig
from mv2v_engine.engine.denoise import Denoiser
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.synthetic.render import render
from mv2v_engine.synthetic.worlds import make_world

WORLD = 3_000_001


def _ranged(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def ranged(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return call(*args, **kwargs)

    return ranged


@contextmanager
def _replaced(owner: Any, attribute: str, name: str) -> Iterator[None]:
    """An owner's method inside a range of this name."""
    had = attribute in vars(owner)
    call = getattr(owner, attribute)
    setattr(owner, attribute, _ranged(name, call))
    try:
        yield
    finally:
        if had:
            setattr(owner, attribute, call)
        else:
            delattr(owner, attribute)


@contextmanager
def ranges(transformer: MV2VTransformer) -> Iterator[None]:
    """Ranges for every step, forward and block; the stages have theirs anyhow."""
    with ExitStack() as stack:
        stack.enter_context(_replaced(Denoiser, "step", "step"))
        stack.enter_context(_replaced(transformer, "forward_samples", "forward"))
        for index, block in enumerate(transformer.blocks):
            stack.enter_context(_replaced(block, "forward", f"block {index}"))
        yield


def trace(engine: Engine, out: Path | None, *, memory: int, steps: int) -> profile | None:
    """Profile a turn with so many memory videos into a Chrome trace; no file: NVTX ranges."""
    sampling, cameras = engine.sampling, list(islice(PRESETS, memory + 1))
    still = named_trajectory("static", sampling.num_frames, sampling.size)
    session = engine.session(render(make_world(WORLD), still).frames, fps=8.0)
    for camera in cameras[:-1]:
        session.render(camera, num_inference_steps=1)
    with ranges(engine.transformer):
        if out is None:
            with torch.autograd.profiler.emit_nvtx():
                session.render(cameras[-1], num_inference_steps=steps)
            return None
        activities = [ProfilerActivity.CPU]
        if engine.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        recorded: profile = profile(activities=activities)
        with recorded:
            session.render(cameras[-1], num_inference_steps=steps)
    recorded.export_chrome_trace(str(out))
    return recorded


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", type=int, default=2, choices=range(len(PRESETS)))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--static", action="store_true", help="static conditioning")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--out", type=Path, help="the trace, .json or .json.gz")
    how.add_argument("--nvtx", action="store_true", help="ranges for Nsight Systems, no file")
    args = parser.parse_args()
    config = EngineConfig(conditioning="static" if args.static else "joint")
    engine = Engine.from_pretrained("tiny-nvs", device=args.device, config=config)
    recorded = trace(engine, args.out, memory=args.memory, steps=args.steps)
    if recorded is not None:
        averages = recorded.key_averages()
        print(averages.table(sort_by="self_cpu_time_total", row_limit=20))
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
