"""What the command line shows, and Ctrl-C.

Bars and lines are adapters over progress events, tables over the reports of what is finished.
"""

from __future__ import annotations

import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mv2v_engine.camera.poses import rotation_degrees
from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.envs import has_true_colours, is_ci, launched_rank
from mv2v_engine.errors import StorageError
from mv2v_engine.progress import (
    CancelToken,
    Event,
    Preview,
    StageStarted,
    StepDone,
    WindowDone,
    WindowStarted,
)
from mv2v_engine.video.contact_sheet import spaced_frames

# torchrun passes a Ctrl-C on which its processes have from the terminal already
ECHO_SECONDS = 3.0
_STAGES = ("vae", "text", "memory", "sampling")
_POSES_SHOWN = 9  # poses of a camera, at most
_PREVIEW_COLUMNS = 72  # characters, at most
# characters a pixel of the picture, at most: to send more costs a small model's step
_PREVIEW_SCALE = 2
_LEAST_COLUMNS, _LEAST_LINES = 16, 6  # size of a terminal that has room for a picture
_NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)?")
_UNITS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"))


@contextmanager
def turn_progress(title: str, num_steps: int) -> Iterator[Callable[[Event], None]]:
    """A function to give a turn's events to: a bar on a terminal, plain lines elsewhere.

    Previews are drawn below the bar, each over the last, and gone at the end.

    num_steps: of a turn, of an edit in windows those of one window; the bar runs over all of them.
    """
    if not sys.stderr.isatty() or is_ci():
        yield _Lines(title).show
        return
    layout = "{desc} |{bar}| {n_fmt}/{total_fmt}{postfix}"
    with tqdm(total=num_steps, bar_format=layout, desc=title, dynamic_ncols=True) as bar:
        shown = _Bar(bar, title, num_steps)
        try:
            yield shown.show
        finally:
            shown.erase()
        bar.set_description_str(f"{title}  done")
        bar.set_postfix_str("")


def can_preview() -> bool:
    """Whether previews can be drawn on stderr: a terminal that says that it has 24-bit colours."""
    return sys.stderr.isatty() and not is_ci() and has_true_colours()


def blocks(picture: Tensor, columns: int, lines: int) -> list[str]:
    """A picture uint8 [H, W, 3] in lines of coloured half blocks, up to twice as large if it fits.

    columns, lines: the room. A character is twice as high as it is wide, so it shows two pixels,
    one above the other.
    """
    height, width = picture.shape[:2]
    scale = min(columns / width, 2 * lines / height, _PREVIEW_SCALE)
    size = (max(round(scale * height / 2), 1) * 2, max(round(scale * width), 1))
    pixels = picture.permute(2, 0, 1)[None].float()
    scaled = F.interpolate(pixels, size, mode="bilinear", antialias=True)[0]
    rows = scaled.round().to(torch.uint8).permute(1, 2, 0)
    cells = torch.cat((rows[::2], rows[1::2]), -1).flatten(1).tolist()
    # a line at once: its characters one by one take longer than all the rest of a preview
    line = "\x1b[38;2;%d;%d;%dm\x1b[48;2;%d;%d;%dm\u2580" * size[1] + "\x1b[0m"
    return [line % tuple(colours) for colours in cells]


class _Bar:
    """The bar of a turn, or of all the windows of an edit."""

    def __init__(self, bar: Any, title: str, num_steps: int) -> None:
        self._bar, self._title, self._num_steps = bar, title, num_steps
        self._before, self._place = 0, ""
        self._began: tuple[float, int] | None = None  # when an edit began, and behind which step
        self._has_drawn = False

    def show(self, event: Event) -> None:
        bar = self._bar
        if isinstance(event, WindowStarted):
            self._before = (event.number - 1) * self._num_steps
            self._began = self._began or (time.monotonic(), self._before)
            self._place = f"window {event.number}/{event.total}  "
            bar.total = event.total * self._num_steps
            bar.update(self._before - bar.n)
        elif isinstance(event, WindowDone):
            bar.set_postfix_str(f"{clock(event.seconds_left)} left")
        elif isinstance(event, StageStarted):
            bar.set_description_str(f"{self._title}  {self._place}{event.stage}")
        elif isinstance(event, StepDone):
            done, left = self._before + event.step, event.seconds_left
            if self._began is not None:  # the event's is of the window alone
                began, first = self._began
                left = (time.monotonic() - began) / (done - first) * (bar.total - done)
            bar.set_postfix_str(f"{clock(left)} left", refresh=False)
            bar.update(done - bar.n)
        elif isinstance(event, Preview):
            self._draw(event.picture)

    def _draw(self, picture: Tensor) -> None:
        """Below the bar; the cursor is back on the bar's line before anybody else writes."""
        columns, lines = os.get_terminal_size(sys.stderr.fileno())
        if columns < _LEAST_COLUMNS or lines < _LEAST_LINES:
            return  # a terminal that does not say its size has none
        # a full last column wraps in some terminals; the bar and the line after it stay
        drawn = blocks(picture, min(columns - 1, _PREVIEW_COLUMNS), lines - 2)
        self._has_drawn = True
        below = "".join(f"\r\n{line}\x1b[K" for line in drawn)
        self._write(f"{below}\x1b[{len(drawn)}A\r")

    def erase(self) -> None:
        """Take the last preview away."""
        if self._has_drawn:
            self._write("\r\n\x1b[J\x1b[A")

    def _write(self, text: str) -> None:
        with self._bar.get_lock():
            self._bar.fp.write(text)
            self._bar.fp.flush()


class _Lines:
    """A line a stage and at most ten for the steps; of an edit, a line a window."""

    def __init__(self, title: str) -> None:
        self._title, self._is_edit = title, False

    def show(self, event: Event) -> None:
        if isinstance(event, WindowStarted):
            self._is_edit = True
        elif isinstance(event, WindowDone):
            left = clock(event.seconds_left)
            self._print(f"window {event.number}/{event.total}, {left} left")
        elif self._is_edit:
            return
        elif isinstance(event, StageStarted):
            self._print(event.stage)
        elif isinstance(event, StepDone):
            before, now = (10 * step // event.total for step in (event.step - 1, event.step))
            if now > before:
                left = clock(event.seconds_left)
                self._print(f"{event.stage} {event.step}/{event.total}, {left} left")

    def _print(self, words: str) -> None:
        print(f"{self._title}  {words}", flush=True)


@contextmanager
def cancel_on_interrupt() -> Iterator[CancelToken]:
    """A token that Ctrl-C sets; a second Ctrl-C interrupts at once, under torchrun unless it comes
    within `ECHO_SECONDS`."""
    token, patience = CancelToken(), 0.0 if launched_rank() is None else ECHO_SECONDS
    pressed: list[float] = []
    if threading.current_thread() is not threading.main_thread():
        yield token
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        pressed.append(time.monotonic())
        if len(pressed) > 1 and pressed[-1] - pressed[0] >= patience:
            raise KeyboardInterrupt
        token.cancel()

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield token
    finally:
        signal.signal(signal.SIGINT, previous)


class _Lasting:
    """A text stream whose reader may leave: what is written after that goes nowhere.

    failure: why something was not written, if it was not the reader who left.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.failure = stream, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._tried(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._tried(self._stream.flush)

    def _tried(self, work: Callable[[], object]) -> None:
        try:
            work()
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.failure = error.strerror or str(error)
            # what the stream still holds goes there too, at the latest when the process ends
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Let the block go on when whoever read stdout or stderr has left, as `| head -1` does.

    Raises:
        StorageError: at its end, if stdout lacks something that its reader waits for.
    """
    for number in range(3):
        # a file would else be opened under the number, and written to by whoever prints
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    streams = [_Lasting(stream or open(os.devnull, "w")) for stream in before]  # noqa: SIM115
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in streams)
    try:
        yield
    finally:
        for stream in streams:
            stream.flush()
        sys.stdout, sys.stderr = before
    if streams[0].failure:
        raise StorageError(f"stdout is not complete: {streams[0].failure}; files are written")


def say(message: str) -> None:
    """One line on stderr, whatever the message holds."""
    # in one write, newline and all: processes that share a terminal do not share its lines
    sys.stderr.write(" ".join(message.split()) + "\n")


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns; those that hold only numbers to the right."""
    columns = list(zip(headers, *rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    # a number, or what stands for none
    right = [all(_NUMBER.fullmatch(cell) for cell in column[1:]) for column in columns]
    lines = []
    for row in (headers, *rows):
        cells = zip(row, widths, right, strict=True)
        line = "  ".join(c.rjust(w) if is_right else c.ljust(w) for c, w, is_right in cells)
        lines.append(line.rstrip())
    return "\n".join(lines)


def camera_words(trajectory: CameraTrajectory) -> str:
    """A camera's path: what was changed of it, its lens, how far it goes, and some of its poses."""
    poses, (height, width) = trajectory.poses.double(), trajectory.size
    lens = trajectory.intrinsics.reshape(-1, 3, 3)[0]
    across, down = (
        math.degrees(2 * math.atan(pixels / (2 * float(lens[axis, axis]))))
        for axis, pixels in enumerate((width, height))
    )
    places = poses[..., 3]
    length = float((places[1:] - places[:-1]).norm(dim=-1).sum())
    reach = float((places - places[0]).norm(dim=-1).max())
    turned = float(rotation_degrees(poses[0, :, :3].T @ poses[:, :, :3]).max())
    lines = [
        f"{trajectory.name}: {trajectory.num_frames} frames",
        *(f"note: {words}" for words in trajectory.notes),
        f"lens: {float(lens[0, 0]) / width:.3g} of the image's width, {across:.1f} degrees across "
        f"and {down:.1f} down",
        f"path: {length:.3g} metres long, up to {reach:.3g} metres and {turned:.3g} degrees from "
        "its first pose",
    ]
    rows = []
    for frame in spaced_frames(trajectory.num_frames, _POSES_SHOWN):
        pose = poses[frame]
        yaw = math.atan2(float(pose[0, 2]), float(pose[2, 2]))
        pitch = math.asin(max(-1.0, min(1.0, -float(pose[1, 2]))))
        roll = math.atan2(float(pose[1, 0]), float(pose[1, 1]))
        degrees = [math.degrees(angle) for angle in (yaw, pitch, roll)]
        # no -0.0
        rows.append([str(frame), *(f"{value + 0.0:.2f}" for value in pose[:, 3].tolist())])
        rows[-1] += [f"{round(value, 1) + 0.0:.1f}" for value in degrees]
    headers = ["frame", "right m", "down m", "forward m", "yaw right", "pitch up", "roll"]
    return "\n".join([*lines, table(headers, rows)])


def turn_table(reports: Sequence[dict[str, Any]]) -> str:
    """One row a turn: what it remembered, tokens by kind, merged frames, work, seconds by stage."""
    names = [[str(report["turn"]), report["camera"]] for report in reports]
    kinds = ("target", "source", "memory")
    return _run_table(reports, ["turn", "camera"], names, kinds=kinds, stages=_STAGES)


def edit_table(reports: Sequence[dict[str, Any]]) -> str:
    """A table with one row for each window of an edit, laid out as `turn_table` is."""
    names = []
    for report in reports:
        first, stop = report["new_frames"]
        names.append([str(report["window"]), str(report["shot"]), f"{first}-{stop - 1}"])
    headers, kinds = ["window", "shot", "frames"], ("target", "memory")
    return _run_table(reports, headers, names, kinds=kinds, stages=("video", *_STAGES))


def _run_table(
    reports: Sequence[dict[str, Any]],
    headers: list[str],
    names: Sequence[list[str]],
    *,
    kinds: Sequence[str],
    stages: Sequence[str],
) -> str:
    """A row a run of the model. headers, names: the columns that tell which it is."""
    blocks = sorted({merge["block"] for report in reports for merge in report["merged_frames"]})
    most = max(report["flops"] for report in reports)
    scale, unit = next(((s, u) for s, u in _UNITS if most >= s), _UNITS[-1])
    headers = [*headers, "retrieved (score)", *kinds]
    headers += [f"merged at {block}" for block in blocks]
    reusing = any("reuse" in report for report in reports)
    headers += ["steps computed", "conditioning computed"] if reusing else []
    headers += [unit, *(f"{stage} s" for stage in stages)]
    rows = []
    for report, name in zip(reports, names, strict=True):
        merged = {
            merge["block"]: sum(map(len, merge["frames"].values()))
            for merge in report["merged_frames"]
        }
        work = report["flops"] / scale
        tokens = report["plan"]["tokens_by_kind"]
        rows.append(
            [
                *name,
                _retrieved(report["memory"]),
                *(str(tokens.get(kind, 0)) for kind in kinds),
                *(str(merged.get(block, 0)) for block in blocks),
                *(_reused(report) if reusing else []),
                # three digits, more only before the point
                f"{work:.0f}" if work >= 100 else f"{work:.3g}",
                *(f"{report['seconds'].get(stage, 0):.2f}" for stage in stages),
            ]
        )
    return table(headers, rows)


def _reused(report: dict[str, Any]) -> list[str]:
    """Steps that ran the blocks, and those that ran them over the conditioning too."""
    total = report["num_inference_steps"]
    computed = len(report.get("reuse", {}).get("steps_computed", range(total)))
    whole = 1 if report["plan"]["conditioning"] == "static" else computed
    return [f"{computed} of {total}", f"{whole} of {total}"]


def _retrieved(memory: dict[str, Any]) -> str:
    rows = [f"{row['turn']} ({row['score']:.2f})" for row in memory["retrieved"]]
    lost = f"; unreadable: {', '.join(memory['lost'])}" if memory.get("lost") else ""
    return (", ".join(rows) or f"none: {memory['reason']}") + lost
