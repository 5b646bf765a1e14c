"""A finished turn.

T pixel frames, C latent channels, F H W latent grid, W windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from mv2v_engine.arguments import shown
from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.engine.footage import Footage
from mv2v_engine.video.io import video_writer
from mv2v_engine.video.sound import Sound


class Video(Protocol):
    """Where a turn's latents and frames come from."""

    def latents(self) -> Tensor: ...
    def frames(self) -> Tensor: ...
    def parts(self) -> Iterator[Tensor]:
        """The frames in order, in as many pieces as are worth holding at once."""


@dataclass(frozen=True, eq=False)
class Turn:
    """One edit of a session's source.

    trajectory: the camera that filmed it; None for an edit, which keeps the source's.
    footage: the video, of which memory holds no more than it must.
    report: what was asked, remembered and spent. sound: of the source, if the video has its frames
        and rate.
    """

    number: int
    trajectory: CameraTrajectory | None
    footage: Video = field(repr=False)
    fps: float
    report: dict[str, Any]
    sound: Sound | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        asked = ("camera", "prompt", "seed", "num_inference_steps", "guidance_scale")
        values = {
            name: self.report[name] for name in asked if self.report.get(name) not in (None, "")
        }
        said = "".join(f", {name}={shown(value)}" for name, value in values.items())
        return f"{type(self).__name__}(number={self.number}{said}, fps={self.fps:g})"

    @property
    def latents(self) -> Tensor:
        """float32 on the CPU: [C, F, H, W], of an edit in windows [W, C, F, H, W].

        Raises:
            StorageError: the session's folder no longer has them.
        """
        return self.footage.latents()

    @property
    def frames(self) -> Tensor:
        """uint8 [T, height, width, 3] on the CPU, the whole video.

        Raises:
            StorageError: as `latents`.
        """
        return self.footage.frames()

    def save(self, path: Path | str) -> None:
        """Write the frames as H.264 mp4, whole or not at all.

        An edit is decoded window by window, so that it is never in memory whole.

        Raises:
            RequestError: the path is no path, or names no .mp4 file.
            StorageError: the place cannot be written, or as `latents`.
        """
        with video_writer(path, self.fps, sound=self.sound) as writer:
            for frames in self.footage.parts():
                writer.add(frames)


@dataclass(frozen=True, eq=False)
class ViewTurn(Turn):
    """A turn from another camera.

    footage: `latents` are read from the session's folder if it has one, `frames` are decoded again
        if they were let go of (`EngineConfig.frames_bytes`), to the same bits. Keep the tensor to
        have it at hand.
    report: has a `storage_error` while the session's folder lacks the turn; `lost` says why a
        resumed one can no longer be read: its latents and frames raise StorageError then.
    """

    trajectory: CameraTrajectory
    footage: Footage = field(repr=False)
    __repr__ = Turn.__repr__
