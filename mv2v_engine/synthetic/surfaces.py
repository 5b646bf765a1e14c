"""Which point of which surface every pixel shows, and how light it lies there.

With both, pictures of one thing from anywhere, at any time, can be compared point by point.

T frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.synthetic.render import (
    Rendering,
    frame_time,
    object_index,
    object_poses,
    pixel_directions,
    shading,
    surface_normals,
)
from mv2v_engine.synthetic.worlds import NUM_WALLS, World


@dataclass(frozen=True, eq=False)
class SurfacePoints:
    """point: [T, height, width, 3] metres, an object's in its own axes, a wall's in the world's.

    surface: as the rendering's. shade: [T, height, width], seen colour / own colour.
    whole: bool [T, height, width], pixels that show one surface only.
    """

    point: Tensor
    surface: Tensor
    shade: Tensor
    whole: Tensor

    def albedo(self, frames: Tensor) -> Tensor:
        """Own colours [T, height, width, 3], 0..1, that uint8 frames show under this light."""
        return frames.float() / 255 / self.shade[..., None]


def surface_points(world: World, camera: CameraTrajectory, filmed: Rendering) -> SurfacePoints:
    """Follow every pixel of a world filmed by `camera` to its surface."""
    points, shades = [], []
    height, width = camera.size
    for frame in range(camera.num_frames):
        pose, surface = camera.poses[frame], filmed.surface[frame].cpu().flatten()
        depth = filmed.depth[frame].cpu().flatten()
        rays = pixel_directions(camera, frame).flatten(0, 1)
        point = (depth[:, None] * rays) @ pose[:, :3].T + pose[:, 3]
        centre_N3, yaw_N = object_poses(world, frame_time(camera, frame))
        index = object_index(surface)
        cos, sin = yaw_N[index].cos(), yaw_N[index].sin()
        x, y, z = (point - centre_N3[index]).unbind(-1)
        own = torch.stack([cos * x - sin * z, y, sin * x + cos * z], dim=-1)
        local = torch.where((surface >= NUM_WALLS)[:, None], own, point)
        normal = surface_normals(world, yaw_N, surface, local)
        points.append(local.view(height, width, 3))
        shades.append(shading(world, normal).view(height, width))
    surface = filmed.surface.cpu()
    return SurfacePoints(
        torch.stack(points), surface, torch.stack(shades), ~surface_borders(surface)
    )


def surface_borders(surface: Tensor) -> Tensor:
    """bool [T, height, width]: where a pixel's surface differs from that of a pixel around it."""
    ids = surface[:, None].float()
    padded = torch.nn.functional.pad(ids, (1, 1, 1, 1), mode="replicate")
    highest = torch.nn.functional.max_pool2d(padded, 3, stride=1)
    lowest = -torch.nn.functional.max_pool2d(-padded, 3, stride=1)
    return (highest != lowest)[:, 0]
