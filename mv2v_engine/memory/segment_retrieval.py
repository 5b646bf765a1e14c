"""Which edited segments of a long video a new one remembers (Memory-V2V, Algorithm 2; METHOD 10).

An instruction says too little to tell segments apart, so an edit is found by its source: segments
whose sources look alike, by the cosine of their descriptors, and first of all the one edited last,
onto which the new one has to follow. A descriptor is the mean of a segment's DINOv2 embeddings
(`vision`), or, where no such weights are at hand, `latent_descriptor`; the two do not compare.

C F H W latents, D numbers of a descriptor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mv2v_engine.config import MemoryTokenizers
from mv2v_engine.errors import RequestError
from mv2v_engine.memory.retrieval import Retrieval

_LATENT_GRID = (4, 4)


def latent_descriptor(latents_CFHW: Tensor) -> Tensor:
    """Latents averaged over time and over a 4x4 grid, float32 [16 C] on the CPU.

    Normalised latents have a mean near zero, so that their cosine tells segments apart.

    Raises:
        RequestError: latents of another rank.
    """
    if latents_CFHW.ndim != 4:
        raise RequestError(f"latents must have shape [C, F, H, W], got {list(latents_CFHW.shape)}")
    pooled = F.adaptive_avg_pool2d(latents_CFHW.float().mean(1), _LATENT_GRID)
    return pooled.flatten().cpu()


@dataclass(frozen=True, eq=False)
class SegmentKey:
    """How an edited segment is found: its id in the cache, its source and its shot.

    turn: its number. descriptor: of the source segment, [D].
    """

    id: str
    turn: int
    descriptor: Tensor
    shot: int = 0


def segment_scores(descriptor_D: Tensor, candidates: Sequence[SegmentKey]) -> Tensor:
    """Cosine of the source's descriptor with each candidate's, float64 [M] in -1..1.

    Raises:
        RequestError: descriptors of another length, or one that is zero or not finite.
    """
    rows = [descriptor_D, *(candidate.descriptor for candidate in candidates)]
    for row in rows:
        if row.shape != descriptor_D.shape or descriptor_D.ndim != 1:
            raise RequestError(
                f"descriptors must be one vector each and of one length, got "
                f"{list(descriptor_D.shape)} and {list(row.shape)}; "
                "describe all segments of a video by one model"
            )
    units_VD = torch.stack([row.detach().cpu().to(torch.float64) for row in rows])
    lengths = units_VD.norm(dim=1, keepdim=True)
    if not bool(torch.isfinite(lengths).all() and (lengths > 0).all()):
        raise RequestError(
            "a descriptor is zero or not finite, so nothing is similar to it; check its model"
        )
    units_VD = units_VD / lengths
    cosines: Tensor = units_VD[1:] @ units_VD[0]
    return cosines.clamp(-1, 1)


def rank_segments(
    descriptor: Tensor,
    candidates: Sequence[SegmentKey],
    *,
    top_k: int,
    shot: int = 0,
    recent_first: bool = True,
    cross_shot_similarity: float | None = None,
    tokenizers: MemoryTokenizers = "ranked",
) -> Retrieval:
    """The at most `top_k` edited segments that a new one remembers, most relevant first.

    Args:
        descriptor: of the new segment's source, [D].
        shot: the new segment's.
        recent_first: the last segment of the same shot leads, whatever it looks like.
        cross_shot_similarity: cosine from which on segments of other shots count too; None leaves
            them out, so that no object wanders over a cut.
        tokenizers: spend tokens by rank, or 1x2x2 on every video.
    """
    if top_k < 0:
        raise RequestError(f"top_k must not be negative, got {top_k}")
    threshold = math.inf if cross_shot_similarity is None else cross_shot_similarity
    if not candidates:
        return Retrieval.nothing(0, "no segment has been edited yet")
    if not top_k:
        return Retrieval.nothing(len(candidates), "at most 0 memory videos were asked for")
    pairs = [
        (score, candidate)
        for score, candidate in zip(
            segment_scores(descriptor, candidates).tolist(), candidates, strict=True
        )
        if candidate.shot == shot or score >= threshold
    ]
    if not pairs:
        return Retrieval.nothing(len(candidates), "this is the first segment of its shot")
    own = [candidate.turn for _, candidate in pairs if candidate.shot == shot]
    latest = max(own, default=None) if recent_first else None
    # where scores are equal, the most recent comes first
    pairs.sort(key=lambda pair: (pair[1].turn != latest, -pair[0], -pair[1].turn))
    return Retrieval.of(pairs[:top_k], len(candidates), tokenizers)
