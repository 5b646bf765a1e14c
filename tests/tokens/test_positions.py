"""Positions: disjoint temporal ranges, shared memory ids, cells covered, reversal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mv2v_engine.config import LUCY_5B
from mv2v_engine.testing import tiny_config
from mv2v_engine.tokens.plan import TokenPlan, novel_view_plan, turn_plan
from mv2v_engine.tokens.positions import covered_cells


def _taus(plan: TokenPlan) -> list[list[int]]:
    """Temporal ids of every segment's frames, each token of a frame having the same."""
    positions, per_segment = plan.positions(), [[] for _ in plan.segments]  # type: ignore[var-annotated]
    for span in plan.frame_table:
        taus = positions[span.start : span.stop, 0].unique()
        assert len(taus) == 1
        per_segment[span.segment].append(int(taus))
    return per_segment


def test_temporal_ranges_are_disjoint_and_memory_shares_one() -> None:
    target, source, *memory = _taus(novel_view_plan(memory=5))
    assert target == list(range(21))
    assert source == list(range(21, 42))
    assert memory == [list(range(42, 63))] * 5


def test_without_a_source_memory_keeps_its_range() -> None:
    plan = turn_plan(tiny_config(), (5, 12, 20), (4, 4), source=False)
    assert _taus(plan) == [list(range(5)), list(range(10, 15)), list(range(10, 15))]


def test_editing_reverses_memory() -> None:
    plan = turn_plan(LUCY_5B, (5, 12, 20), (4, 4, 8))
    target, preceding, *others = _taus(plan)
    assert target == [0, 1, 2, 3, 4]
    assert preceding == [9, 8, 7, 6, 5]
    assert others == [[14, 13, 12, 11, 10]] * 2


def test_positions_are_first_cells_in_token_order() -> None:
    plan = turn_plan(tiny_config(), (2, 12, 20), (4, 8))
    positions = plan.positions()
    assert positions.shape == (plan.length, 3) and positions.dtype == torch.int64
    expected = []
    for segment in plan.segments:
        extent = segment.tokenizer // 2
        rows, columns = segment.token_grid
        for frame in range(2):
            for row in range(rows):
                for column in range(columns):
                    expected.append((segment.tau + frame, row * extent, column * extent))
    assert positions.tolist() == [list(place) for place in expected]


@pytest.mark.parametrize("grid", [(60, 104), (12, 20), (10, 14)])
def test_covered_cells_stay_on_the_grid_and_reach_all_of_it(grid: tuple[int, int]) -> None:
    plan = turn_plan(tiny_config(), (1, *grid), (8,))
    cells, (start, stop) = covered_cells(plan), (plan.length - plan.segments[-1].length, None)
    rows, columns = cells.rows_LE[start:stop], cells.columns_LE[start:stop]
    assert set(rows.flatten().tolist()) == set(range(grid[0] // 2))
    assert set(columns.flatten().tolist()) == set(range(grid[1] // 2))
    # the last token's cells: what is left of the grid, then its border again
    first = (plan.segments[-1].token_grid[0] - 1) * 4
    expected = [min(first + i, grid[0] // 2 - 1) for i in range(4)]
    assert sorted(rows[-1].tolist()) == sorted(expected)


def test_every_covered_cell_is_listed_equally_often() -> None:
    plan = turn_plan(tiny_config(), (1, 12, 20), (2, 4, 8))
    cells = covered_cells(plan)
    assert cells.rows_LE.shape == (plan.length, 4)
    token = plan.frame_table[3].start  # the 1x4x4 memory: two rows, each listed twice
    assert sorted(cells.rows_LE[token].tolist()) == [0, 0, 1, 1]
    assert cells.rows_LE[0].tolist() == [0, 0, 0, 0]


def test_rope_mode_does_not_move_positions() -> None:
    plan = novel_view_plan(memory=1)
    assert torch.equal(plan.positions(), replace(plan, rope="centre").positions())
