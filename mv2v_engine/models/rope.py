"""Rotary tables from positions: pooled over the cells that a token covers (METHOD 4).

L tokens, E cells covered along an axis, D head dim. The head dim splits into D - 4*(D//6)
for time and 2*(D//6) for rows and for columns, as Wan's does (44/42/42 of 128).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mv2v_engine.tokens.plan import TokenPlan
from mv2v_engine.tokens.positions import covered_cells


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that turn with time, row and column."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def _angles(positions: Tensor, dim: int, theta: float) -> Tensor:
    """Angles [..., dim / 2] in float64."""
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
    return positions.to(torch.float64)[..., None] * frequencies


def rotary_table(plan: TokenPlan) -> Tensor:
    """Cosines then sines of every token: float32 [L, D], built in float64 on the CPU.

    Pooled: the mean of cos and sin over the covered cells, which separates by axis because a
    token covers a whole rectangle. Centre: cos and sin at the rectangle's centre. Channels that
    attention leaves to cameras (`camera_attention`) stay as they are. Ids of videos (`source_ids`)
    turn all of them once more.
    """
    shape, cells = plan.shape, covered_cells(plan)
    dims = axis_dims(shape.rotary_dim)
    still = (plan.length, (shape.attention_head_dim - shape.rotary_dim) // 2)
    parts_cos = [torch.ones(still, dtype=torch.float64, device="cpu")]
    parts_sin = [torch.zeros(still, dtype=torch.float64, device="cpu")]
    for positions, dim in zip((cells.taus_LE, cells.rows_LE, cells.columns_LE), dims, strict=True):
        if plan.rope == "centre":
            positions = positions.to(torch.float64).mean(-1, keepdim=True)
        angles = _angles(positions, dim, shape.rope_theta)
        parts_cos.append(angles.cos().mean(-2))
        parts_sin.append(angles.sin().mean(-2))
    if shape.source_ids:
        return _turned_by_ids(plan, torch.cat(parts_cos, -1), torch.cat(parts_sin, -1))
    return torch.cat(parts_cos + parts_sin, dim=-1).to(torch.float32)


def _turned_by_ids(plan: TokenPlan, cos: Tensor, sin: Tensor) -> Tensor:
    """A table whose every pair of channels is turned on by its video's id: float32 [L, D]."""
    ids = torch.cat(
        [
            torch.full((segment.length,), segment.source_id, dtype=torch.float64, device="cpu")
            for segment in plan.segments
        ]
    )
    angles = _angles(ids, plan.shape.attention_head_dim, plan.shape.rope_theta)
    own_cos, own_sin = angles.cos(), angles.sin()
    turned = [cos * own_cos - sin * own_sin, cos * own_sin + sin * own_cos]
    return torch.cat(turned, dim=-1).to(torch.float32)


# a plan of 100,000 tokens has a table of 50 MB
@lru_cache(maxsize=8)
def table_on(plan: TokenPlan, device: torch.device) -> Tensor:
    """The plan's table on a device; plans repeat over every step of a turn."""
    # made under inference mode, a cached table could never be trained with again
    with torch.inference_mode(False):
        return rotary_table(plan).to(device)
