"""One finished video as memory keeps it: latents, the camera that filmed it, and who encoded it.

C channels, F latent frames, H W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mv2v_engine.arguments import short_repr
from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.errors import RequestError


class LatentKind(NamedTuple):
    """Everything that shapes latents: entries of one kind may stand in for one another's."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class MemoryEntry:
    """A finished turn's video.

    Args:
        id: unique within a cache.
        turn: number of the turn that made it; later turns win ties of relevance.
        latents: [C, F, H, W], normalised.
        trajectory: poses in the session's one world, the source's first camera; None for an edited
            segment, which is found by its source instead.
        key: which VAE the latents belong to; latents of another VAE mean nothing to a model.
        owner: whoever can say that it is needed no longer (`MemoryCache.forget`), compared by
            identity.
        reload: reads the same latents from where they lie on disk, None if they do not; raises
            StorageError if they are lost or damaged.

    Raises:
        RequestError: latents of another rank.
    """

    id: str
    turn: int
    latents: Tensor
    trajectory: CameraTrajectory | None
    key: str
    reload: Callable[[], Tensor] | None = None
    owner: object = None

    __repr__ = short_repr

    def __post_init__(self) -> None:
        if self.latents.ndim != 4:
            raise RequestError(
                f"memory {self.id!r}: latents must have shape [C, F, H, W], "
                f"got {list(self.latents.shape)}; pass one video, not a batch"
            )

    @property
    def camera(self) -> CameraTrajectory:
        """The trajectory of a video that has one.

        Raises:
            RequestError: it is an edited segment.
        """
        if self.trajectory is None:
            raise RequestError(
                f"memory {self.id!r} is an edited segment and has no camera; "
                "rank it by its source (memory.segment_retrieval)"
            )
        return self.trajectory

    @property
    def kind(self) -> LatentKind:
        """VAE, frames, size and dtype of the latents."""
        return LatentKind(self.key, tuple(self.latents.shape), self.latents.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of the latents, what a cache's budget counts; a trajectory is a few kilobytes."""
        return self.latents.numel() * self.latents.element_size()

    def require_key(self, key: str) -> None:
        """Refuse latents of another VAE than the one of this key.

        Raises:
            RequestError: they are.
        """
        if self.key != key:
            raise RequestError(
                f"memory {self.id!r} has latents of the VAE {self.key}, this model's is {key}; a "
                "model understands its own VAE's alone: encode the video again"
            )

    def stored_on(self, device: torch.device) -> MemoryEntry:
        """The same entry with latents on `device` that hold no more storage than their own.

        Shares the tensor where that is already so.
        """
        latents = self.latents.detach().to(device)
        if latents.untyped_storage().nbytes() != self.num_bytes:
            latents = latents.clone(memory_format=torch.contiguous_format)
        return replace(self, latents=latents)

    def outlined(self) -> MemoryEntry:
        """The same entry with latents that have a shape and a dtype but no bits."""
        latents = torch.empty(self.latents.shape, dtype=self.latents.dtype, device="meta")
        return replace(self, latents=latents)
