"""Which pixels of one camera another camera sees at the same moment, by exact depth (METHOD 15).

T frames.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mv2v_engine.camera.poses import compose, invert
from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.synthetic.render import pixel_directions


def seen_by(
    camera: CameraTrajectory,
    depth: Tensor,
    other: CameraTrajectory,
    other_depth: Tensor,
    *,
    tolerance: float = 0.05,
) -> Tensor:
    """Mask bool [T, height, width] of `camera`'s pixels whose point `other` sees too.

    depth, other_depth: [T, height, width] metres along each camera's axis. A point counts as
    seen if it projects inside the other image and lies at the depth recorded there, within
    `tolerance` of that depth: neither hidden behind something nor beside a silhouette.
    """
    masks = []
    for frame in range(camera.num_frames):
        points = pixel_directions(camera, frame) * depth[frame, ..., None]
        move = compose(invert(other.poses[frame]), camera.poses[frame])
        moved = points @ move[:, :3].T + move[:, 3]
        k = other.intrinsics if other.intrinsics.ndim == 2 else other.intrinsics[frame]
        z = moved[..., 2].clamp_min(1e-6)
        column = (moved[..., 0] / z * k[0, 0] + k[0, 2]).floor().long()
        row = (moved[..., 1] / z * k[1, 1] + k[1, 2]).floor().long()
        height, width = other.size
        inside = (
            (moved[..., 2] > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        )
        recorded = other_depth[frame][row.clamp(0, height - 1), column.clamp(0, width - 1)]
        masks.append(inside & ((recorded - moved[..., 2]).abs() <= tolerance * recorded))
    return torch.stack(masks)
