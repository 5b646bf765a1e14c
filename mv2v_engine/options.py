"""What the commands share on the command line: options of the model and the folder, exit codes."""

from __future__ import annotations

import argparse
import re
import shlex
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from mv2v_engine.checkpoints import detect
from mv2v_engine.checkpoints.fetch import headers_of
from mv2v_engine.checkpoints.lora import find_loras, lora_pair
from mv2v_engine.checkpoints.names import read_renames
from mv2v_engine.checkpoints.resolve import Resolution, resolve
from mv2v_engine.config import (
    REUSE_IS_GONE,
    Alpha,
    AttentionName,
    BackendName,
    Conditioning,
    EngineConfig,
    FastName,
    Fit,
    GraphMode,
    MemoryMode,
    MergeMode,
    ParallelConfig,
    SchedulerName,
    Timesteps,
)
from mv2v_engine.engine.engine import Engine
from mv2v_engine.engine.parts import require_components
from mv2v_engine.envs import launched_rank
from mv2v_engine.parser import num_bytes
from mv2v_engine.sampling.guidance import needs_guidance

# what a source can be
CLIP = "a video file, a folder of images, or their pattern as frames/%03d.png"
REFUSED, PARTIAL, INTERRUPTED = 2, 3, 130
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}

# what both editing commands can set of an engine, by the names of EngineConfig
_SETTINGS = (
    "backend",
    "attention",
    "memory",
    "max_memory",
    "merge",
    "merge_fraction",
    "scheduler",
    "timesteps",
    "fast",
    "graphs",
    "conditioning",
    "step_cache",
    "cache_bytes",
    "device_cache_bytes",
    "check_weights",
    "source_alpha",
    "source_fit",
    "size",
    "lora",
)


def engine_config(args: argparse.Namespace, **own: Any) -> EngineConfig:
    """An engine's configuration from what the commands share, and the settings of one's own."""
    return EngineConfig(**{name: getattr(args, name) for name in _SETTINGS}, **own)


def add_sampler(group: argparse._ArgumentGroup, noise: str, steps: str) -> None:
    """How the denoising runs. noise, steps: what the seed and the steps are of."""
    add = group.add_argument
    add("--seed", type=int, default=0, metavar="N", help=f"of the noise of {noise}")
    add(
        "--steps",
        type=int,
        metavar="N",
        help=f"denoising steps of {steps}; the checkpoint's if not given",
    )
    add(
        "--guidance",
        type=float,
        metavar="S",
        help="guidance scale, 1 is none; the checkpoint's if not given",
    )
    add_solver(group)


def add_solver(group: argparse._ArgumentGroup) -> None:
    """What integrates the flow, and how the model is told where it stands."""
    add = group.add_argument
    add(
        "--fast",
        choices=get_args(FastName),
        help="solver, steps, shift and guidance of weights, or a --lora, distilled to few steps by "
        "this family; the checkpoint's if not given",
    )
    add("--scheduler", choices=get_args(SchedulerName), help="the checkpoint's if not given")
    add(
        "--timesteps",
        choices=get_args(Timesteps),
        help="as they are or rounded to bfloat16; the checkpoint's if not given",
    )


def add_source(group: argparse._ArgumentGroup) -> None:
    """How the source is read."""
    group.add_argument(
        "--fps",
        type=float,
        metavar="R",
        help="rate of the source; a video's own, the checkpoint's for images, if not given",
    )
    add_picture(group)


def add_picture(group: argparse._ArgumentGroup) -> None:
    """What the model sees of a source's frames."""
    add = group.add_argument
    add(
        "--size",
        type=_size,
        metavar="HxW",
        help="of the turns, one that the weights were made for; the checkpoint's if not given",
    )
    add(
        "--fit",
        dest="source_fit",
        choices=get_args(Fit),
        default=EngineConfig().source_fit,
        help="of the source to that size: cut its edges off, or add black bars",
    )
    add(
        "--alpha",
        dest="source_alpha",
        choices=get_args(Alpha),
        default=EngineConfig().source_alpha,
        help="what is put behind transparent pixels, or refuse them",
    )


def add_memory_bounds(group: argparse._ArgumentGroup, most: str) -> None:
    """How much is remembered, and what merges. most: what --max-memory counts."""
    defaults, add = EngineConfig(), group.add_argument
    add("--max-memory", type=int, default=defaults.max_memory, metavar="N", help=most)
    add(
        "--cache-bytes",
        type=num_bytes,
        default=defaults.cache_bytes,
        metavar="N",
        help="of remembered latents, as 4GiB or 500MB",
    )
    add(
        "--device-cache-bytes",
        type=num_bytes,
        metavar="N",
        help="how many of these one arena on the device holds, the rest is one on the host; "
        "tensor by tensor on the device if not given",
    )
    add(
        "--merge",
        choices=get_args(MergeMode),
        help="conv if the weights learned to, else off, if not given",
    )
    add(
        "--merge-fraction",
        type=float,
        metavar="F",
        help="of the frames, at each depth; by the depth if not given",
    )


def _gone(text: str) -> str:
    raise argparse.ArgumentTypeError(REUSE_IS_GONE)


def add_view_memory(parser: argparse.ArgumentParser) -> None:
    """What a turn of novel views remembers, and how much."""
    group = parser.add_argument_group("the memory")
    group.add_argument(
        "--memory",
        choices=get_args(MemoryMode),
        help="retrieved if the weights learned to, else none, if not given",
    )
    add_memory_bounds(group, "videos a turn")
    radius = EngineConfig().fov_radius
    group.add_argument("--fov-radius", type=float, default=radius, metavar="R", help="metres")


def add_reuse(parser: argparse.ArgumentParser) -> None:
    """What later steps take over from earlier ones."""
    defaults = EngineConfig()
    add = parser.add_argument_group("reuse across steps").add_argument
    add(
        "--conditioning",
        choices=get_args(Conditioning),
        default=defaults.conditioning,
        help="static is computed once a turn, on weights trained for it",
    )
    for name in ("--reuse", "--reuse-refresh", "--reuse-drift"):
        add(name, type=_gone, help=argparse.SUPPRESS)
    add(
        "--step-cache",
        type=float,
        metavar="D",
        help="skip steps that change by less than this; none is skipped if not given",
    )


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"height x width as 480x832, got {text!r}")
    return int(match[1]), int(match[2])


def add_model(parser: argparse.ArgumentParser, default: str) -> None:
    """The checkpoint and where it runs. default: an embedded checkpoint's name."""
    add = parser.add_argument_group("the model").add_argument
    add(
        "--checkpoint",
        default=default,
        metavar="NAME_OR_PATH",
        help="a file, a folder, a hub's owner/name[@revision][:path], or an embedded name; "
        f"{default} if not given",
    )
    add(
        "--components",
        type=Path,
        metavar="PATH",
        help="VAE, text encoder and tokenizer from this folder or hub's owner/name, of diffusers' "
        "layout, Wan's or ComfyUI's; the checkpoint's own if not given",
    )
    add(
        "--rename",
        type=Path,
        metavar="FILE",
        help="names that the checkpoint leaves open; none if not given",
    )
    add(
        "--lora",
        type=lora_pair,
        action="append",
        default=[],
        metavar="FILE[:S]",
        help="merge this LoRA into the weights, S times (1 if not given); may be repeated",
    )
    add("--device", metavar="D", help="cpu, cuda or cuda:N; cuda where there is one if not given")
    add(
        "--dtype",
        choices=tuple(DTYPES),
        help="of the transformer; bfloat16 on cuda, else float32, if not given",
    )
    add(
        "--backend",
        choices=get_args(BackendName),
        default=EngineConfig().backend,
        help="of operations",
    )
    add(
        "--attention",
        choices=get_args(AttentionName),
        default=EngineConfig().attention,
        help="library",
    )
    add("--graphs", choices=get_args(GraphMode), default=EngineConfig().graphs, help="CUDA graphs")
    add(
        "--no-check-weights",
        dest="check_weights",
        action="store_false",
        help="load weights without looking for NaN and infinity; spares a huge checkpoint a pass",
    )


def add_parallel(parser: argparse.ArgumentParser) -> None:
    """How the processes of a torchrun share the work."""
    add = parser.add_argument_group("several processes, under torchrun").add_argument
    add(
        "--guidance-ranks",
        type=int,
        choices=(1, 2),
        help="2: one for each forward of guidance; 2 if it is used and they are even, if not given",
    )
    add(
        "--context-ranks",
        type=int,
        metavar="N",
        help="how many share a forward's tokens; if not given, all that guidance leaves",
    )


def parallel_config(args: argparse.Namespace, default_scale: float) -> ParallelConfig:
    """The processes as asked for, the rest from how many there are: guidance first, if it is used.

    default_scale: the checkpoint's guidance scale.
    """
    _, size = launched_rank() or (0, 1)
    guidance, context = args.guidance_ranks, args.context_ranks
    if guidance is None:
        scale = default_scale if args.guidance is None else args.guidance
        left = size // (context or 1)
        guidance = 2 if needs_guidance(scale) and left > 0 and left % 2 == 0 else 1
    return ParallelConfig(
        guidance=guidance, context=max(size // guidance, 1) if context is None else context
    )


def follows(args: argparse.Namespace, config: EngineConfig) -> bool:
    """Serve rank 0 to its end, if this is another process of a torchrun; whether it is."""
    if not (launched_rank() or (0, 1))[0]:
        return False
    # rank 0 decides what an interrupt means, and tells the others at the next step
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    given = loading(args, config)
    del given["components"]
    Engine.follow(args.checkpoint, **given)
    return True


def add_folder(parser: argparse.ArgumentParser, content: str, place: str = "DIR") -> None:
    """What to do with results that are there already. content: what they are called."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help=f"continue the {content} in {place}")
    group.add_argument("--overwrite", action="store_true", help=f"replace the {content} in {place}")
    parser.add_argument("--quiet", action="store_true", help="print the written paths alone")


def read_resolution(args: argparse.Namespace) -> Resolution:
    """What the checkpoint is, from its headers alone.

    Raises:
        CheckpointError: it cannot be loaded, or lacks components that were not given either.
    """
    renames = None if args.rename is None else read_renames(args.rename)
    has_own = getattr(args, "components", "not asked for") is None
    loras = find_loras(getattr(args, "lora", ()))
    with headers_of(args.checkpoint, with_components=has_own) as place:
        resolution = resolve(detect(place, renames), loras)
        resolution.require_loadable()
        if has_own:
            require_components(resolution)
    # not every command has all of them
    given = {name: getattr(args, name, None) for name in ("fast", "scheduler", "timesteps")}
    sampling = resolution.sampling.under(**given).at(getattr(args, "size", None), resolution.name)
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
