"""VideoFOV: which cached videos saw what the target will see (Memory-V2V, Algorithm 1; METHOD 9).

A latitude-longitude sphere stands around the target's first camera; a video's field of view is
the set of its points that any frame sees, and relevance is the overlap of two such sets. All
trajectories share one world. Culling only skips points that no frame can see: counts are exact.

P points, T frames, M candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.config import MemoryTokenizers
from mv2v_engine.errors import RequestError
from mv2v_engine.memory.entry import MemoryEntry
from mv2v_engine.tokens.plan import memory_tokenizers

_BLOCK = 16  # neighbouring points that are culled together
_CHUNK = 256  # blocks tested at once: 10 MiB of distances at 81 frames


@dataclass(frozen=True, slots=True)
class Retrieval:
    """What a turn remembers, most relevant first; the fields run parallel.

    tokenizers: spatial patch of each video. num_candidates: videos that were ranked.
    reason: why nothing was retrieved, None if something was.
    """

    ids: tuple[str, ...]
    turns: tuple[int, ...]
    scores: tuple[float, ...]
    tokenizers: tuple[int, ...]
    num_candidates: int
    reason: str | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def to_dict(self) -> dict[str, Any]:
        """For a report: one row a video, and the reason if there is none."""
        rows = zip(self.ids, self.turns, self.scores, self.tokenizers, strict=True)
        return {
            "retrieved": [
                {"id": id, "turn": turn, "score": round(score, 6), "tokenizer": f"1x{k}x{k}"}
                for id, turn, score, k in rows
            ],
            "num_candidates": self.num_candidates,
            "reason": self.reason,
        }


def sphere_points(
    target: CameraTrajectory, *, radius: float = 4.0, grid: tuple[int, int] = (180, 360)
) -> Tensor:
    """World points [P, 3] on a sphere around the target's first camera.

    Centres of `grid` (latitude, longitude) cells; the poles lie on that camera's y axis.
    """
    rows, columns = grid
    if not (math.isfinite(radius) and radius > 0) or min(grid) < 1:
        raise RequestError(
            f"the sphere needs a positive radius and grid, got radius {radius} and grid {grid}"
        )
    latitude = ((torch.arange(rows, dtype=torch.float64) + 0.5) / rows - 0.5) * math.pi
    longitude = ((torch.arange(columns, dtype=torch.float64) + 0.5) / columns - 0.5) * 2 * math.pi
    latitude, longitude = torch.meshgrid(latitude, longitude, indexing="ij")
    x = latitude.cos() * longitude.sin()
    z = latitude.cos() * longitude.cos()
    directions_P3 = torch.stack([x, latitude.sin(), z], dim=-1).flatten(0, 1)
    pose = target.poses[0].to(torch.float64)
    points: Tensor = radius * directions_P3 @ pose[:, :3].T + pose[:, 3]
    return points


def _frustum_planes(trajectory: CameraTrajectory) -> Tensor:
    """Image borders as planes [4, 4, T]: (left, top, right, bottom), (inward unit normal, offset).

    In homogeneous pixels (x, y, z) of a frame, x >= 0, y >= 0, width z - x > 0, height z - y > 0.
    The first and the third together need z > 0, so that depth has no plane of its own.
    """
    poses = trajectory.poses.to(torch.float64)
    world_to_camera = poses[:, :, :3].transpose(1, 2)
    offset = -world_to_camera @ poses[:, :, 3:]
    projection = trajectory.intrinsics.to(torch.float64) @ torch.cat(
        [world_to_camera, offset], dim=-1
    )
    height, width = trajectory.size
    x, y, z = projection.unbind(1)
    planes = torch.stack([x, y, width * z - x, height * z - y])  # [4, T, 4]
    length: Tensor = planes[..., :3].norm(dim=-1, keepdim=True)
    return (planes / length).transpose(1, 2)


def visible_points(trajectory: CameraTrajectory, points: Tensor) -> Tensor:
    """Which world points [P, 3] any frame sees: bool [P].

    Seen means in front of the camera and inside [0, width) x [0, height). Points near each other
    in the list are culled together, so a list ordered in space is faster; the answer is the same.
    """
    if points.ndim != 2 or points.shape[1] != 3:
        raise RequestError(f"points must have shape [points, 3], got {list(points.shape)}")
    num_points, num_frames = len(points), trajectory.num_frames
    if not num_points:
        return torch.zeros(0, dtype=torch.bool)
    planes = _frustum_planes(trajectory).transpose(0, 1).flatten(1)
    normals, offsets = planes[:3], planes[3]

    short = -num_points % _BLOCK
    last = points[-1:].expand(short, 3)
    blocks = torch.cat([points, last]).to(torch.float64).unflatten(0, (-1, _BLOCK))
    centre = blocks.mean(1)
    reach = (blocks - centre[:, None]).norm(dim=-1).amax(1, keepdim=True)
    # a plane at least `reach` behind the centre hides the whole block; the slack is for rounding
    inside = centre @ normals + offsets >= -1.01 * reach - 1e-6
    near = inside.unflatten(1, (4, num_frames)).all(1).any(1)

    seen = torch.zeros(blocks.shape[:2], dtype=torch.bool)
    for index in near.nonzero()[:, 0].split(_CHUNK):
        distance = (blocks[index] @ normals + offsets).unflatten(-1, (2, 2, num_frames))
        inside = (distance[:, :, 0] >= 0) & (distance[:, :, 1] > 0)
        seen[index] = inside.all(2).any(-1)
    return seen.flatten()[:num_points]


def video_fov_scores(
    target: CameraTrajectory,
    candidates: Sequence[CameraTrajectory],
    *,
    radius: float = 4.0,
    blend: float = 0.5,
    grid: tuple[int, int] = (180, 360),
) -> Tensor:
    """Relevance of each candidate to the target, float64 [M] in 0..1.

    s = blend |A & B| / |A | B| + (1 - blend) |A & B| / |A|, A the points that the target sees, B
    the candidate's. All zero where the target sees none.

    Args:
        radius: metres from the target's first camera to the points; about the subject's distance.
        blend: weight of the intersection over union against coverage of the target.
        grid: points along (latitude, longitude).

    Raises:
        RequestError: radius or grid not positive, or blend outside 0..1.
    """
    if not 0 <= blend <= 1:
        raise RequestError(f"blend must lie in 0..1, got {blend}")
    points = sphere_points(target, radius=radius, grid=grid)
    if not candidates:
        return torch.zeros(0, dtype=torch.float64)
    wanted_P = visible_points(target, points)
    total = int(wanted_P.sum())
    if not total:
        return torch.zeros(len(candidates), dtype=torch.float64)
    seen_MP = torch.stack([visible_points(candidate, points) for candidate in candidates])
    shared = (seen_MP & wanted_P).sum(1).to(torch.float64)
    union = (seen_MP | wanted_P).sum(1)
    return blend * shared / union + (1 - blend) * shared / total


def rank_memory(
    target: CameraTrajectory,
    entries: Sequence[MemoryEntry],
    *,
    top_k: int,
    radius: float = 4.0,
    blend: float = 0.5,
    tokenizers: MemoryTokenizers = "ranked",
    shuffle: torch.Generator | None = None,
) -> Retrieval:
    """The at most `top_k` entries that overlap the target's view, most relevant first.

    Entries without overlap are left out; of equal scores the most recent turn comes first.

    Args:
        tokenizers: spend tokens by rank, or the source's 1x2x2 on every video.
        shuffle: draws from all entries in any order instead (the ablation); scores are reported.
    """
    if top_k < 0:
        raise RequestError(f"top_k must not be negative, got {top_k}")
    if not entries:
        return _nothing(0, "the cache is empty")
    if not top_k:
        return _nothing(len(entries), "at most 0 memory videos were asked for")
    trajectories = [entry.trajectory for entry in entries]
    scores = video_fov_scores(target, trajectories, radius=radius, blend=blend).tolist()
    pairs = list(zip(scores, entries, strict=True))
    if shuffle is not None:
        ranked = [pairs[i] for i in torch.randperm(len(pairs), generator=shuffle)][:top_k]
    else:
        order = sorted(pairs, key=lambda pair: (-pair[0], -pair[1].turn))
        ranked = [(score, entry) for score, entry in order if score > 0][:top_k]
    if not ranked:
        if not bool(visible_points(target, sphere_points(target, radius=radius)).any()):
            return _nothing(len(entries), "no point of the sphere lies in the target's view")
        return _nothing(len(entries), "no cached video overlaps the target's view")
    return Retrieval(
        ids=tuple(entry.id for _, entry in ranked),
        turns=tuple(entry.turn for _, entry in ranked),
        scores=tuple(score for score, _ in ranked),
        tokenizers=memory_tokenizers(len(ranked), mode=tokenizers),
        num_candidates=len(entries),
    )


def _nothing(num_candidates: int, reason: str) -> Retrieval:
    return Retrieval((), (), (), (), num_candidates, reason)
