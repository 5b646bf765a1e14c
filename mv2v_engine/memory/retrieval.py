"""VideoFOV: which cached videos saw what the target will see (Memory-V2V, Algorithm 1; METHOD 9).

A latitude-longitude sphere stands around the target's first camera; a video's field of view is
the set of its points that any frame sees, and relevance is the overlap of two such sets, counted
by `ops.fov_overlap`. All trajectories share one world.

P points, F frames of all videos, V videos, M candidates.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.config import MemoryTokenizers
from mv2v_engine.errors import RequestError
from mv2v_engine.memory.entry import MemoryEntry
from mv2v_engine.ops import fov_overlap
from mv2v_engine.tokens.plan import memory_tokenizers


class Found(Protocol):
    """A video that a ranking found: its id in the cache, and the turn or segment that made it."""

    @property
    def id(self) -> str: ...
    @property
    def turn(self) -> int: ...


# numbers of entries and their scores, the best first: at most so many for a target
Choose = Callable[[CameraTrajectory, Sequence[MemoryEntry], int], list[tuple[int, float]]]


@dataclass(frozen=True, slots=True)
class Retrieval:
    """What a turn remembers, most relevant first; the fields run parallel.

    tokenizers: spatial patch of each video. num_candidates: videos that were ranked.
    reason: why nothing was retrieved, None if something was.
    lost: id and reason of what would have been, and could not be read again.
    history: the rate at which all of it is one history, in place of tokenizers; else None.
    """

    ids: tuple[str, ...]
    turns: tuple[int, ...]
    scores: tuple[float, ...]
    tokenizers: tuple[int, ...]
    num_candidates: int
    reason: str | None = None
    lost: tuple[tuple[str, str], ...] = ()
    history: str | None = None

    @classmethod
    def of(
        cls, ranked: Sequence[tuple[float, Found]], num_candidates: int, mode: MemoryTokenizers
    ) -> Retrieval:
        """A retrieval of videos by their scores, best first; tokens by rank, or as `mode` says."""
        return cls(
            ids=tuple(found.id for _, found in ranked),
            turns=tuple(found.turn for _, found in ranked),
            scores=tuple(score for score, _ in ranked),
            tokenizers=memory_tokenizers(len(ranked), mode=mode),
            num_candidates=num_candidates,
        )

    @classmethod
    def nothing(cls, num_candidates: int, reason: str) -> Retrieval:
        """Why nothing is remembered."""
        return cls((), (), (), (), num_candidates, reason)

    def __len__(self) -> int:
        return len(self.ids)

    def to_dict(self) -> dict[str, Any]:
        """What a report says: a row for each video, the reason if there is none, what was lost."""
        rows = zip(self.ids, self.turns, self.scores, self.tokenizers, strict=True)
        encoder = "patches" if self.history is None else "history"
        return {
            "retrieved": [
                {
                    "id": id,
                    "turn": turn,
                    "score": round(score, 6),
                    "encoder": encoder,
                    "tokenizer": self.history or f"1x{k}x{k}",
                }
                for id, turn, score, k in rows
            ],
            "num_candidates": self.num_candidates,
            "reason": self.reason,
            **({"lost": dict(self.lost)} if self.lost else {}),
        }


@functools.lru_cache(maxsize=4)
def _directions(grid: tuple[int, int]) -> Tensor:
    """Centres of a (latitude, longitude) grid's cells on the unit sphere, float64 [P, 3].

    In tiles of 16 x 32 cells, each in tiles of 4 x 4: neighbours are culled together.
    """
    rows, columns = grid
    row = torch.arange(rows, device="cpu")[:, None]
    column = torch.arange(columns, device="cpu")
    latitude = ((row.double() + 0.5) / rows - 0.5) * math.pi
    longitude = ((column.double() + 0.5) / columns - 0.5) * 2 * math.pi
    x, y, z = torch.broadcast_tensors(
        latitude.cos() * longitude.sin(), latitude.sin(), latitude.cos() * longitude.cos()
    )
    tile = row // 16 * columns + column // 32
    tile = tile * 32 + row % 16 // 4 * 8 + column % 32 // 4
    order = (tile * 16 + row % 4 * 4 + column % 4).flatten().argsort()
    return torch.stack([x, y, z], dim=-1).flatten(0, 1)[order]


def sphere_points(
    target: CameraTrajectory, *, radius: float = 4.0, grid: tuple[int, int] = (180, 360)
) -> Tensor:
    """World points [P, 3] on a sphere around the target's first camera.

    Centres of `grid` (latitude, longitude) cells, near ones near each other in the list; the poles
    lie on that camera's y axis.
    """
    if not (math.isfinite(radius) and radius > 0) or min(grid) < 1:
        raise RequestError(
            f"the sphere needs a positive radius and grid, got radius {radius} and grid {grid}"
        )
    pose = target.poses[0].to(torch.float64)
    points: Tensor = radius * _directions(grid) @ pose[:, :3].T + pose[:, 3]
    return points


def frustum_planes(trajectories: Sequence[CameraTrajectory]) -> Tensor:
    """Image borders of every frame of all videos, float64 [F, 4, 4].

    Left, top, right, bottom of a frame as (inward unit normal, offset) in world space.

    In homogeneous pixels (x, y, z), x >= 0, y >= 0, width z - x > 0, height z - y > 0. The first
    and the third together need z > 0, so that depth has no plane of its own.
    """
    poses = torch.cat([each.poses for each in trajectories]).to(torch.float64)
    counts = [each.num_frames for each in trajectories]
    intrinsics = torch.cat(
        [
            each.intrinsics.expand(count, 3, 3)
            for each, count in zip(trajectories, counts, strict=True)
        ]
    ).to(torch.float64)
    sizes = [each.size for each in trajectories for _ in range(each.num_frames)]
    height_width = torch.tensor(sizes, dtype=torch.float64, device="cpu")
    height, width = height_width[..., None].unbind(1)
    world_to_camera = poses[:, :, :3].transpose(1, 2)
    offset = -world_to_camera @ poses[:, :, 3:]
    x, y, z = (intrinsics @ torch.cat([world_to_camera, offset], dim=-1)).unbind(1)
    planes_F44 = torch.stack([x, y, width * z - x, height * z - y], dim=1)
    length: Tensor = planes_F44[..., :3].norm(dim=-1, keepdim=True)
    return planes_F44 / length


def visible_points(trajectory: CameraTrajectory, points: Tensor) -> Tensor:
    """Which world points [P, 3] any frame sees: bool [P].

    Seen means in front of the camera and inside [0, width) x [0, height).
    """
    if points.ndim != 2 or points.shape[1] != 3:
        raise RequestError(f"points must have shape [points, 3], got {list(points.shape)}")
    return fov_overlap.visible_points(points.to(torch.float64), frustum_planes([trajectory]))


def video_fov_scores(
    target: CameraTrajectory,
    candidates: Sequence[CameraTrajectory],
    *,
    radius: float = 4.0,
    blend: float = 0.5,
    grid: tuple[int, int] = (180, 360),
    backend: fov_overlap.Backend = "auto",
) -> Tensor:
    """Relevance of each candidate to the target, float64 [M] in 0..1.

    s = blend |A & B| / |A | B| + (1 - blend) |A & B| / |A|, A the points that the target sees, B
    the candidate's. All zero where the target sees none. Every backend gives the same bits.

    Args:
        radius: metres from the target's first camera to the points; about the subject's distance.
        blend: weight of the intersection over union against coverage of the target.
        grid: points along (latitude, longitude).

    Raises:
        RequestError: radius or grid not positive, or blend outside 0..1.
    """
    if not 0 <= blend <= 1:
        raise RequestError(f"blend must lie in 0..1, got {blend}")
    points_P3 = sphere_points(target, radius=radius, grid=grid)
    videos = [target, *candidates]
    counts_V2 = fov_overlap.fov_overlap(
        points_P3,
        frustum_planes(videos),
        frames=[each.num_frames for each in videos],
        backend=backend,
    )
    total = counts_V2[0, 1]
    if not total:
        return torch.zeros(len(candidates), dtype=torch.float64, device="cpu")
    shared, seen = counts_V2[1:].to(torch.float64).unbind(1)
    return blend * shared / (total + seen - shared) + (1 - blend) * shared / total


def rank_memory(
    target: CameraTrajectory,
    entries: Sequence[MemoryEntry],
    *,
    top_k: int,
    radius: float = 4.0,
    blend: float = 0.5,
    backend: fov_overlap.Backend = "auto",
    tokenizers: MemoryTokenizers = "ranked",
    shuffle: torch.Generator | None = None,
    choose: Choose | None = None,
) -> Retrieval:
    """The at most `top_k` entries that overlap the target's view, most relevant first.

    Entries without overlap are left out; of equal scores the most recent turn comes first.

    Args:
        tokenizers: spend tokens by rank, or the source's 1x2x2 on every video.
        shuffle: draws from all entries in any order instead (the ablation); scores are reported.
        choose: takes the place of VideoFOV.
    """
    if top_k < 0:
        raise RequestError(f"top_k must not be negative, got {top_k}")
    if not entries:
        return Retrieval.nothing(0, "the cache is empty")
    if not top_k:
        return Retrieval.nothing(len(entries), "at most 0 memory videos were asked for")
    if choose is not None:
        picked = [(score, entries[number]) for number, score in choose(target, entries, top_k)]
        if not picked:
            return Retrieval.nothing(len(entries), "no cached video shows what the source does not")
        return Retrieval.of(picked, len(entries), tokenizers)
    trajectories = [entry.camera for entry in entries]
    scores = video_fov_scores(
        target, trajectories, radius=radius, blend=blend, backend=backend
    ).tolist()
    pairs = list(zip(scores, entries, strict=True))
    if shuffle is not None:
        drawn = torch.randperm(len(pairs), generator=shuffle, device="cpu")
        ranked = [pairs[i] for i in drawn][:top_k]
    else:
        order = sorted(pairs, key=lambda pair: (-pair[0], -pair[1].turn))
        ranked = [(score, entry) for score, entry in order if score > 0][:top_k]
    if not ranked:
        if not video_fov_scores(target, [target], radius=radius, backend=backend):
            return Retrieval.nothing(
                len(entries), "no point of the sphere lies in the target's view"
            )
        return Retrieval.nothing(len(entries), "no cached video overlaps the target's view")
    return Retrieval.of(ranked, len(entries), tokenizers)
