"""What an edit gives: its windows as they finish, and the whole of them as one video.

T pixel frames of a window, C latent channels, F H W latent grid, W windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mv2v_engine.arguments import short_repr
from mv2v_engine.video.windows import EditWindow


@dataclass(frozen=True, eq=False)
class FinishedWindow:
    """A window that has just been edited, for `EditSession.edit`'s on_window.

    latents: float32 [C, F, H, W] on the CPU. frames: uint8 [T, height, width, 3], all that the
    model made. report: as in the edit's.
    """

    window: EditWindow
    latents: Tensor
    frames: Tensor
    report: dict[str, Any]

    __repr__ = short_repr

    @property
    def new_frames(self) -> Tensor:
        """Those that go into the edited video."""
        return self.frames[self.window.new_frames]


class EditFootage:
    """A long edit's video, one window of it in memory at a time.

    Args:
        windows: of the source, in order.
        read: latents of a window by its number, from where they are kept.
        decode: latents to frames uint8 [T, height, width, 3] on the CPU.
    """

    def __init__(
        self,
        windows: Sequence[EditWindow],
        read: Callable[[int], Tensor],
        decode: Callable[[Tensor], Tensor],
    ) -> None:
        self.windows, self._read, self._decode = windows, read, decode

    def latents(self) -> Tensor:
        """float32 [W, C, F, H, W], all of them.

        Raises:
            StorageError: they were stored, and are lost or damaged.
        """
        return torch.stack([self._read(window.number) for window in self.windows])

    def parts(self) -> Iterator[Tensor]:
        """The edited video, a window's new frames at a time; decoding gives the same bits again.

        Raises:
            StorageError: as `latents`.
        """
        for window in self.windows:
            yield self._decode(self._read(window.number))[window.new_frames]

    def frames(self) -> Tensor:
        """uint8 [frames of the source, height, width, 3], the whole video.

        Raises:
            StorageError: as `latents`.
        """
        return torch.cat(list(self.parts()))
