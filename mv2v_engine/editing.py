"""`run edit`: one instruction for a long video, window by window, into an mp4 and its folder.

Windows are kept as they finish. Whatever ends an edit early, an error, a full disk or Ctrl-C, says
how many are kept and the command that goes on behind them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from mv2v_engine import Engine, __version__
from mv2v_engine.engine.editing.descriptors import check_descriptor
from mv2v_engine.engine.editing.request import EditRequest, engine_settings
from mv2v_engine.engine.editing.results import EditResults
from mv2v_engine.engine.editing.session import EditSession
from mv2v_engine.engine.engine import default_memory
from mv2v_engine.engine.opening import open_edit_session
from mv2v_engine.engine.request import require_editing
from mv2v_engine.errors import CancelledError, MV2VError
from mv2v_engine.options import (
    CLIP,
    INTERRUPTED,
    PARTIAL,
    add_folder,
    add_memory_bounds,
    add_model,
    add_parallel,
    add_reuse,
    add_sampler,
    add_source,
    engine_config,
    follows,
    loading,
    parallel_config,
    read_resolution,
    resuming_line,
)
from mv2v_engine.parser import integer, mistaken
from mv2v_engine.progress import driven
from mv2v_engine.terminal import cancel_on_interrupt, edit_table, say, turn_progress
from mv2v_engine.video.io import VideoReader
from mv2v_engine.video.windows import edit_windows

# rows of the table on the terminal, and cuts on its line; the report has all
_MAX_ROWS, _SHOWN_CUTS = 24, 12


def edit(args: argparse.Namespace) -> int:
    """Edit a video of any length by one instruction."""
    resolution = read_resolution(args)
    config = engine_config(
        args,
        descriptor=args.descriptor,
        cross_shot_similarity=args.cross_shot_similarity,
        parallel=parallel_config(args, resolution.sampling.guidance_scale),
    )
    require_editing(resolution.config, resolution.name)
    request = EditRequest.of(
        args.prompt,
        resolution.sampling,
        seed=args.seed,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        memory=args.memory or default_memory(resolution.initialised),
    )
    if follows(args, config):
        return 0
    check_descriptor(config)
    results = EditResults(args.out)
    about = VideoReader(args.clip, alpha=config.source_alpha, max_pixels=None).info
    if args.cuts is not None:
        edit_windows(about.num_frames, resolution.sampling.num_frames, cuts=args.cuts)
    results.check_writable(args.clip)
    lock = results.store.lock()
    with lock:
        resume = args.resume and results.store.exists()
        if resume:
            results.check_resumable(request)
        elif args.overwrite:
            results.check_replaceable(args.clip)
        else:
            results.check_free()

        with Engine.from_pretrained(args.checkpoint, **loading(args, config)) as engine:
            engine.check_text(request.prompt, request.guidance_scale)
            if engine.text is not None:
                engine.text.require_whole(request.prompt)
            if resume:
                results.check_settings(engine_settings(engine))
            results.remove_unfinished()
            if args.overwrite:
                results.clear()
                lock.own_folder()
            session = open_edit_session(
                engine,
                args.clip,
                fps=args.fps,
                cuts=args.cuts,
                store=results.folder,
                resume=resume,
                is_locked=True,
            )
            return _finish(args, session, request, results)


def _finish(
    args: argparse.Namespace, session: EditSession, request: EditRequest, results: EditResults
) -> int:
    """Run the windows that are not there yet; returns the exit code."""
    if not args.quiet:
        _say_source(session)
        for words in session.warnings(request.prompt):
            print(f"warning: {words}")
    for words in session.lost:
        say(words)
    out = None if results.has_video() else results.video
    shown = nullcontext() if args.quiet else turn_progress("edit", request.num_inference_steps)
    try:
        with cancel_on_interrupt() as cancel, shown as show:
            turn = driven(session.perform(request, cancel, out=out), show)
        written = results.publish(session, turn, version=__version__)
    except (KeyboardInterrupt, CancelledError):
        return _cut_off("interrupted", args, session, results, INTERRUPTED)
    except MV2VError as error:
        if not results.num_kept:
            results.clear()
            raise
        return _cut_off(f"error: {error}", args, session, results, PARTIAL)
    if not args.quiet:
        rows = turn.report["windows"]
        print("\n" + edit_table(rows[:_MAX_ROWS]))
        if len(rows) > _MAX_ROWS:
            print(f"and {len(rows) - _MAX_ROWS} windows more in {results.report}")
        print()
        for words in turn.report["approximations"]:
            print(f"approximate: {words}")
    print(*written, sep="\n")
    return 0


def _say_source(session: EditSession) -> None:
    about, cuts = session.source.describe(), session.cuts
    print(f"source {about['name']}: {about['frames']} frames at {about['fps']:g} a second", end="")
    print(f"; {about['crop']}")
    for words in about["notes"]:
        print(f"note: {words}")
    shots = f"{len(cuts) + 1} shots, cuts at {_listed(cuts)}" if cuts else "one shot"
    print(f"{len(session.windows)} windows of {session.engine.sampling.num_frames} frames, {shots}")
    num_kept = len(session.windows) if session.turns else 0
    num_kept = sum((num_done for _, num_done in session.unfinished), num_kept)
    if num_kept:
        print(f"resumed after {num_kept} finished windows")


def _listed(cuts: Sequence[int]) -> str:
    """The first few of the cuts."""
    more = f" and {len(cuts) - _SHOWN_CUTS} more" if len(cuts) > _SHOWN_CUTS else ""
    return ", ".join(str(cut) for cut in cuts[:_SHOWN_CUTS]) + more


def _cut_off(
    why: str, args: argparse.Namespace, session: EditSession, results: EditResults, code: int
) -> int:
    kept, total = results.num_kept, len(session.windows)
    say(f"{why}: {kept} of {total} windows are kept; continue with: {resuming_line(args)}")
    return code


def add_edit(parser: argparse.ArgumentParser) -> None:
    """The options of `run edit`."""
    parser.set_defaults(command=edit)
    parser.add_argument("clip", type=Path, help=f"the source, of any length: {CLIP}")
    group = parser.add_argument_group("the edit")
    add = group.add_argument
    add("--prompt", required=True, metavar="TEXT", help="the instruction")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FILE.mp4",
        help="the edited video; FILE.edit beside it keeps windows, overview.png and report.json",
    )
    add_sampler(group, "every window", "a window")
    add_source(group)
    add(
        "--cuts",
        type=_cuts,
        metavar="C",
        help="first frames of the shots but the first, from 0, as 40,85; none: one shot; "
        "auto, if not given: PySceneDetect finds them",
    )
    group = parser.add_argument_group("the memory")
    add = group.add_argument
    add(
        "--memory",
        choices=("retrieved", "none"),
        help="none: every window alone; retrieved if the weights learned to, else none, "
        "if not given",
    )
    add_memory_bounds(group, "windows a window")
    add(
        "--descriptor",
        type=Path,
        metavar="DIR",
        help="a DINOv2 folder of transformers that tells which windows look alike; "
        "pooled latents if not given",
    )
    add(
        "--cross-shot-similarity",
        type=float,
        metavar="S",
        help="cosine from which on windows of other shots are remembered; never if not given",
    )
    add_reuse(parser)
    add_model(parser, "tiny-edit")
    add_parallel(parser)
    add_folder(parser, "edit", "FILE.edit")


def _cuts(text: str) -> tuple[int, ...] | None:
    """First frames of shots; None asks for them to be found."""
    if text in ("auto", "none"):
        return None if text == "auto" else ()
    try:
        return tuple(integer(part) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise mistaken("auto, none or frame numbers as 40,85", text) from None
