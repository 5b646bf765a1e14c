"""One finished video as memory keeps it: latents, the camera that filmed it, and who encoded it.

C channels, F latent frames, H W latent rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.errors import RequestError


@dataclass(frozen=True, eq=False)
class MemoryEntry:
    """A finished turn's video.

    Args:
        id: unique within a cache.
        turn: number of the turn that made it; later turns win ties of relevance.
        latents: [C, F, H, W], normalised.
        trajectory: poses in the session's one world, the source's first camera.
        key: which VAE the latents belong to; latents of another VAE mean nothing to a model.

    Raises:
        RequestError: latents of another rank.
    """

    id: str
    turn: int
    latents: Tensor
    trajectory: CameraTrajectory
    key: str

    def __post_init__(self) -> None:
        if self.latents.ndim != 4:
            raise RequestError(
                f"memory {self.id!r}: latents must have shape [C, F, H, W], "
                f"got {list(self.latents.shape)}; pass one video, not a batch"
            )

    @property
    def num_bytes(self) -> int:
        """Bytes of the latents, what a cache's budget counts; a trajectory is a few kilobytes."""
        return self.latents.numel() * self.latents.element_size()

    def stored_on(self, device: torch.device) -> MemoryEntry:
        """The same entry with latents on `device` that hold no more storage than their own.

        Shares the tensor where that is already so.
        """
        latents = self.latents.detach().to(device)
        if latents.untyped_storage().nbytes() != self.num_bytes:
            latents = latents.clone(memory_format=torch.contiguous_format)
        return replace(self, latents=latents)
