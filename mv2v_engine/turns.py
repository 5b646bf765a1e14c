"""The commands that make turns: `run novel-view`, a clip from other cameras, and `run edit`.

What is finished is kept as it comes. A full disk does not end a session of views: this process
holds the only copy of what could not be written, so it goes on and tries again after every turn.
Whatever ends an edit early, an error, a full disk or Ctrl-C, says how many windows are kept and the
command that goes on behind them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from mv2v_engine import Engine, EngineConfig, Session, __version__
from mv2v_engine.camera.files import resolve_camera
from mv2v_engine.checkpoints.resolve import Resolution
from mv2v_engine.config import EDITS, VIEWS
from mv2v_engine.engine.descriptors import check_descriptor
from mv2v_engine.engine.guides import guides_of, open_guides, require_guides
from mv2v_engine.engine.parts import default_memory
from mv2v_engine.engine.request import Request, camera_notes, require_task
from mv2v_engine.engine.results import EditResults, Results, ViewResults
from mv2v_engine.engine.source import load_source, open_long_source, view_identity
from mv2v_engine.errors import CancelledError, MV2VError, StorageError
from mv2v_engine.locks import WriterLock
from mv2v_engine.options import (
    CLIP,
    INTERRUPTED,
    PARTIAL,
    add_engine,
    add_folder,
    add_preview,
    add_turns,
    follows,
    loading,
    parallel_config,
    read_resolution,
    resuming_line,
)
from mv2v_engine.parser import integer, mistaken
from mv2v_engine.progress import CancelToken, driven
from mv2v_engine.settings import given
from mv2v_engine.terminal import (
    can_preview,
    cancel_on_interrupt,
    edit_table,
    say,
    turn_progress,
    turn_table,
)
from mv2v_engine.video.io import VideoReader
from mv2v_engine.video.windows import edit_windows

_ADVICE = "free some space and run the same command with --resume, which makes what is missing"
# rows of the table on the terminal, and cuts on its line; the report has all
_MAX_ROWS, _SHOWN_CUTS = 24, 12
# pixels of a latent cell, where guides are read to be checked alone
_STRIDE = 8


def novel_view(args: argparse.Namespace) -> int:
    """Re-render a clip from every camera in turn, into a session's folder."""
    resolution = read_resolution(args)
    sampling = resolution.sampling
    shared = parallel_config(args, sampling.guidance_scale)
    config = EngineConfig(**given(args, EngineConfig), parallel=shared)
    require_task(resolution.config, resolution.name, edits=False)
    asked = _asked(args, resolution)
    requests = [Request.view(camera, sampling, **asked) for camera in args.camera]
    if follows(args, config):
        return 0
    camera = None
    if args.source_camera is not None:
        size, count = sampling.size, sampling.num_frames
        camera = resolve_camera(args.source_camera, count, size, is_source=True)
    results = ViewResults(args.out)
    results.check_writable()
    source = load_source(
        args.clip,
        num_frames=sampling.num_frames,
        size=sampling.size,
        window=args.window,
        fps=args.fps,
        max_pixels=config.max_source_pixels,
        own_fps=sampling.fps,
        alpha=config.source_alpha,
        fit=config.source_fit,
    )
    lock = results.store.lock()
    with lock:
        resume = args.resume and results.store.exists()
        if resume:
            results.check_resumable(requests, view_identity(source, resolution.name, camera))
        with _loaded(args, config, results, requests, lock, resume=resume) as engine:
            session = engine.session(
                source, cameras=camera, store=args.out, resume=resume, is_locked=True
            )
            try:
                shown = {"is_quiet": args.quiet, "previews": _has_previews(args)}
                failure = _render(session, requests, results, **shown)
            except MV2VError as error:
                # nothing was made, so that the same command can be given again
                if not (resume or session.turns or isinstance(error, CancelledError)):
                    results.clear()
                raise
            return PARTIAL if failure else 0


def edit(args: argparse.Namespace) -> int:
    """Edit a video of any length by one instruction."""
    resolution = read_resolution(args)
    sampling = resolution.sampling
    shared = parallel_config(args, sampling.guidance_scale)
    config = EngineConfig(**given(args, EngineConfig), parallel=shared)
    require_task(resolution.config, resolution.name, edits=True)
    guides: dict[str, Any] = {"references": args.reference, "mask": args.mask}
    given_guides = {name: bool(value) for name, value in guides.items()}
    require_guides(guides_of(resolution.config), resolution.name, **given_guides)
    request = Request.edit(sampling=sampling, **_asked(args, resolution))
    if follows(args, config):
        return 0
    check_descriptor(config)
    results = EditResults(args.out)
    about = VideoReader(args.clip, alpha=config.source_alpha, max_pixels=None).info
    if any(given_guides.values()):
        # what cannot be read is said before weights are
        reading: dict[str, Any] = {"alpha": config.source_alpha}
        reading |= {"max_pixels": config.max_source_pixels}
        how = {"size": sampling.size, "fps": args.fps, "own_fps": sampling.fps, **reading}
        source = open_long_source(args.clip, fit=config.source_fit, **how)
        open_guides(resolution.config, source, **guides, stride=_STRIDE, **reading)
    if args.cuts is not None:
        edit_windows(about.num_frames, sampling.num_frames, cuts=args.cuts)
    results.check_writable(args.clip)
    lock = results.store.lock()
    with lock:
        resume = args.resume and results.store.exists()
        if resume:
            results.check_resumable(request)
        with _loaded(args, config, results, [request], lock, resume=resume) as engine:
            session = engine.session(
                args.clip,
                fps=args.fps,
                cuts=args.cuts,
                **guides,
                store=results.folder,
                resume=resume,
                is_locked=True,
            )
            return _edit(args, session, request, results)


def _asked(args: argparse.Namespace, resolution: Resolution) -> dict[str, Any]:
    """What every request of a command has, but for its camera."""
    return {
        "prompt": args.prompt,
        "seed": args.seed,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "memory": args.memory or default_memory(resolution.config, resolution.initialised),
    }


@contextmanager
def _loaded(
    args: argparse.Namespace,
    config: EngineConfig,
    results: Results,
    requests: Sequence[Request],
    lock: WriterLock,
    *,
    resume: bool,
) -> Iterator[Engine]:
    """The engine, once everything is checked and the place of the results is ready."""
    if args.overwrite:
        results.check_replaceable(args.clip)
    elif not resume:
        results.check_free()
    with Engine.from_pretrained(args.checkpoint, **loading(args, config)) as engine:
        for request in requests:
            engine.check_text(request.prompt, request.guidance_scale)
            if engine.is_editor and engine.text is not None:
                engine.text.require_whole(engine.whole_prompt(request.prompt))
        if resume:
            results.check_settings(engine.turn_settings())
        results.remove_unfinished()
        if args.overwrite:
            results.clear()
            if isinstance(results, EditResults):
                lock.own_folder()
        yield engine


def _render(
    session: Session,
    requests: Sequence[Request],
    results: ViewResults,
    *,
    is_quiet: bool,
    previews: bool,
) -> StorageError | None:
    """Run the requests that the session has not answered; results are complete after each.

    Returns:
        what could not be written in the end; said on stderr.

    Raises:
        CancelledError, KeyboardInterrupt: interrupted; finished turns are kept, or said to be lost.
    """
    done, total = len(session.turns), len(requests)
    failure = None
    for words in session.lost:
        say(words)
    if not is_quiet:
        about = session.source.describe()
        print(f"source {about['name']}: {about['window']}; {about['crop']}")
        for words in about.get("notes", ()):
            print(f"note: {words}")
        for words in session.warnings():
            print(f"warning: {words}")
        for number, request in enumerate(requests, 1):
            assert request.camera is not None
            for words in camera_notes(request.camera, session.parts.transformer.config):
                print(f"note: the camera of turn {number}, {request.camera.name}: {words}")
        if done:
            print(f"resumed after {done} finished turns")
    with cancel_on_interrupt() as cancel, _saying_what_is_lost(session):
        if done:
            failure = _publish(session, results, cancel, is_quiet=is_quiet)
        for number, request in enumerate(requests[done:], done + 1):
            assert request.camera is not None
            title = f"turn {number}/{total} {request.camera.name}"
            shown = turn_progress(title, request.num_inference_steps)
            with nullcontext() if is_quiet else shown as show:
                session.ask(request, show, cancel, previews=previews)
            failure = _publish(session, results, cancel, is_quiet=is_quiet)
    if not is_quiet:
        print("\n" + turn_table([turn.report for turn in session.turns]) + "\n")
        for words in session.turns[-1].report.get("approximations", ()):
            print(f"approximate: {words}")
    written = [*results.videos(session), results.overview, results.report]
    print(*(path for path in written if failure is None or path.exists()), sep="\n")
    if failure is not None:
        say(f"error: {failure}; {_ADVICE}")
    return failure


def _has_previews(args: argparse.Namespace) -> bool:
    """Whether previews were asked for and can be drawn; if not, that is said."""
    if not args.preview:
        return False
    if args.quiet:
        say("note: no preview is drawn: --quiet prints the written paths alone")
        return False
    if not can_preview():
        say(
            "note: no preview is drawn: stderr is no terminal that says that it has 24-bit colours "
            "(COLORTERM=truecolor)"
        )
        return False
    return True


def _publish(
    session: Session, results: ViewResults, cancel: CancelToken, *, is_quiet: bool
) -> StorageError | None:
    """Write the results; returns what could not be, which the next call tries again."""
    try:
        results.publish(session, version=__version__, check=cancel.check)
    except StorageError as error:
        if not is_quiet:
            print(f"not written: {error}", flush=True)
        return error
    return None


@contextmanager
def _saying_what_is_lost(session: Session) -> Iterator[None]:
    """If the block fails, store what the session still holds, or say that it goes."""
    is_through = False
    try:
        yield
        is_through = True
    finally:
        if not is_through:
            try:
                session.store_missing()
            except StorageError as error:
                numbers = ", ".join(str(turn.number) for turn in session.unstored)
                say(f"error: finished turns that are not kept: {numbers}; {error}; {_ADVICE}")


def _edit(
    args: argparse.Namespace, session: Session, request: Request, results: EditResults
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
            events = session.events(request, cancel, out=out, previews=_has_previews(args))
            turn = driven(events, show)
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


def _say_source(session: Session) -> None:
    about, cuts = session.source.describe(), session.cuts
    print(f"source {about['name']}: {about['frames']} frames at {about['fps']:g} a second", end="")
    print(f"; {about['crop']}")
    for words in about["notes"]:
        print(f"note: {words}")
    shots = f"{len(cuts) + 1} shots, cuts at {_listed(cuts)}" if cuts else "one shot"
    print(f"{len(session.windows)} windows of {session.parts.sampling.num_frames} frames, {shots}")
    num_kept = len(session.windows) if session.turns else 0
    num_kept = sum((num_done for _, num_done in session.unfinished), num_kept)
    if num_kept:
        print(f"resumed after {num_kept} finished windows")


def _listed(cuts: Sequence[int]) -> str:
    """The first few of the cuts."""
    more = f" and {len(cuts) - _SHOWN_CUTS} more" if len(cuts) > _SHOWN_CUTS else ""
    return ", ".join(str(cut) for cut in cuts[:_SHOWN_CUTS]) + more


def _cut_off(
    why: str, args: argparse.Namespace, session: Session, results: EditResults, code: int
) -> int:
    kept, total = results.num_kept, len(session.windows)
    say(f"{why}: {kept} of {total} windows are kept; continue with: {resuming_line(args)}")
    return code


def add_novel_view(parser: argparse.ArgumentParser) -> None:
    """The options of `run novel-view`."""
    parser.set_defaults(command=novel_view)
    parser.add_argument("clip", type=Path, help=f"the source: {CLIP}")
    group = parser.add_argument_group("the turns")
    add = group.add_argument
    add(
        "--camera",
        action="append",
        required=True,
        metavar="SPEC",
        help="a preset (pan_right), moves (arc:-40+tilt:5), or a camera file with options "
        "(rig.json#cam03?resample, transforms.json?relative&scale=0.01); one turn for each",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="where everything is written")
    add(
        "--window",
        metavar="W",
        help="first, middle, last, even, pad, or the frame to start at; all if not given",
    )
    add("--source-camera", metavar="SPEC", help="the source's own path; static if not given")
    add("--prompt", default="", metavar="TEXT", help="none if not given")
    add_turns(parser, group)
    add_engine(parser, without=(EDITS, "batch_tokens"))
    add_folder(parser, "session")
    add_preview(parser)


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
    add(
        "--cuts",
        type=_cuts,
        metavar="C",
        help="first frames of the shots but the first, from 0, as 40,85; none: one shot; "
        "auto, if not given: PySceneDetect finds them",
    )
    add(
        "--reference",
        type=Path,
        action="append",
        default=[],
        metavar="IMAGE",
        help="an image that the instruction refers to, for VACE and Bernini-R; several in their "
        "order; none if not given",
    )
    add(
        "--mask",
        type=Path,
        metavar="VIDEO_OR_IMAGE",
        help="what is bright in it is made anew, what is dark stays, for VACE; everything is made "
        "anew if not given",
    )
    add_turns(parser, group)
    add_engine(
        parser,
        without=(VIEWS, "batch_tokens"),
        own={
            "checkpoint": {"default": "tiny-edit"},
            "memory": {"choices": ("retrieved", "none")},
        },
    )
    add_folder(parser, "edit", "FILE.edit")
    add_preview(parser)


def _cuts(text: str) -> tuple[int, ...] | None:
    """First frames of shots; None asks for them to be found."""
    if text in ("auto", "none"):
        return None if text == "auto" else ()
    try:
        return tuple(integer(part) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise mistaken("auto, none or frame numbers as 40,85", text) from None
