"""The source of a session: a file or frames, brought to the model's window and size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mv2v_engine import arguments
from mv2v_engine.camera.poses import default_intrinsics, identity_poses, relative_to
from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.config import Alpha, Fit
from mv2v_engine.errors import CameraError, RequestError, VideoError
from mv2v_engine.video.io import VideoReader, open_video
from mv2v_engine.video.scan import Check, check_fps
from mv2v_engine.video.stills import frames_of_images
from mv2v_engine.video.transforms import WINDOWS, cover_and_crop, crop_report, select_window


@dataclass(frozen=True, eq=False)
class Source:
    """frames uint8 [T, height, width, 3] of the model's window; `description` says what was cut.

    warnings: in what it is unlike the videos that the weights know, in words.
    """

    frames: Tensor
    fps: float
    description: dict[str, Any]
    warnings: tuple[str, ...] = ()

    __repr__ = arguments.short_repr

    @property
    def fingerprint(self) -> str:
        """Identity of the pixels, for resuming."""
        return hashlib.sha256(self.frames.numpy().tobytes()).hexdigest()[:16]

    def noting(self, notes: Iterable[str]) -> Source:
        """The same source, with more that was changed of it in its description."""
        told = [*self.description.get("notes", ()), *notes]
        return replace(self, description=self.description | {"notes": told})


# what a session's source can be, and the same for errors
AnySource: TypeAlias = (
    "Path | str | bytes | IO[bytes] | Tensor | np.ndarray[Any, Any] | Sequence[Any]"
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
    if fps is not None:
        check_fps("fps", fps)
    window = window_name(window)
    video = opened_source(
        source,
        at_least=2,
        max_pixels=max_pixels,
        check=check,
        alpha=alpha,
        image_fps=fps or own_fps,
    )
    notes: tuple[str, ...] = ()
    if isinstance(video, VideoReader):
        reader, info, name = video, video.info, video.path.name
        if info.num_frames < 2:
            raise VideoError(f"{name} has 1 frame, at least 2 are needed; give a video")
        chosen = select_window(info.num_frames, num_frames, window)
        crop = crop_report((info.height, info.width), size, fit)
        cropped = reader.read(chosen.indices, size=size, fit=fit, check=check)
        rate, notes = fps or info.fps, video.notes
        if rate != info.fps:
            notes += (f"its {info.fps:g} frames a second are taken for {rate:g}",)
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
    max_pixels: int,
    check: Check | None,
    alpha: Alpha,
    image_fps: float,
) -> VideoReader | Tensor:
    """A reader of what has to be decoded, else frames uint8 [T, height, width, 3].

    Args:
        source: a video file by its path, its bytes or as an open file; a folder of images or their
            pattern; a list of Pillow's images or of arrays; or frames uint8.
        at_least: frames that there must be in memory. image_fps: of images in files.

    Raises:
        VideoError: it is none of these, or cannot be used.
    """
    if isinstance(source, list | tuple):
        images = frames_of_images(source, alpha)
        if images is None:
            raise arguments.mistaken("source", source, SOURCES, kind=VideoError)
        return bare_frames(images, at_least=at_least)
    if isinstance(source, Tensor | np.ndarray):
        return bare_frames(source, at_least=at_least)
    given: Any = source
    options: dict[str, Any] = {"max_pixels": max_pixels, "check": check, "alpha": alpha}
    if not isinstance(given, bytes | bytearray | memoryview) and not hasattr(given, "read"):
        given = arguments.path("source", source, SOURCES, kind=VideoError)
    return open_video(given, image_fps=image_fps, **options)


def source_trajectory(
    cameras: CameraTrajectory | None, num_frames: int, size: tuple[int, int]
) -> CameraTrajectory:
    """The source's own path relative to its first frame; a static one if it is unknown.

    Raises:
        CameraError: it has not one pose a frame.
    """
    if cameras is None:
        poses, intrinsics = identity_poses(num_frames), default_intrinsics(*size)
        return CameraTrajectory(poses, intrinsics, size, "source")
    if cameras.num_frames != num_frames:
        raise CameraError(
            f"the source's camera has {cameras.num_frames} poses, a window of this model has "
            f"{num_frames} frames: give one pose a frame"
        )
    cameras = cameras.resized(size)
    return replace(cameras, poses=relative_to(cameras.poses, cameras.poses[0]))


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
