"""A finished turn.

T pixel frames, C latent channels, F H W latent grid.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.engine.footage import Footage
from mv2v_engine.video.io import write_video


@dataclass(frozen=True, eq=False)
class Turn:
    """One edit.

    footage: the video, of which memory holds no more than it must: `latents` are read from the
        session's folder if it has one, `frames` are decoded again if they were let go of
        (`EngineConfig.frames_bytes`), to the same bits. Keep the tensor to have it at hand.
    report: what was asked, remembered and spent; `storage_error` while the session's folder lacks
        the turn.
    """

    number: int
    trajectory: CameraTrajectory
    footage: Footage = field(repr=False)
    fps: float
    report: dict[str, Any]

    @property
    def latents(self) -> Tensor:
        """float32 [C, F, H, W] on the CPU.

        Raises:
            StorageError: the session's folder no longer has them.
        """
        return self.footage.latents()

    @property
    def frames(self) -> Tensor:
        """uint8 [T, height, width, 3] on the CPU.

        Raises:
            StorageError: as `latents`.
        """
        return self.footage.frames()

    def save(self, path: Path | str) -> None:
        """Write the frames as H.264 mp4, whole or not at all.

        Raises:
            StorageError: the place cannot be written.
        """
        write_video(path, self.frames, self.fps)
