"""Do the windows of a long edit agree: the same point of the same thing, seen in two windows.

Surfaces are cut into cells; a window's view of a cell is its mean colour there, freed of light.
Every pair of windows is compared over the cells that both see, wherever the camera has gone and
however the thing has turned in between.

T frames, W windows, K cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from mv2v_engine.synthetic.surfaces import SurfacePoints
from mv2v_engine.synthetic.worlds import NUM_WALLS

OBJECT_CELL, WALL_CELL = 0.08, 0.2  # metres
_FEWEST_PIXELS = 4  # pixels of a window in a cell
_FEWEST_CELLS = 8  # cells that a pair of windows shares; fewer say nothing


def window_of_frame(num_frames: int, starts: Sequence[int]) -> Tensor:
    """Window number [T] of every frame, from the windows' first new frames; the first is 0."""
    if not starts or starts[0] != 0 or list(starts) != sorted(set(starts)):
        raise ValueError(f"windows must start at 0 and ascend, got {list(starts)}")
    if starts[-1] >= num_frames:
        raise ValueError(f"the last window starts at {starts[-1]} of {num_frames} frames")
    return torch.bucketize(torch.arange(num_frames), torch.tensor(starts), right=True) - 1


@dataclass(frozen=True, eq=False)
class _Cells:
    """Mean colours [W, K, 3] and whether a window saw enough of a cell [W, K]."""

    colour: Tensor
    seen: Tensor


def _cells(points: SurfacePoints, albedo: Tensor, mask: Tensor, window_T: Tensor) -> _Cells:
    """Collect the masked pixels by window and cell."""
    frame = mask.nonzero()[:, 0]
    surface = points.surface[mask]
    size = torch.where(surface >= NUM_WALLS, OBJECT_CELL, WALL_CELL)
    cell = (points.point[mask] / size[:, None]).floor().long().clamp(-512, 511) + 512
    key = ((surface * 1024 + cell[:, 0]) * 1024 + cell[:, 1]) * 1024 + cell[:, 2]
    unique, index = key.unique(return_inverse=True)
    num_windows, num_cells = int(window_T.max()) + 1, len(unique)
    place = window_T[frame] * num_cells + index
    total = torch.zeros(num_windows * num_cells, 4, dtype=torch.float64)
    ones = torch.ones(len(place), 1, dtype=torch.float64)
    total.index_add_(0, place, torch.cat([albedo[mask].double(), ones], dim=-1))
    total = total.view(num_windows, num_cells, 4)
    count = total[..., 3]
    return _Cells(total[..., :3] / count.clamp_min(1)[..., None], count >= _FEWEST_PIXELS)


def surface_disagreement(
    frames: Tensor, points: SurfacePoints, mask: Tensor, window_T: Tensor
) -> float | None:
    """Mean L1 (0..1) between windows of what they show at the same points of the masked surfaces.

    frames: uint8 [T, height, width, 3]. mask: bool [T, height, width]; pixels on borders between
    surfaces never count. None if no two windows see enough of the same.
    """
    usable = mask & points.whole
    cells = _cells(points, points.albedo(frames), usable, window_T)
    errors: list[Tensor] = []
    for first, second in combinations(range(len(cells.seen)), 2):
        both = cells.seen[first] & cells.seen[second]
        if int(both.sum()) >= _FEWEST_CELLS:
            difference = cells.colour[first, both] - cells.colour[second, both]
            errors.append(difference.abs().mean(-1))
    return float(torch.cat(errors).mean()) if errors else None
