"""What one forward costs as the memory grows: from token plans, without any weights (METHOD 16)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mv2v_engine.config import WAN_1_3B, TransformerConfig
from mv2v_engine.tokens.plan import novel_view_plan


def forward_costs(
    memory: Sequence[int],
    *,
    shape: TransformerConfig = WAN_1_3B,
    frames: int = 81,
    size: tuple[int, int] = (480, 832),
    spatial_stride: int = 8,
) -> list[dict[str, Any]]:
    """Tokens and FLOPs of the blocks for each number of memory videos.

    uniform: every video at 1x2x2. dynamic: tokenizers by rank. merged: with adaptive merging.
    static: one step on conditioning K/V that are kept.
    """
    rows = []
    for count in memory:
        common: dict[str, Any] = {
            "memory": count,
            "frames": frames,
            "size": size,
            "shape": shape,
            "spatial_stride": spatial_stride,
        }
        uniform = novel_view_plan(**common, merge="off", tokenizers="uniform")
        dynamic = novel_view_plan(**common, merge="off")
        merged = novel_view_plan(**common)
        static = novel_view_plan(**common, merge="off", conditioning="static")
        rows.append(
            {
                "memory": count,
                "tokens_uniform": uniform.length,
                "tokens_dynamic": dynamic.length,
                "tokens_last_block": merged.lengths_by_block()[-1],
                "flops_uniform": uniform.flops(),
                "flops_dynamic": dynamic.flops(),
                "flops_merged": merged.flops(),
                "flops_static": static.flops(),
            }
        )
    return rows
