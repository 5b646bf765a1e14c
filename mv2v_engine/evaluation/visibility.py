"""Which pixels of one camera another camera sees at the same moment, by exact depth (METHOD 15).

Frames of equal number are of equal time, so that what moves in the world needs no case of its
own. Everything is a statement about `camera`'s pixels.

T frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mv2v_engine.camera.poses import compose, invert
from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.synthetic.render import pixel_directions


@dataclass(frozen=True, eq=False)
class Projection:
    """Where the points of a camera's pixels fall in another camera.

    position: pixels (x, y) [T, height, width, 2], the centre of the first pixel at (0.5, 0.5).
    seen, unseen: bool [T, height, width], the other camera surely sees the point, or surely does
    not. Beside a silhouette and on the image's border neither is sure.
    """

    position: Tensor
    seen: Tensor
    unseen: Tensor

    def sample(self, frames: Tensor) -> Tensor:
        """The other camera's frames [T, height, width, 3] at the points: float, bilinear.

        Means nothing where the point is not seen.
        """
        height, width = frames.shape[1:3]
        grid = 2 * self.position / torch.tensor([width, height]) - 1
        sampled = torch.nn.functional.grid_sample(
            frames.permute(0, 3, 1, 2).float(), grid, padding_mode="border", align_corners=False
        )
        return sampled.permute(0, 2, 3, 1)


def camera_points(camera: CameraTrajectory, depth: Tensor) -> Tensor:
    """Points [T, height, width, 3] of pixels in the camera's own axes; depth [T, height, width]."""
    directions = [pixel_directions(camera, frame) for frame in range(camera.num_frames)]
    return torch.stack(directions) * depth[..., None]


def image_positions(points: Tensor, camera: CameraTrajectory) -> Tensor:
    """Pixels (x, y) [T, height, width, 2] of points [T, height, width, 3] in the camera's axes."""
    k = camera.intrinsics.expand(len(points), 3, 3)[:, None, None]
    z = points[..., 2].clamp_min(1e-6)
    x = points[..., 0] / z * k[..., 0, 0] + k[..., 0, 2]
    y = points[..., 1] / z * k[..., 1, 1] + k[..., 1, 2]
    return torch.stack([x, y], dim=-1)


def project(
    camera: CameraTrajectory,
    depth: Tensor,
    other: CameraTrajectory,
    other_depth: Tensor,
    *,
    tolerance: float = 0.05,
) -> Projection:
    """Follow every pixel of `camera` into `other` at the same moment.

    depth, other_depth: [T, height, width] metres along each camera's axis. A point is seen if it
    projects inside the other image and lies at the depth recorded there, within `tolerance` of
    that depth; it is unseen if it lies outside, or at no depth between those around that pixel.
    """
    move = compose(invert(other.poses), camera.poses)[:, None, None]
    points = camera_points(camera, depth)
    points = (move[..., :3] @ points[..., None])[..., 0] + move[..., 3]
    position = image_positions(points, other)
    height, width = other.size
    column, row = position.floor().long().unbind(-1)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    frame = torch.arange(len(points))[:, None, None]
    place = (frame, row.clamp(0, height - 1), column.clamp(0, width - 1))
    recorded, z = other_depth[place], points[..., 2]
    seen = inside & (z > 0) & ((recorded - z).abs() <= tolerance * recorded)
    beside = (column >= -1) & (column <= width) & (row >= -1) & (row <= height) & (z > 0)
    nearest, farthest = (
        sign * torch.nn.functional.max_pool2d(sign * other_depth[:, None], 3, 1, padding=1)[:, 0]
        for sign in (-1, 1)
    )
    between = z >= (1 - tolerance) * nearest[place]
    between &= z <= (1 + tolerance) * farthest[place]
    return Projection(position, seen, ~(beside & between))
