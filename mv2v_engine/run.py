"""The command line: `python -m mv2v_engine.run novel-view | edit | stream | evaluate | ...`.

Whatever can be refused is refused before a model is loaded: one line `error: ...` and exit code
2. Interrupting (Ctrl-C) ends the turn under way at its next step, keeps the finished ones and
exits with 130. Results that cannot be written are tried again after every turn; if some are
missing in the end, the exit code is 3, and `--resume` makes them.

A reader of stdout or stderr that leaves early (`| head -1`) ends nothing: the work goes on to its
end in silence, and the exit code is what it would have been (but of `stream --out -`, whose video
it reads). If stdout cannot be written for another reason, such as a full disk, it is 3.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import torch

from mv2v_engine import Engine, EngineConfig, __version__
from mv2v_engine.camera.drawing import save_drawing
from mv2v_engine.camera.files import resolve_camera
from mv2v_engine.catalogue import describe_models
from mv2v_engine.checkpoints import inspect_checkpoint, render_inspection
from mv2v_engine.checkpoints.inspect import inspect_lora, render_lora
from mv2v_engine.config import EDITS, MEMORY, PICTURE, STEPS, VIEWS, LoadConfig
from mv2v_engine.envs import launched_rank, num_threads
from mv2v_engine.errors import (
    CameraError,
    CancelledError,
    MV2VError,
    RequestError,
    StorageError,
    is_out_of_memory,
)
from mv2v_engine.machine import describe_machine
from mv2v_engine.options import (
    INTERRUPTED,
    PARTIAL,
    REFUSED,
    add_engine,
    add_folder,
    loading,
    read_resolution,
)
from mv2v_engine.parser import Parser, option_names
from mv2v_engine.serving.command import add_serve
from mv2v_engine.serving.store.store_command import add_store
from mv2v_engine.settings import flags, given, in_options
from mv2v_engine.streams import add_stream
from mv2v_engine.synthetic.worlds import Grade
from mv2v_engine.terminal import camera_words, lasting_output, say
from mv2v_engine.turns import add_edit, add_novel_view


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    try:
        with lasting_output():
            return _run(argv)
    except StorageError as error:
        return _said(f"error: {error}", PARTIAL)


def _run(argv: Sequence[str] | None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    try:
        args = parser.parse_args(words, argparse.Namespace(words=words))
        threads = num_threads()
        if threads is not None:
            torch.set_num_threads(threads)
        code: int = args.command(args)
        return code
    except (KeyboardInterrupt, CancelledError):
        return _said("interrupted: finished turns are kept; continue with --resume", INTERRUPTED)
    except MV2VError as error:
        message = in_options(str(error), option_names(parser, words))
        return _said(f"error: {_rank_name()}{message}", REFUSED)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else "the host has none left"
        return _said(
            f"error: {_rank_name()}out of memory: {reason}; use a smaller clip or model", REFUSED
        )


def evaluate(args: argparse.Namespace) -> int:
    """Measure a checkpoint's turns, or edits, on worlds of known geometry, into a folder."""
    # what measuring needs is no part of what the other commands wait for
    from mv2v_engine.evaluation.command import evaluate_checkpoint, task_of

    if (launched_rank() or (0, 1))[1] > 1:
        raise RequestError("evaluate starts its own processes (--jobs); run it without torchrun")
    if args.checkpoint is None:
        args.checkpoint = "tiny-edit" if args.task == "edit" else "tiny-nvs"
    resolution = read_resolution(args)
    config = EngineConfig(**given(args, EngineConfig))
    load = partial(Engine.from_pretrained, args.checkpoint, **loading(args, config))
    task = task_of(resolution.config, args.task, resolution.name)
    evaluate_checkpoint(args, task, resolution.sampling, load)
    return 0


def camera(args: argparse.Namespace) -> int:
    """Print camera paths as a model would be given them, and draw them; tell what looks wrong."""
    sampling = read_resolution(args).sampling
    shown, problems = [], []
    for spec in args.spec:
        try:
            shown.append(resolve_camera(spec, sampling.num_frames, sampling.size))
        except CameraError as error:
            # what can be read is shown all the same, as it is: that is how one sees what is wrong
            shown.append(resolve_camera(spec, None, sampling.size, check=False))
            problems.append(str(error))
    for trajectory in shown:
        print(camera_words(trajectory) + "\n")
    if args.plot is not None:
        name = re.sub(r"[^A-Za-z0-9.-]+", "_", shown[0].name).strip("_")[:60]
        place = args.plot or f"{name}.png"
        save_drawing(place, shown)
        print(place)
    return _said(f"error: {'; '.join(problems)}", REFUSED) if problems else 0


def info(args: argparse.Namespace) -> int:
    """Print versions, devices and backends."""
    print(describe_machine())
    return 0


def models(args: argparse.Namespace) -> int:
    """Print the checkpoints that are known to run, what they take, and how to run them."""
    print(describe_models())
    return 0


def inspect(args: argparse.Namespace) -> int:
    """Print what a checkpoint or a LoRA is and what loading it would do."""
    if (lora := inspect_lora(args.path)) is not None:
        words, problem = render_lora(lora, deep=args.deep)
        print(words)
        return 0 if problem is None else _said(f"error: {problem}", REFUSED)
    inspection = inspect_checkpoint(args.path, args.rename, deep=args.deep, base=args.base)
    options = flags(LoadConfig) | flags(EngineConfig)
    print(in_options(render_inspection(inspection), options))
    if inspection.problem is None:
        return 0
    problem = inspection.problem.removeprefix("no: ")
    return _said(f"error: {in_options(problem, options)}", REFUSED)


def _said(message: str, code: int) -> int:
    say(message)
    return code


def _rank_name() -> str:
    """Which of several processes speaks; rank 0 speaks for all."""
    try:
        rank, _ = launched_rank() or (0, 1)
    except RequestError:
        return ""  # what is wrong with them is what is being said
    return f"rank {rank}: " if rank else ""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mv2v_engine.run", description="Multi-turn video-to-video generation.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_novel_view(commands.add_parser("novel-view", help="re-render a clip from other cameras"))
    add_edit(commands.add_parser("edit", help="edit a long clip by instruction"))
    add_stream(commands.add_parser("stream", help="video without end, by a causal model"))
    _add_camera(commands.add_parser("camera", help="show what a camera or a camera file is"))
    _add_evaluate(commands.add_parser("evaluate", help="measure a checkpoint on known worlds"))
    add_serve(commands.add_parser("serve", help="sessions and turns over HTTP, and a page"))
    add_store(commands.add_parser("store", help="check or repair the store of a service"))
    command = commands.add_parser("info", help="versions, devices, backends")
    command.set_defaults(command=info)
    command = commands.add_parser("models", help="checkpoints known to run, and their cost")
    command.set_defaults(command=models)
    command = commands.add_parser("inspect", help="what a checkpoint is and whether it loads")
    command.add_argument("path", help="a file, a folder, a hub's owner/name or an embedded name")
    command.add_argument(
        "--rename", type=Path, metavar="FILE", help="names that it cannot tell; none if not given"
    )
    command.add_argument(
        "--base",
        metavar="NAME_OR_PATH",
        help="what trained tensors alone lie on; none if not given",
    )
    command.add_argument(
        "--deep", action="store_true", help="read every number and look for NaN and infinity too"
    )
    command.set_defaults(command=inspect)
    return parser


def _add_camera(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=camera, rename=None)
    add = parser.add_argument
    add(
        "spec",
        nargs="+",
        metavar="SPEC",
        help="a preset, moves, or a camera file with options, as novel-view --camera takes it",
    )
    add(
        "--plot",
        nargs="?",
        const="",
        metavar="FILE",
        help="draw the paths from above as FILE.png, named after the first if no FILE follows; "
        "not drawn if not given",
    )
    add(
        "--checkpoint",
        default="tiny-nvs",
        metavar="NAME_OR_PATH",
        help="the model whose frames and size are meant; tiny-nvs if not given",
    )


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=evaluate)
    add = parser.add_argument_group("the protocol").add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where everything is written")
    add(
        "--task",
        choices=("novel-view", "edit"),
        help="the checkpoint's if not given; edit alone takes tiny-edit",
    )
    add(
        "--scenes",
        "--clips",
        dest="scenes",
        type=int,
        metavar="N",
        help="held-out worlds, 40 if not given",
    )
    add("--steps", type=int, metavar="N", help="denoising steps; 10, or --fast's, if not given")
    add("--rows", metavar="A,B", help="methods to compare, all or the main ones if not given")
    add("--quick", action="store_true", help="a few scenes, steps and rows: a check")
    add(
        "--jobs",
        type=int,
        metavar="N",
        help="processes; one for every thread of a CPU, up to 8, if not given",
    )
    add(
        "--grade",
        choices=get_args(Grade),
        help="looks of the worlds; plain for novel views and textured for edits if not given",
    )
    add = parser.add_argument_group("novel views alone").add_argument
    add(
        "--turns",
        type=int,
        choices=(3, 5, 9),
        help="turns of a scene; the fifth of five returns in three ways, the ninth of nine has "
        "eight to choose from; 3 if not given",
    )
    add = parser.add_argument_group("edits alone").add_argument
    add("--windows", type=int, metavar="N", help="windows a clip; 5, and 8 for some, if not given")
    add(
        "--dino",
        metavar="DIR",
        help="measure frame consistency by this DINOv2 too; not if not given",
    )
    add(
        "--clip", metavar="DIR", help="measure frame consistency by this CLIP too; not if not given"
    )
    # what the protocol compares is not to be set
    add_engine(
        parser,
        without=("timesteps", PICTURE, MEMORY, VIEWS, EDITS, STEPS, "batch_tokens"),
        own={
            "checkpoint": {
                "default": None,
                "help": "a file, a folder, a hub's owner/name or an embedded name; tiny-nvs, or "
                "tiny-edit with --task edit, if not given",
            }
        },
    )
    add_folder(parser, "evaluation")


if __name__ == "__main__":
    sys.exit(main())
