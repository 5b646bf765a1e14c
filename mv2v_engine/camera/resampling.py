"""A camera's path at other moments: places on straight lines, rotations on great circles (slerp).

N poses that there are, T poses asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mv2v_engine.camera.poses import quaternion_rotations, rotation_quaternions


def resampled_poses(poses: Tensor, places: Tensor) -> Tensor:
    """Poses [T, 3, 4] of a path [N, 3, 4] at fractional indices [T] from 0 to N - 1; float64."""
    before, after, share = _between(len(poses), places)
    quaternions = rotation_quaternions(poses[..., :3])
    first, second = quaternions[before], quaternions[after]
    cosine = (first * second).sum(-1, keepdim=True)
    # q and -q are one rotation: the shorter way round
    second, cosine = torch.where(cosine < 0, -second, second), cosine.abs()
    angle = torch.acos(cosine.clamp(max=1.0))
    is_turned = angle > 1e-9
    sine = torch.where(is_turned, angle.sin(), torch.ones_like(angle))
    near, far = (
        torch.where(is_turned, (weight * angle).sin() / sine, weight)
        for weight in (1 - share, share)
    )
    mixed = torch.nn.functional.normalize(near * first + far * second, dim=-1)
    rotations = quaternion_rotations(mixed)
    # a pose that is hit is itself, without the way through a quaternion
    rotations = torch.where(share[..., None] == 0, poses[before][..., :3], rotations)
    places_T3 = torch.lerp(poses[before][..., 3], poses[after][..., 3], share)
    return torch.cat([rotations, places_T3[..., None]], dim=-1)


def resampled_values(values: Tensor, places: Tensor) -> Tensor:
    """Values [T, ...] of [N, ...] at fractional indices [T], linearly."""
    before, after, share = _between(len(values), places)
    return torch.lerp(values[before], values[after], share.view(-1, *[1] * (values.ndim - 1)))


def even_places(num_frames: int, num_poses: int, times: Tensor | None) -> Tensor:
    """Indices [T] that go evenly from a path's first pose to its last.

    times: of the poses [N], increasing: then they go evenly in time.
    """
    last = num_poses - 1
    if times is None or num_poses < 2:
        return torch.linspace(0.0, last, num_frames, dtype=torch.float64, device="cpu")
    # the first is nought: large stamps leave no digits for what lies between them
    times = (times - times[0]) / (times[-1] - times[0])
    asked = torch.linspace(0.0, 1.0, num_frames, dtype=torch.float64, device="cpu")
    before = (torch.searchsorted(times, asked, right=True) - 1).clamp(0, last - 1)
    return before + (asked - times[before]) / (times[before + 1] - times[before])


def _between(count: int, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The indices [T] on both sides of places [T], and the share [T, 1] of the second."""
    before = places.floor().long().clamp(0, count - 1)
    after = (before + 1).clamp(max=count - 1)
    return before, after, (places - before)[:, None].clamp(0.0, 1.0)
