"""Positions are data: which cells of the 1x2x2 grid every token covers (METHOD 4).

L tokens, E cells a token covers along one axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mv2v_engine.tokens.plan import Segment, TokenPlan


@dataclass(frozen=True, eq=False)
class CoveredCells:
    """taus_LE temporal ids; rows_LE, columns_LE the cells covered, each listed equally often.

    A token past the grid's edge covers its replicated border, as its padded patch does.
    """

    taus_LE: Tensor
    rows_LE: Tensor
    columns_LE: Tensor


def _arange(stop: int) -> Tensor:
    return torch.arange(stop, device="cpu")


def _axis(tokens: int, cells: int, extent: int, widest: int) -> Tensor:
    """Cells covered by each of `tokens` tokens along one axis: [tokens, widest]."""
    covered = _arange(tokens)[:, None] * extent + _arange(extent)
    return covered.clamp_max(cells - 1).repeat_interleave(widest // extent, dim=1)


def _segment_cells(segment: Segment, widest: int, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    frames, rows, columns = segment.encoded_grid
    extent = segment.tokenizer // 2
    tau = segment.tau + _axis(frames, segment.grid[0], segment.frames_per_token, longest)
    if segment.taus:
        tau = torch.tensor(segment.taus, device="cpu")[tau - segment.tau]
    if segment.reverse:
        tau = tau.flip(0)
    row = _axis(rows, segment.cell_grid[0], extent, widest)
    column = _axis(columns, segment.cell_grid[1], extent, widest)
    shape = (frames, rows, columns)
    return (
        tau[:, None, None].expand(*shape, longest).flatten(0, 2),
        row[None, :, None].expand(*shape, widest).flatten(0, 2),
        column[None, None].expand(*shape, widest).flatten(0, 2),
    )


def covered_cells(plan: TokenPlan) -> CoveredCells:
    """The cells of every token of a plan, in sequence order."""
    # a common multiple, so that every token lists each of its cells equally often
    widest = math.lcm(*(segment.tokenizer // 2 for segment in plan.segments))
    longest = math.lcm(*(segment.frames_per_token for segment in plan.segments))
    parts = [_segment_cells(segment, widest, longest) for segment in plan.segments]
    taus, rows, columns = (torch.cat(list(column)) for column in zip(*parts, strict=True))
    return CoveredCells(taus, rows, columns)


def position_ids(plan: TokenPlan) -> Tensor:
    """Position ids [L, 3] (int64): first temporal id, row and column on the 1x2x2 grid."""
    cells = covered_cells(plan)
    return torch.stack([cells.taus_LE[:, 0], cells.rows_LE[:, 0], cells.columns_LE[:, 0]], dim=-1)
