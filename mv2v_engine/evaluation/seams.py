"""Does a long edit flicker more where its windows meet than inside them.

T frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mv2v_engine.errors import VideoError

_NEAR = 2  # changes on either side of a seam that it is compared with
_FLOOR = 0.1 / 255  # a tenth of a grey level, so that a still clip has a ratio too


@dataclass(frozen=True, kw_only=True, slots=True)
class SeamFlicker:
    """Mean |change| from frame to frame, as a share of full scale, at seams and elsewhere.

    In the residuals the source's own change is taken out, and with it most of what moves. That
    beside seams is of the two changes before and the two after each seam: a camera that speeds up
    does so on both sides.
    """

    seam: float
    inside: float
    seam_residual: float
    beside_residual: float

    @property
    def ratio(self) -> float:
        """Flicker at seams over flicker beside them; 1 is a seam that nobody sees."""
        return (self.seam_residual + _FLOOR) / (self.beside_residual + _FLOOR)


def seam_flicker(frames: Tensor, source: Tensor, starts: Sequence[int]) -> SeamFlicker | None:
    """Flicker of an edit of `source`; both uint8 [T, height, width, 3].

    starts: the windows' first new frames; the first is 0. None if there is one window only, or
    only windows of one frame.

    Raises:
        VideoError: the two do not belong together.
    """
    if frames.shape != source.shape:
        raise VideoError(
            f"an edit is measured against its source: got frames {list(frames.shape)}, "
            f"source {list(source.shape)}"
        )
    change, own = (video[1:].float() - video[:-1].float() for video in (frames, source))
    raw = change.abs().mean((1, 2, 3)) / 255
    residual = (change - own).abs().mean((1, 2, 3)) / 255
    is_seam = torch.zeros(len(raw), dtype=torch.bool)
    is_seam[[start - 1 for start in starts if start > 0]] = True
    near = torch.nn.functional.max_pool1d(is_seam[None].float(), 2 * _NEAR + 1, 1, _NEAR)[0] > 0
    if not bool(is_seam.any()) or not bool((near & ~is_seam).any()):
        return None
    return SeamFlicker(
        seam=float(raw[is_seam].mean()),
        inside=float(raw[~is_seam].mean()),
        seam_residual=float(residual[is_seam].mean()),
        beside_residual=float(residual[near & ~is_seam].mean()),
    )
