"""Plans of long editing: the source rides on the target's channels, memory is extra tokens.

M memory videos, T latent frames.
"""

from __future__ import annotations

from collections.abc import Sequence

from mv2v_engine.config import (
    LUCY_5B,
    Conditioning,
    MemoryTokenizers,
    MergeMode,
    MergeScope,
    RopeMode,
    TransformerConfig,
)
from mv2v_engine.errors import RequestError
from mv2v_engine.tokens.plan import Segment, TokenPlan, latent_grid, memory_tokenizers


def editing_plan(
    shape: TransformerConfig,
    grid: tuple[int, int, int],
    tokenizers: Sequence[int],
    *,
    preceding: bool = True,
    merge: MergeMode = "conv",
    scope: MergeScope = "group",
    fraction: float | None = None,
    conditioning: Conditioning = "joint",
    rope: RopeMode = "pooled",
) -> TokenPlan:
    """The plan of one window: target, then memory by rank.

    grid: latent (frames, rows, columns), the same for every video. tokenizers: one per memory
    video. With `preceding` the first memory video is the segment just before and takes T..2T-1;
    all other memory shares 2T..3T-1. Memory frames run backwards (METHOD 4).
    """
    frames = grid[0]
    segments = [Segment(role="target", grid=grid)]
    for rank, tokenizer in enumerate(tokenizers):
        tau = frames if preceding and rank == 0 else 2 * frames
        segments.append(
            Segment(
                role="memory", grid=grid, tokenizer=tokenizer, tau=tau, mergeable=True, reverse=True
            )
        )
    return TokenPlan(
        segments=tuple(segments),
        shape=shape,
        merge=merge,
        scope=scope,
        fraction=fraction,
        conditioning=conditioning,
        rope=rope,
    )


def window_plan(
    *,
    memory: int,
    frames: int = 81,
    size: tuple[int, int] = (480, 832),
    merge: MergeMode = "conv",
    fraction: float | None = None,
    conditioning: Conditioning = "joint",
    shape: TransformerConfig = LUCY_5B,
    tokenizers: MemoryTokenizers = "ranked",
    spatial_stride: int = 16,
) -> TokenPlan:
    """The plan of a window that remembers `memory` segments, without any weights.

    tokenizers: by rank, or 1x2x2 for every memory video (the ablation).
    """
    if memory < 0:
        raise RequestError(f"memory must be a count of videos, got {memory}")
    return editing_plan(
        shape,
        latent_grid(frames, size, spatial_stride=spatial_stride),
        memory_tokenizers(memory, shape.tokenizers, mode=tokenizers),
        merge=merge,
        fraction=fraction,
        conditioning=conditioning,
    )
