"""What the commands share on the command line: options of the model and the folder, exit codes."""

from __future__ import annotations

import argparse
import shlex
import signal
import threading
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from types import MappingProxyType
from typing import Any, get_args

import torch

from mv2v_engine.checkpoints import detect
from mv2v_engine.checkpoints.fetch import headers_of
from mv2v_engine.checkpoints.lora import find_loras, lora_pair
from mv2v_engine.checkpoints.names import read_renames
from mv2v_engine.checkpoints.resolve import Resolution, resolve
from mv2v_engine.config import (
    REUSE_IS_GONE,
    SAMPLING,
    DtypeName,
    EngineConfig,
    LoadConfig,
    ParallelConfig,
    SamplingConfig,
    name_with_attention,
)
from mv2v_engine.engine.engine import Engine
from mv2v_engine.engine.parts import require_components
from mv2v_engine.envs import launched_rank
from mv2v_engine.sampling.guidance import needs_guidance
from mv2v_engine.settings import add_settings, given

# what a source can be
CLIP = "a video file, a folder of images, or their pattern as frames/%03d.png"
REFUSED, PARTIAL, INTERRUPTED = 2, 3, 130
DTYPES = {name: getattr(torch, name) for name in get_args(DtypeName)}


def add_turns(parser: argparse.ArgumentParser, group: argparse._ArgumentGroup) -> None:
    """How turns are made, beside how their engine runs. group: takes the rate of the source."""
    group.add_argument(
        "--fps",
        type=float,
        metavar="R",
        help="rate of the source; a video's own, the checkpoint's for images, if not given",
    )
    sampling = parser.add_argument_group(SAMPLING)
    sampling.add_argument("--seed", type=int, default=0, metavar="N", help="the noise's seed")
    add_settings(parser, SamplingConfig, has_defaults=False)
    add_settings(parser, ParallelConfig, has_defaults=False)


def _gone(text: str) -> str:
    raise argparse.ArgumentTypeError(REUSE_IS_GONE)


def add_engine(
    parser: argparse.ArgumentParser,
    *,
    without: Collection[str] = (),
    own: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> None:
    """The checkpoint, and how its engine runs. without, own: as `add_settings` has them."""
    add_settings(parser, LoadConfig, own=own)
    history = {"nargs": "?", "const": "default"}
    own = {"lora": {"type": lora_pair}, "history": history, **own}
    add_settings(parser, EngineConfig, without=without, own=own)
    for name in ("--reuse", "--reuse-refresh", "--reuse-drift"):
        parser.add_argument(name, type=_gone, help=argparse.SUPPRESS)


def parallel_config(args: argparse.Namespace, default_scale: float) -> ParallelConfig:
    """The processes as asked for, the rest from how many there are: guidance first, if it is used.

    default_scale: the checkpoint's guidance scale.
    """
    _, size = launched_rank() or (0, 1)
    guidance, context = args.guidance, args.context
    if guidance is None:
        scale = default_scale if args.guidance_scale is None else args.guidance_scale
        left = size // (context or 1)
        guidance = 2 if needs_guidance(scale) and left > 0 and left % 2 == 0 else 1
    context = max(size // guidance, 1) if context is None else context
    asked = given(args, ParallelConfig) | {"guidance": guidance, "context": context}
    return ParallelConfig(**asked)


def follows(args: argparse.Namespace, config: EngineConfig) -> bool:
    """Serve rank 0 to its end, if this is another process of a torchrun; whether it is."""
    if not (launched_rank() or (0, 1))[0]:
        return False
    # rank 0 decides what an interrupt means, and tells the others at the next step
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    arguments = loading(args, config)
    del arguments["components"]
    Engine.follow(args.checkpoint, **arguments)
    return True


def add_folder(parser: argparse.ArgumentParser, content: str, place: str = "DIR") -> None:
    """What to do with results that are there already. content: what they are called."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help=f"continue the {content} in {place}")
    group.add_argument("--overwrite", action="store_true", help=f"replace the {content} in {place}")
    parser.add_argument("--quiet", action="store_true", help="print the written paths alone")


def add_preview(parser: argparse.ArgumentParser) -> None:
    """What is shown while a turn is made."""
    parser.add_argument(
        "--preview",
        action="store_true",
        help="draw what every step predicts, in a terminal that says that it has 24-bit colours",
    )


def read_resolution(args: argparse.Namespace) -> Resolution:
    """What the checkpoint is, from its headers alone.

    Raises:
        CheckpointError: it cannot be loaded, or lacks components that were not given either.
    """
    renames = None if args.rename is None else read_renames(args.rename)
    has_own = getattr(args, "components", "not asked for") is None
    loras = find_loras(getattr(args, "lora", ()))
    causal, base = getattr(args, "causal", False), getattr(args, "base", None)
    with ExitStack() as stack:
        place = stack.enter_context(headers_of(args.checkpoint, with_components=has_own))
        if base is not None:
            base = stack.enter_context(headers_of(base, with_components=has_own))
        resolution = resolve(detect(place, renames, causal=causal, base=base), loras)
        resolution = resolution.quantized(getattr(args, "quantize", None))
        name = name_with_attention(resolution.name, getattr(args, "attention", "auto"))
        resolution = replace(resolution, name=name)
        resolution.require_loadable()
        if has_own:
            require_components(resolution)
    # not every command has all of them
    chosen = {name: getattr(args, name, None) for name in ("fast", "scheduler", "timesteps")}
    sampling = resolution.sampling.under(**chosen).at(getattr(args, "size", None), resolution.name)
    return replace(resolution, sampling=sampling)


def loading(args: argparse.Namespace, config: EngineConfig) -> dict[str, Any]:
    """The arguments of `Engine.from_pretrained`, the checkpoint itself apart."""
    return {
        "device": args.device,
        "dtype": DTYPES.get(args.dtype),
        "config": config,
        "components": args.components,
        "rename": args.rename,
    }


def resuming_line(args: argparse.Namespace) -> str:
    """The command under way once more, to continue it. args.words: what `run` was given."""
    words = [word for word in args.words if word not in ("--resume", "--overwrite")]
    launched = launched_rank()
    several = (
        ["-m", "torch.distributed.run", "--nproc-per-node", str(launched[1])] if launched else []
    )
    return shlex.join(["python", *several, "-m", "mv2v_engine.run", *words, "--resume"])
