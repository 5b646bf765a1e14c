"""A finished turn.

T pixel frames, C latent channels, F H W latent grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.video.io import write_video


@dataclass(frozen=True, eq=False)
class Turn:
    """One edit. `frames` decode on first use, so a resumed session opens without the VAE's work."""

    number: int
    trajectory: CameraTrajectory
    latents: Tensor
    fps: float
    report: dict[str, Any]
    decode: Callable[[Tensor], Tensor] = field(repr=False)

    @cached_property
    def frames(self) -> Tensor:
        """uint8 [T, height, width, 3] on the CPU."""
        return self.decode(self.latents)

    def save(self, path: Path | str) -> None:
        """Write the frames as H.264 mp4, whole or not at all.

        Raises:
            StorageError: the place cannot be written.
        """
        write_video(path, self.frames, self.fps)
