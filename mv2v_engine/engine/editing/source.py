"""The source of a long edit, of which memory holds one window at a time.

h w pixels of the source, T frames of a window.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mv2v_engine.config import Alpha, Fit
from mv2v_engine.engine.source import AnySource, opened_source
from mv2v_engine.video.io import VideoReader
from mv2v_engine.video.scan import Check, check_fps
from mv2v_engine.video.sound import Sound
from mv2v_engine.video.transforms import cover_and_crop, crop_report
from mv2v_engine.video.windows import EditWindow

_BLOCK = 1 << 20


class LongSource:
    """A video that is read from its beginning to its end, at the model's size.

    A file is decoded as windows are asked for; bare frames lie in memory as they were given.

    Args:
        video: a reader, or frames uint8 [T, h, w, 3].
        size: the model's (height, width).
        name: for reports.

    sound: of the file, if it goes along with the edit. notes: what is changed of the video, in
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
            for path in self._video.files:
                with path.open("rb") as file:
                    while block := file.read(_BLOCK):
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
    sound, notes = video.sound, video.notes
    if fps != video.info.fps:
        notes += (f"its {video.info.fps:g} frames a second are taken for {fps:g}",)
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
    if fps is not None:
        check_fps("fps", fps)
    video = opened_source(
        source,
        at_least=1,
        max_pixels=max_pixels,
        check=check,
        alpha=alpha,
        image_fps=fps or own_fps,
    )
    if isinstance(video, VideoReader):
        return LongSource(
            video, fps=fps or video.info.fps, size=size, name=video.path.name, fit=fit
        )
    return LongSource(video, fps=fps or own_fps, size=size, name="frames", fit=fit)
