"""Rotary tables: pooled over covered cells by brute force, centre mode, Wan's own split."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mv2v_engine.models.rope import axis_dims, rotary_table
from mv2v_engine.testing import tiny_config
from mv2v_engine.tokens.plan import TokenPlan, turn_plan

CONFIG = tiny_config()


def _cell(place: tuple[float, float, float]) -> list[complex]:
    """exp(i angle) of one place; one frequency ladder an axis."""
    dims = axis_dims(CONFIG.attention_head_dim)
    return [
        complex(math.cos(angle), math.sin(angle))
        for value, dim in zip(place, dims, strict=True)
        for angle in (value * 10000 ** (-2 * i / dim) for i in range(dim // 2))
    ]


def _rows(plan: TokenPlan, segment: int) -> Tensor:
    """A segment's part of the table as complex numbers [F, rows, columns, D / 2]."""
    spans = [span for span in plan.frame_table if span.segment == segment]
    cos, sin = rotary_table(plan)[spans[0].start : spans[-1].stop].double().chunk(2, -1)
    grid = plan.segments[segment].token_grid
    return torch.complex(cos, sin).unflatten(0, (len(spans), *grid))


def test_wans_split_of_a_head() -> None:
    assert axis_dims(128) == (44, 42, 42)
    assert axis_dims(48) == (16, 16, 16)
    assert sum(axis_dims(12)) == 12


@pytest.mark.parametrize("grid", [(2, 60, 104), (5, 12, 20)], ids=str)
@pytest.mark.parametrize("mode", ["pooled", "centre"])
def test_coarse_tokens_by_brute_force(mode: str, grid: tuple[int, int, int]) -> None:
    plan = replace(turn_plan(CONFIG, grid, (4, 8)), rope=mode)  # type: ignore[arg-type]
    cells = (grid[1] // 2, grid[2] // 2)
    for index, segment in enumerate(plan.segments):
        got, extent = _rows(plan, index), segment.tokenizer // 2
        rows, columns = segment.token_grid
        # corners and one inside: the border's cells repeat, 60 x 104 and 12 x 20 do not divide by 8
        for row, column in [(0, 0), (rows - 1, 0), (rows - 1, columns - 1), (rows // 2, 1)]:
            ys = [min(row * extent + i, cells[0] - 1) for i in range(extent)]
            xs = [min(column * extent + i, cells[1] - 1) for i in range(extent)]
            for frame in (0, grid[0] - 1):
                tau = segment.tau + frame
                if mode == "centre":
                    expected = torch.tensor(_cell((tau, sum(ys) / extent, sum(xs) / extent)))
                else:
                    covered = torch.tensor([_cell((tau, y, x)) for y in ys for x in xs])
                    expected = covered.mean(0)
                torch.testing.assert_close(
                    got[frame, row, column],
                    expected.to(torch.complex128),
                    rtol=0,
                    atol=1e-6,
                )


def test_modes_agree_where_a_token_is_a_cell() -> None:
    plan = turn_plan(CONFIG, (2, 12, 20), (8,))
    centre = replace(plan, rope="centre")
    for segment in (0, 1):
        torch.testing.assert_close(_rows(plan, segment), _rows(centre, segment))
    assert not torch.allclose(_rows(plan, 2), _rows(centre, 2), atol=1e-3)


def test_pooling_shortens_and_never_lengthens() -> None:
    plan = turn_plan(CONFIG, (2, 12, 20), (8,))
    assert torch.allclose(_rows(plan, 0).abs(), torch.ones(1).double(), atol=1e-6)
    coarse = _rows(plan, 2).abs()
    assert float(coarse.max()) <= 1 + 1e-6 and float(coarse.min()) < 0.6


def test_pooling_is_the_mean_of_the_fine_table() -> None:
    plan = turn_plan(CONFIG, (3, 16, 16), (2, 4, 8))
    fine, four, eight = (_rows(plan, segment) for segment in (2, 3, 4))
    for coarse, extent in ((four, 2), (eight, 4)):
        pooled = fine.unflatten(2, (-1, extent)).unflatten(1, (-1, extent)).mean((2, 4))
        torch.testing.assert_close(coarse, pooled, rtol=0, atol=1e-6)


def test_the_table_is_float32_cosines_then_sines() -> None:
    plan = turn_plan(CONFIG, (2, 4, 4), (), source=False)
    table = rotary_table(plan)
    assert table.shape == (plan.length, CONFIG.attention_head_dim)
    assert table.dtype == torch.float32
    # the first token stands at the origin
    assert table[0].tolist() == [1.0] * 6 + [0.0] * 6
