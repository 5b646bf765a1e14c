"""The command that makes video without end: `run stream`, by a causal model, from a prompt or of a
source as it arrives.

The mp4 grows by a fragment a block and plays while it does. Beside it lies the stream's folder,
from which `--resume` goes on wherever the process was killed: the mp4 is cut off behind the
folder's snapshot, and what follows is written again, with the same bytes. `--out -` writes to
stdout, and a reader who leaves ends the stream. A source is a file, a pipe, or a camera.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from mv2v_engine import Engine, EngineConfig, __version__
from mv2v_engine.config import (
    EDITS,
    MEMORY,
    SAMPLING,
    STEPS,
    VIEWS,
    StreamConfig,
)
from mv2v_engine.engine.stream import (
    Stream,
    StreamBlock,
    check_policy,
    check_source,
    checked_prompt,
    require_causal,
)
from mv2v_engine.engine.stream_folder import StreamFolder
from mv2v_engine.errors import CancelledError, MV2VError, RequestError, StorageError, VideoError
from mv2v_engine.files import require_writable, save_json
from mv2v_engine.options import (
    CLIP,
    INTERRUPTED,
    PARTIAL,
    add_engine,
    add_folder,
    loading,
    read_resolution,
    resuming_line,
)
from mv2v_engine.parser import mistaken, number
from mv2v_engine.progress import CancelToken
from mv2v_engine.settings import add_settings, given
from mv2v_engine.terminal import cancel_on_interrupt, say
from mv2v_engine.video.fragments import (
    FragmentWriter,
    RawWriter,
    append_fragments,
    fragment_ends,
)
from mv2v_engine.video.io import video_path
from mv2v_engine.video.live import is_live, open_live

_STDOUT = "-"
_SAID_SECONDS = 5.0  # between two lines of progress
# the settings of an engine that a stream has no use for
_OF_TURNS = (
    *(SAMPLING, MEMORY, VIEWS, EDITS, STEPS),
    *("batch_tokens", "cache_bytes", "device_cache_bytes", "frames_bytes", "graph_bytes"),
)


def stream(args: argparse.Namespace) -> int:
    """Make video until so many seconds are there, the source ends, or until Ctrl-C."""
    resolution = read_resolution(args)
    own = require_causal(resolution.config, resolution.name, resolution.stream)
    check_source(resolution.config, resolution.name, args.source is not None)
    _check_places(args)
    settings = dataclasses.replace(own, **given(args, StreamConfig))
    check_policy(resolution.config, resolution.name, settings)
    prompts = _prompts(args)
    config = EngineConfig(**given(args, EngineConfig))
    if args.out == _STDOUT:
        return _to_stdout(args, config, settings, prompts)
    video = video_path("--out", args.out)
    store = StreamFolder(args.store or video.with_name(f"{video.stem}.stream"))
    for place in (video.parent, store.folder):
        require_writable(place)
    with store.lock():
        resume = args.resume and store.exists()
        if not (resume or args.overwrite):
            _require_free(store, video)
        with _loaded(args, config, prompts) as engine:
            if args.overwrite:
                store.clear()
                (store.folder / "report.json").unlink(missing_ok=True)
                video.unlink(missing_ok=True)
            options: dict[str, Any] = {"seed": args.seed, "config": settings, "is_locked": True}
            options |= _source(args)
            opened = engine.stream(prompts[0][1], store=store.folder, resume=resume, **options)
            if len(fragment_ends(video)) < opened.num_blocks:
                opened.rewind()  # the mp4 is not what it was, and all of it is there to be made
            made, frames = opened.num_blocks, opened.num_frames
            with (
                opened,
                append_fragments(
                    video, opened.fps, num_fragments=made, num_frames=frames
                ) as writer,
            ):
                try:
                    code = _run(args, opened, prompts, writer)
                except MV2VError:
                    # nothing was made, so that the same command can be given again
                    if not (resume or opened.num_blocks):
                        store.clear()
                        video.unlink(missing_ok=True)
                    raise
    if code == 0:
        print(video, store.folder / "report.json", sep="\n")
    return code


def _to_stdout(
    args: argparse.Namespace,
    config: EngineConfig,
    settings: StreamConfig,
    prompts: list[tuple[float, str]],
) -> int:
    """The same into a pipe, which gets the new blocks alone; --store keeps them all."""
    args.quiet = True  # stdout has the video
    if args.store is None and (args.resume or args.overwrite):
        raise RequestError("--out - keeps nothing to go on from; name a folder with --store")
    store = None if args.store is None else StreamFolder(args.store)
    resume = store is not None and args.resume and store.exists()
    with _loaded(args, config, prompts) as engine:
        if store is not None and args.overwrite:
            store.clear()
        options: dict[str, Any] = {"seed": args.seed, "config": settings, **_source(args)}
        with engine.stream(prompts[0][1], store=args.store, resume=resume, **options) as opened:
            stdout, (height, width) = os.fdopen(os.dup(1), "wb"), engine.sampling.size
            if args.raw:
                say(f"raw frames: rgb24, {width}x{height}, {opened.fps:g} a second")
            writer = RawWriter(stdout) if args.raw else FragmentWriter(stdout, opened.fps)
            with writer:
                return _run(args, opened, prompts, writer)


def _check_places(args: argparse.Namespace) -> None:
    """Refuse what can be refused of the source and of the output before anything is loaded.

    Raises:
        RequestError, VideoError: they cannot be what is asked for.
    """
    if args.raw and args.out != _STDOUT:
        raise RequestError("--raw writes frames into a pipe; give --out -")
    if args.source is None and (args.source_size or args.fps):
        raise RequestError("--source-size and --fps are of a source, and there is none")
    if args.source == _STDOUT and sys.stdin is None:
        raise VideoError("stdin is closed; give a pipe, or a video file")
    # what was closed before the program began has been replaced by now, but for this name
    if args.out == _STDOUT and sys.__stdout__ is None:
        raise StorageError(
            "--out - writes to stdout, and it is closed; give it a pipe or a file, or name --out"
        )
    # a pattern of images is no path itself
    is_path = args.source not in (None, _STDOUT) and "%" not in args.source
    if is_path and not Path(args.source).exists():
        raise VideoError(
            f"{args.source} does not exist; give {CLIP}, - for stdin, or a camera as /dev/video0"
        )


def _source(args: argparse.Namespace) -> dict[str, Any]:
    """What is edited, as `Engine.stream` takes it."""
    if args.source is None:
        return {}
    place: Any = sys.stdin.buffer if args.source == _STDOUT else args.source
    if args.source == _STDOUT or args.source_size or is_live(args.source):
        alpha, size = args.source_alpha, args.source_size
        pixels = args.max_source_pixels
        place = open_live(place, raw_size=size, fps=args.fps, alpha=alpha, max_pixels=pixels)
    return {"source": place, "fps": args.fps}


def _loaded(
    args: argparse.Namespace, config: EngineConfig, prompts: list[tuple[float, str]]
) -> Engine:
    """The engine, once all prompts are known to be read to their ends."""
    engine = Engine.from_pretrained(args.checkpoint, **loading(args, config), causal=args.causal)
    for second, prompt in prompts:
        try:
            checked_prompt(engine, prompt)
        except RequestError as error:
            if not second:
                raise
            raise RequestError(f"--then {second:g}: {error}") from error
    return engine


def _run(
    args: argparse.Namespace,
    opened: Stream,
    prompts: list[tuple[float, str]],
    writer: RawWriter,
) -> int:
    """Write blocks until there are enough; the exit code.

    Raises:
        RequestError: all blocks were there, and the last one was made for another prompt.
    """
    for words in opened.lost:
        say(words)
    fps, shown, why, code = opened.fps, _Progress(args.quiet), "", 0
    said, stored = 0, 0 if opened.folder is None else opened.folder.num_blocks
    count = None
    if args.seconds is not None:
        count = opened.block_of(math.ceil(args.seconds * fps) - 1)
    try:
        with cancel_on_interrupt() as cancel:
            while count is None or opened.num_blocks < count:
                prompt = _prompt_of(prompts, opened, opened.num_blocks + 1)
                if prompt != opened.prompt:
                    opened.prompt = prompt
                is_made = _write_block(args, opened, writer, cancel, shown)
                for words in opened.warnings[said:]:
                    say(f"warning: {words}")
                said = len(opened.warnings)
                if not is_made:
                    break
    except (KeyboardInterrupt, CancelledError):
        why, code = "interrupted", INTERRUPTED
    except BrokenPipeError:
        why = "the reader has left"
    except MV2VError as error:
        if not opened.num_blocks:
            raise
        why, code = f"error: {error}", PARTIAL
    if opened.folder is not None:
        if not why and 0 < stored == opened.num_blocks:
            _require_heard(prompts, opened)
        try:
            report = {"version": __version__, **opened.report()}
            save_json(opened.folder.folder / "report.json", report)
        except StorageError as error:
            why, code = why or f"error: {error}", code or PARTIAL
    if why:
        kept = "" if opened.folder is None else f"; continue with: {resuming_line(args)}"
        say(f"{why}: {opened.num_blocks} blocks are finished{kept}")
    return code


def _prompt_of(prompts: list[tuple[float, str]], opened: Stream, number: int) -> str:
    """What a block is asked for."""
    begins = opened.first_frame(number) / opened.fps
    return [words for second, words in prompts if second <= begins][-1]


def _require_heard(prompts: list[tuple[float, str]], opened: Stream) -> None:
    """Refuse a prompt that comes when nothing is left to make.

    Raises:
        RequestError: the last block was made for another one.
    """
    assert opened.folder is not None
    asked, number = _prompt_of(prompts, opened, opened.num_blocks), opened.num_blocks
    made = opened.folder.read_block(number).prompt
    if asked != made:
        raise RequestError(
            f"the stream is finished, and its last block was made for {made!r}, so the prompt "
            f"{asked!r} changes nothing; replace the stream with --overwrite, choose another "
            "--out, or give more --seconds"
        )


def _write_block(
    args: argparse.Namespace,
    opened: Stream,
    writer: RawWriter,
    cancel: CancelToken,
    shown: _Progress,
) -> bool:
    """Make the next block and write its frames, unless a pipe's reader had them before.

    False: the source has ended, and there is none.
    """
    is_made = False
    for block in opened.blocks(opened.num_blocks + 1, cancel):
        is_made = True
        if args.out == _STDOUT and block.is_again:
            writer.num_frames = block.first_frame + len(block.frames)
            continue
        try:
            writer.add(block.frames)
        except BrokenPipeError:
            raise
        except OSError as error:
            reason = error.strerror or str(error)
            raise StorageError(f"cannot write {args.out}: {reason}; free some space") from error
        shown.show(block, opened)
    return is_made


class _Progress:
    """A line every few seconds."""

    def __init__(self, is_quiet: bool) -> None:
        self._is_quiet, self._said = is_quiet, time.monotonic()

    def show(self, block: StreamBlock, opened: Stream) -> None:
        now = time.monotonic()
        if self._is_quiet or now - self._said < _SAID_SECONDS:
            return
        self._said = now
        seconds = (block.first_frame + len(block.frames)) / opened.fps
        rate = len(block.frames) / block.seconds
        again = " again" if block.is_again else ""
        words = f"{seconds:.1f} seconds of video, {rate:.1f} frames a second"
        print(f"block {block.number}{again}: {words}", flush=True)


def _prompts(args: argparse.Namespace) -> list[tuple[float, str]]:
    """The second from which on each prompt holds, in order."""
    found = [(0.0, args.prompt)]
    for text, prompt in args.then or ():
        try:
            second = number(text)
        except argparse.ArgumentTypeError as error:
            raise RequestError(f"--then: the second {error}") from error
        if second <= found[-1][0]:
            raise RequestError(
                f"--then takes prompts in their order, each from a later second; got {second:g} "
                f"after {found[-1][0]:g}"
            )
        found.append((second, prompt))
    return found


def _require_free(store: StreamFolder, video: Path) -> None:
    """Refuse places that hold something.

    Raises:
        StorageError: they do.
    """
    advice = "continue it with --resume, replace it with --overwrite, or choose another --out"
    if store.exists():
        raise StorageError(f"{store.folder} already holds a stream; {advice}")
    if video.exists():
        raise StorageError(
            f"{video} exists and belongs to no stream; replace it with --overwrite, or choose "
            "another --out"
        )


def _seconds(text: str) -> float:
    seconds = number(text)
    if seconds <= 0:
        raise mistaken("more than 0 seconds", text)
    return seconds


def _size(text: str) -> tuple[int, int]:
    """Rows and columns."""
    width, mark, height = text.lower().partition("x")
    if not (mark and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise mistaken("WIDTHxHEIGHT, as 832x480", text)
    return int(height), int(width)


def add_stream(parser: argparse.ArgumentParser) -> None:
    """The options of `run stream`."""
    parser.set_defaults(command=stream)
    parser.add_argument(
        "source",
        nargs="?",
        help="what a model that edits is given: a video as run edit takes one, a pipe (- is "
        "stdin), or a camera as /dev/video0; none for a model that makes video from a prompt",
    )
    add = parser.add_argument_group("the stream").add_argument
    add(
        "--prompt",
        required=True,
        metavar="TEXT",
        help="what the video shows, or what becomes of the source",
    )
    add(
        "--then",
        nargs=2,
        action="append",
        metavar=("SECOND", "TEXT"),
        help="another prompt from this second on, any number of times; one for all if not given",
    )
    add(
        "--out",
        required=True,
        metavar="FILE.mp4",
        help="the video, which plays while it grows; FILE.stream beside it keeps the stream and "
        "report.json; - is stdout",
    )
    add(
        "--store",
        type=Path,
        metavar="DIR",
        help="where the stream is kept; FILE.stream, of stdout nowhere, if not given",
    )
    add(
        "--seconds",
        type=_seconds,
        metavar="N",
        help="seconds of video, rounded up to a whole block; without end if not given",
    )
    add("--raw", action="store_true", help="frames of red, green and blue bytes to stdout, no mp4")
    add(
        "--source-size",
        type=_size,
        metavar="WIDTHxHEIGHT",
        help="the source is frames of so many pixels of red, green and blue bytes; if not given, "
        "it is an encoded video",
    )
    add(
        "--fps",
        type=float,
        metavar="R",
        help="rate of the source; its own, the checkpoint's of raw frames, if not given",
    )
    add("--seed", type=int, default=0, metavar="N", help="the noise's seed")
    add(
        "--causal",
        action="store_true",
        help="the checkpoint makes frames block by block, as no "
        "weight of Self-Forcing, LongLive, CausVid or a causal Lucy-Edit tells",
    )
    add_settings(parser, StreamConfig, has_defaults=False)
    add_engine(parser, without=_OF_TURNS, own={"checkpoint": {"default": "tiny-stream"}})
    add_folder(parser, "stream", "FILE.stream")
