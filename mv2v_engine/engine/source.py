"""The source of a session: a file or frames, brought to the model's size.

A novel view takes one window of the clip, which lies in memory; an edit reads the whole video, of
which memory holds one window at a time; a stream takes a block of frames as they come.

h w pixels of the source, T frames of a window.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mv2v_engine import arguments
from mv2v_engine.camera.poses import default_intrinsics, identity_poses, relative_to
from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.checkpoints.load import Checkpoint
from mv2v_engine.config import Alpha, Fit
from mv2v_engine.errors import RequestError, StorageError, VideoError
from mv2v_engine.files import chunks_of
from mv2v_engine.vae import VideoVAE
from mv2v_engine.video.io import VideoReader, open_video
from mv2v_engine.video.live import LiveFrames
from mv2v_engine.video.scan import Check, check_fps, rate_notes
from mv2v_engine.video.sound import Sound
from mv2v_engine.video.stills import frames_of_images
from mv2v_engine.video.transforms import WINDOWS, cover_and_crop, crop_report, select_window
from mv2v_engine.video.windows import EditWindow

# identity of a stream's source that cannot be compared
_AS_THEY_CAME = "frames as they came"


@dataclass(frozen=True, eq=False)
class Source:
    """frames uint8 [T, height, width, 3] of the model's window; `description` says what was cut.

    warnings: in what it is unlike the videos that the weights know, in words.
    """

    frames: Tensor
    fps: float
    description: dict[str, Any]
    warnings: tuple[str, ...] = ()

    # frames of one window have no sound that fits
    sound: ClassVar[None] = None
    __repr__ = arguments.short_repr

    @property
    def num_frames(self) -> int:
        return len(self.frames)

    @property
    def fingerprint(self) -> str:
        """Identity of the pixels, for resuming."""
        return hashlib.sha256(self.frames.numpy().tobytes()).hexdigest()[:16]

    def noting(self, notes: Iterable[str]) -> Source:
        """The same source, with more that was changed of it in its description."""
        told = [*self.description.get("notes", ()), *notes]
        return replace(self, description=self.description | {"notes": told})

    def describe(self) -> dict[str, Any]:
        """What a report says of the source."""
        return self.description

    def close(self) -> None:
        """There is nothing to let go of."""


# what a session's source can be, and a stream's, and the former for errors
AnySource: TypeAlias = (
    "Path | str | bytes | IO[bytes] | Tensor | np.ndarray[Any, Any] | Sequence[Any]"
)
# a frame uint8 [height, width, 3], or several of one size [T, height, width, 3]
SomeFrames: TypeAlias = "Tensor | np.ndarray[Any, Any]"
AnyStreamSource: TypeAlias = (
    "AnySource | LiveFrames | Iterable[SomeFrames] | Callable[[int], Iterable[SomeFrames]]"
)
SOURCES = (
    "a video file (its path, bytes, or the open file), a folder of images, a list of images, or "
    "frames uint8 [frames, height, width, 3]"
)


def load_source(
    source: AnySource,
    *,
    num_frames: int,
    size: tuple[int, int],
    window: str | int | None,
    fps: float | None,
    max_pixels: int,
    own_fps: float = 16.0,
    check: Check | None = None,
    alpha: Alpha = "black",
    fit: Fit = "crop",
) -> Source:
    """Read, window and crop a source.

    Args:
        source: as `opened_source` takes it.
        window: see `video.transforms.select_window`; None needs exactly `num_frames`.
        fps: of the result; None keeps the file's. own_fps: of frames and images, which have none.
        check: called between the packets of a file; what it raises ends the reading.

    Raises:
        VideoError: the file or the frames cannot be used as asked.
    """
    how: dict[str, Any] = {"fps": fps, "own_fps": own_fps, "max_pixels": max_pixels}
    window = window_name(window)
    video, notes = opened_source(source, at_least=2, check=check, alpha=alpha, **how)
    if isinstance(video, VideoReader):
        reader, info, name = video, video.info, video.path.name
        if info.num_frames < 2:
            raise VideoError(f"{name} has 1 frame, at least 2 are needed; give a video")
        chosen = select_window(info.num_frames, num_frames, window)
        crop = crop_report((info.height, info.width), size, fit)
        cropped = reader.read(chosen.indices, size=size, fit=fit, check=check)
        rate, notes = fps or info.fps, (*notes, *rate_notes(info.fps, fps))
    else:
        bare = video
        chosen = select_window(len(bare), num_frames, window)
        indices = torch.tensor(chosen.indices, dtype=torch.int64, device="cpu")
        cropped, crop = cover_and_crop(bare[indices], size, fit)
        rate, name = fps or own_fps, "frames"
    description = {
        "name": name,
        "window": chosen.description,
        "crop": crop.description,
        "fps": rate,
        "notes": list(notes),
    }
    return Source(cropped.contiguous(), rate, description)


def opened_source(
    source: AnySource,
    *,
    at_least: int,
    fps: float | None,
    own_fps: float,
    max_pixels: int,
    check: Check | None,
    alpha: Alpha,
) -> tuple[VideoReader | Tensor, tuple[str, ...]]:
    """A reader of what has to be decoded, else frames uint8 [T, height, width, 3].

    With what is changed of the video, in words.

    Args:
        source: a video file by its path, its bytes or as an open file; a folder of images or their
            pattern; a list of Pillow's images or of arrays; or frames uint8.
        at_least: frames that there must be in memory. fps: of the result. own_fps: of what has
            none.

    Raises:
        VideoError: it is none of these, or cannot be used.
    """
    if fps is not None:
        check_fps("fps", fps)
    if isinstance(source, list | tuple):
        images = frames_of_images(source, alpha)
        if images is None:
            raise arguments.mistaken("source", source, SOURCES, kind=VideoError)
        return bare_frames(images[0], at_least=at_least), images[1]
    if isinstance(source, Tensor | np.ndarray):
        return bare_frames(source, at_least=at_least), ()
    given: Any = source
    options: dict[str, Any] = {"max_pixels": max_pixels, "check": check, "alpha": alpha}
    if not isinstance(given, bytes | bytearray | memoryview) and not hasattr(given, "read"):
        given = arguments.path("source", source, SOURCES, kind=VideoError)
    reader = open_video(given, image_fps=fps or own_fps, **options)
    return reader, reader.notes


def source_warnings(checkpoint: Checkpoint, vae: VideoVAE, frame: Tensor) -> tuple[str, ...]:
    """A sentence if a source is unlike what the weights were trained on, else nothing.

    The embedded checkpoints were trained on procedural worlds alone, and say so in their
    `mv2v.json` (`Knowledge`); weights that say nothing are taken to know everything.

    The statistic is the error of the VAE, which saw the same videos as the transformer: what it
    cannot give back, the transformer cannot draw. Its rate of false alarms is measured by
    `profiling/known_sources.py`.

    Args:
        frame: the first that the model sees, uint8 [height, width, 3].
    """
    least = checkpoint.knowledge.source_psnr
    if least is None:
        return ()
    reached = round_trip_psnr(vae, frame)
    if reached >= least:
        return ()
    return (
        f"this video is unlike those that {checkpoint.name} was trained on: its VAE reproduces the "
        f"first frame at {reached:.1f} dB, and theirs at {least:g} dB or more; expect a blurred "
        "result",
    )


def round_trip_psnr(vae: VideoVAE, frame: Tensor) -> float:
    """PSNR in decibels of one frame, uint8 [height, width, 3], encoded and decoded."""
    again = vae.decode(vae.encode(frame[None]))[0]
    error = (again.to(torch.float64) - frame.to(torch.float64)).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def source_trajectory(
    cameras: CameraTrajectory | None, num_frames: int, size: tuple[int, int]
) -> CameraTrajectory:
    """The source's own path relative to its first frame; a static one if it is unknown."""
    if cameras is None:
        poses, intrinsics = identity_poses(num_frames), default_intrinsics(*size)
        return CameraTrajectory(poses, intrinsics, size, "source")
    cameras = cameras.resized(size)
    return replace(cameras, poses=relative_to(cameras.poses, cameras.poses[0]))


def view_identity(
    source: Source, checkpoint: str, camera: CameraTrajectory | None
) -> dict[str, str]:
    """The part of a session's identity that is known before the weights are loaded."""
    return {
        "source": source.fingerprint,
        "source camera": camera.name if camera else "static",
        "checkpoint": checkpoint,
    }


def bare_frames(source: Tensor | np.ndarray[Any, Any], *, at_least: int) -> Tensor:
    """Frames that a caller has in memory, as uint8 [T, height, width, 3] on the CPU.

    Raises:
        VideoError: another type or shape, or fewer frames than `at_least`.
    """
    is_video = source.ndim == 4 and source.shape[-1] == 3 and min(source.shape) > 0
    if not is_video or source.dtype not in (torch.uint8, np.uint8) or len(source) < at_least:
        raise VideoError(
            f"source frames must be uint8 [frames, height, width, 3] with at least {at_least} "
            f"frame{'s' * (at_least > 1)}, got {arguments.shown(source)}"
        )
    if isinstance(source, Tensor):
        return source.detach().cpu()
    # torch takes no array that is read-only, or runs backwards
    return torch.from_numpy(np.require(source, requirements=["C", "W"]))


def window_name(window: str | int | None) -> str | None:
    """A choice of frames as `select_window` reads it, from a word or the first frame's number.

    Raises:
        RequestError: it is neither.
    """
    if window is None or isinstance(window, str):
        return window
    try:
        return str(arguments.integer("window", window))
    except RequestError:
        expected = f"{', '.join(WINDOWS)}, the number of the frame to start at, or None"
        raise arguments.mistaken("window", window, expected) from None


class LongSource:
    """A video that is read from its beginning to its end, at the model's size.

    A file is decoded as windows are asked for; bare frames lie in memory as they were given.

    Args:
        video: a reader, or frames uint8 [T, h, w, 3].
        size: the model's (height, width).
        name: for reports.

    sound: the file's, if it goes along with the edit. notes: what is changed of the video, in
    words. warnings: in what it is unlike the videos that the weights know.
    """

    def __init__(
        self,
        video: VideoReader | Tensor,
        *,
        fps: float,
        size: tuple[int, int],
        name: str,
        fit: Fit = "crop",
    ) -> None:
        self._video, self.fps, self.size, self.name = video, fps, size, name
        self.fit: Fit = fit
        if isinstance(video, VideoReader):
            self.num_frames = video.info.num_frames
            self.source_size = (video.info.height, video.info.width)
            self.sound, self.notes = _kept_sound(video, fps)
        else:
            self.sound, self.notes = None, ()
            self.num_frames = len(video)
            self.source_size = (video.shape[1], video.shape[2])
        self.warnings: tuple[str, ...] = ()
        self._stream: Iterator[Tensor] | None = None
        self._held: deque[Tensor] = deque()
        self._next = 0  # the frame that the stream gives next; those held come just before

    def frames(self, start: int = 0, check: Check | None = None) -> Iterator[Tensor]:
        """Frames from `start` on as they lie in the source, uint8 [h, w, 3], one by one.

        check: called between packets or frames; what it raises ends the reading.

        Raises:
            VideoError: the file no longer has them all, or a frame of another size.
        """
        if isinstance(self._video, VideoReader):
            yield from self._video.frames(start, check)
            return
        for frame in self._video[start:]:
            if check is not None:
                check()
            yield frame

    def read(self, indices: Sequence[int]) -> Tensor:
        """Some of the frames at the model's size, uint8 [T, height, width, 3].

        Raises:
            VideoError: as `frames`.
        """
        if isinstance(self._video, VideoReader):
            return self._video.read(indices, size=self.size, fit=self.fit)
        return cover_and_crop(self._video[list(indices)], self.size, self.fit)[0]

    def window(self, window: EditWindow, check: Check | None = None) -> Tensor:
        """What the model sees in a window, uint8 [T, height, width, 3] of its own size.

        Windows are asked for in order, or from any of them on; what lies before is let go of.
        check: as in `frames`; a stream that goes on keeps the one that it was begun with.

        Raises:
            VideoError: as `frames`.
        """
        try:
            self._advance(window, check)
        except BaseException:
            self.close()  # a stream that failed is over, and a retry begins a new one
            raise
        first = self._next - len(self._held)
        return torch.stack([self._held[index - first] for index in window.indices])

    def _advance(self, window: EditWindow, check: Check | None) -> None:
        """Hold the window's frames and no others."""
        first = self._next - len(self._held)
        if self._stream is None or not first <= window.start <= self._next:
            self.close()
            self._stream = self.frames(window.start, check)
            self._next = first = window.start
        for _ in range(window.start - first):
            self._held.popleft()
        while self._next < window.stop:
            frame = next(self._stream)
            self._held.append(cover_and_crop(frame[None], self.size, self.fit)[0][0])
            self._next += 1

    def close(self) -> None:
        """Let go of the file and of the frames that are held."""
        self._stream = None
        self._held.clear()

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the video, for resuming.

        Of a file's bytes, not of its pixels: they would all have to be decoded before the first
        window, and the same bytes, changed in the same ways, are the same pixels.
        """
        digest = hashlib.sha256(b"" if self.fit == "crop" else self.fit.encode())
        if isinstance(self._video, VideoReader):
            digest.update("".join(self._video.notes).encode())
            for block in chain.from_iterable(map(chunks_of, self._video.files)):
                digest.update(block)
        else:
            digest.update(str(list(self._video.shape)).encode())
            for frame in self._video:
                digest.update(frame.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """What a report says of the source."""
        return {
            "name": self.name,
            "frames": self.num_frames,
            "fps": self.fps,
            "size": list(self.source_size),
            "crop": crop_report(self.source_size, self.size, self.fit).description,
            "notes": list(self.notes),
        }


def _kept_sound(video: VideoReader, fps: float) -> tuple[Sound | None, tuple[str, ...]]:
    """The sound that goes along with a video's frames at a rate, and the notes with its own."""
    sound, notes = video.sound, (*video.notes, *rate_notes(video.info.fps, fps))
    if sound is None:
        return None, notes
    if not sound.is_copied:
        return None, (*notes, f"its sound ({sound.codec}) cannot be copied to mp4, and is dropped")
    if fps != video.info.fps:
        return None, (*notes, "its sound does not fit another rate, and is dropped")
    return sound, (*notes, f"its sound ({sound.codec}) is copied")


def open_long_source(
    source: AnySource,
    *,
    size: tuple[int, int],
    fps: float | None,
    own_fps: float,
    max_pixels: int,
    check: Check | None = None,
    alpha: Alpha = "black",
    fit: Fit = "crop",
) -> LongSource:
    """Open a video as `opened_source` does; one frame is enough.

    fps: of the result; None keeps the file's. own_fps: of bare frames, which have none.
    check: called between the packets of a file while it is opened; what it raises ends that.

    Raises:
        VideoError: the file or the frames cannot be used as asked.
    """
    how: dict[str, Any] = {"fps": fps, "own_fps": own_fps, "max_pixels": max_pixels}
    video, notes = opened_source(source, at_least=1, check=check, alpha=alpha, **how)
    if isinstance(video, VideoReader):
        return LongSource(
            video, fps=fps or video.info.fps, size=size, name=video.path.name, fit=fit
        )
    frames = LongSource(video, fps=fps or own_fps, size=size, name="frames", fit=fit)
    frames.notes = notes
    return frames


class StreamSource:
    """Frames for one stream that edits: in order, at the model's size, as many as a block takes.

    What can be read again (a file, frames in memory, a function of the first frame's number) is
    opened where it is asked for; what comes once (an iterator, a camera, a pipe) gives what comes
    next.

    fps: of the stream. name: for reports. identity: what a resumed stream must agree with.
    num_resized: how often a frame had another size than the one before it.

    Args:
        opened: the frames from a number on. can_seek: it may be called more than once.
    """

    def __init__(
        self,
        opened: Callable[[int], Iterable[SomeFrames]],
        *,
        size: tuple[int, int],
        fps: float,
        name: str,
        fit: Fit,
        identity: str = _AS_THEY_CAME,
        can_seek: bool = True,
        live: LiveFrames | None = None,
    ) -> None:
        self._open, self._can_seek, self._live = opened, can_seek, live
        self._size, self._fit = size, fit
        self.fps, self.name, self.identity = fps, name, identity
        self._frames: Iterator[SomeFrames] | None = None
        self._position = 0  # the frame that is given next; those held are not given yet
        self._held: list[Tensor] = []
        self._shape: tuple[int, ...] | None = None
        self.num_resized = 0

    def begin(self, first: int) -> None:
        """Say which frame comes next of what comes once."""
        self._position = first

    def take(self, first: int, count: int, check: Check) -> Tensor | None:
        """`count` frames from `first` on, uint8 [T, height, width, 3]; fewer where they end.

        None: there are none. check: called while frames are waited for; what it raises ends that,
        and those that have come are given by the next call.

        Raises:
            VideoError: a frame that is none, or the file no longer has them all.
            StorageError: frames before those that come next, of what comes once.
        """
        if first != self._position and not self._can_seek:
            raise StorageError(
                f"frame {first} of {self.name} is needed again, and it gives each frame once; "
                "begin the stream anew, or give a file"
            )
        if self._frames is None or first != self._position:
            self._held.clear()
            self._frames, self._position = iter(self._open(first)), first
        while len(self._held) < count:
            check()
            some = next(self._frames, None) if self._live is None else self._live.read(check)
            if some is None:
                break
            self._held.extend(self._fitted(some))
        taken, self._held = self._held[:count], self._held[count:]
        self._position += len(taken)
        return torch.stack(taken) if taken else None

    def _fitted(self, some: Any) -> Tensor:
        """Frames at the model's size [T, height, width, 3]."""
        whole = (
            torch.from_numpy(np.require(some, requirements=("C", "W")))
            if isinstance(some, np.ndarray)
            else some
        )
        if isinstance(whole, Tensor) and whole.ndim == 3:
            whole = whole[None]
        if not isinstance(whole, Tensor) or whole.ndim != 4:
            raise arguments.mistaken(
                "a frame of the source",
                some,
                "uint8 [height, width, 3], or several [frames, height, width, 3]",
                kind=VideoError,
            )
        shape = tuple(whole.shape[1:3])
        self.num_resized += self._shape not in (None, shape)
        self._shape = shape
        return cover_and_crop(whole.detach().cpu(), self._size, self._fit)[0]

    def close(self) -> None:
        """Let go of what is read."""
        self._frames = None
        if self._live is not None:
            self._live.close()

    def report(self) -> dict[str, Any]:
        """What a report says of it."""
        live = {} if self._live is None else self._live.report()
        resized = {"size_changes": self.num_resized} if self.num_resized else {}
        return {"name": self.name, "fps": self.fps, **live, **resized}


def open_stream_source(
    source: Any,
    *,
    size: tuple[int, int],
    fps: float | None,
    own_fps: float,
    fit: Fit,
    **reading: Any,
) -> StreamSource:
    """Open what a stream edits.

    source: as `AnyStreamSource`. fps: None keeps its own. reading: as `open_long_source` takes it.

    Raises:
        VideoError: it is none of these, or cannot be read.
    """
    if fps is not None:
        check_fps("fps", fps)
    made = partial(StreamSource, size=size, fit=fit)
    if isinstance(source, LiveFrames):
        rate = fps or source.fps or own_fps
        return made(lambda first: (), fps=rate, name=source.name, can_seek=False, live=source)
    is_function = callable(source) and not isinstance(source, Tensor)
    is_kept = isinstance(source, str | bytes | bytearray | memoryview | list | tuple | Tensor)
    is_once = isinstance(source, Iterable) and not (
        is_kept
        or isinstance(source, np.ndarray)
        or hasattr(source, "read")
        or hasattr(source, "__fspath__")
    )
    if is_function or is_once:
        opened = source if is_function else lambda first: source
        return made(opened, fps=fps or own_fps, name="frames", can_seek=is_function)
    video = open_long_source(source, size=size, fps=fps, own_fps=own_fps, fit=fit, **reading)
    return made(video.frames, fps=video.fps, name=video.name, identity=video.fingerprint)
