"""Plans with a history: how many tokens, where they lie, and which are refused."""

from __future__ import annotations

import cmath
from dataclasses import replace

import pytest
import torch

from mv2v_engine.config import WAN_1_3B, HistoryConfig, TransformerConfig
from mv2v_engine.errors import RequestError
from mv2v_engine.models.rope import rotary_table
from mv2v_engine.testing import tiny_config
from mv2v_engine.tokens.flops import flop_table
from mv2v_engine.tokens.plan import Segment, TokenPlan, history_segments, turn_plan

RATES = ("4x4x2", "2x2x2", "2x2x1", "2x2x4")


def editor(*rates: str) -> TransformerConfig:
    history = HistoryConfig(rates=rates or RATES)
    return tiny_config(
        camera_conditioning="none", in_channels=8, source_channels=4, history=history
    )


@pytest.mark.parametrize(
    ("rate", "frames", "tokens"),
    [
        # 20 s of 480x832 at 24 frames a second: 7 x 13 x 60
        ("4x4x2", 120, 5460),
        # a second at 16: 195, 780, 1,560 of 6,240
        ("2x2x2", 4, 15 * 26 * 2),
        ("2x2x1", 4, 15 * 26 * 4),
        ("2x2x4", 4, 15 * 26),
    ],
)
def test_a_history_at_full_size(rate: str, frames: int, tokens: int) -> None:
    shape = replace(WAN_1_3B, camera_conditioning="none", history=HistoryConfig(rates=(rate,)))
    (segment,) = history_segments(shape, (frames, 60, 104), rate)
    assert segment.length == tokens and segment.rate == rate


def test_a_window_of_an_edit() -> None:
    """Remembered windows are one history before the target, its end whole beside it."""
    plan = turn_plan(editor(), (5, 12, 20), (4, 4, 8), history="2x2x2", history_frames=3)
    target, past, whole = plan.segments
    assert target.tau == 0 and past.grid == (15, 12, 20) and past.tau == -15
    assert past.encoded_grid == (8, 3, 5) and not past.mergeable
    assert whole.grid == (3, 12, 20) and whole.tau == -3 and whole.encoder == "patches"
    words = plan.describe()
    assert words["memory_encoders"] == ["history", "patches"]
    assert words["memory_tokens"] == [120, 180]
    assert words["tokens_by_kind"]["memory"] == 300
    assert plan.latent_shapes == ((8, 5, 12, 20), (4, 15, 12, 20), (4, 3, 12, 20))
    # without memory there is no history
    assert len(turn_plan(editor(), (5, 12, 20), (), history="2x2x2").segments) == 1
    plain = replace(plan, segments=plan.segments[:1])
    assert flop_table(plan)["tokenize"] > flop_table(plain)["tokenize"]


def test_positions_are_the_mean_over_the_cells_and_frames() -> None:
    plan = turn_plan(editor(), (2, 10, 14), (4, 4, 4), history="2x2x4")
    table = rotary_table(plan)
    past, start = plan.segments[1], plan.target.length
    frames, rows, columns = past.encoded_grid
    assert (frames, rows, columns) == (2, 2, 3)
    dim = plan.shape.attention_head_dim
    spatial = 2 * (dim // 6)
    dims = (dim - 2 * spatial, spatial, spatial)
    for index in range(past.length):
        t, r, c = index // (rows * columns), index // columns % rows, index % columns
        cells = [
            (min(4 * t + i, 5) - 6, 2 * r + y, 2 * c + x)
            for i in range(4)
            for y in range(2)
            for x in range(2)
        ]
        expected = [
            sum(cmath.exp(1j * cell[axis] * 10000.0 ** (-2 * i / size)) for cell in cells) / 16
            for axis, size in enumerate(dims)
            for i in range(size // 2)
        ]
        row = table[start + index]
        found = torch.complex(row[: dim // 2], row[dim // 2 :])
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_frames_that_are_asked_for_have_their_own_ids() -> None:
    shape, asked = editor(), (-9, -4, -1)
    past = tuple(history_segments(shape, (10, 12, 20), "2x2x2"))
    target = Segment(role="target", grid=(3, 12, 20), taus=asked)
    plan = TokenPlan(segments=(target, *past), shape=shape, merge="off")
    taus = plan.positions()[: target.length, 0].reshape(3, -1)
    assert taus.tolist() == [[tau] * 60 for tau in asked]


@pytest.mark.parametrize(
    ("rate", "grid", "words"),
    [
        ("2x2x1", (4, 12, 20), "no history encoder"),
        ("4x4x2", (4, 7, 20), "8x8 latent cells, the video has 7x20"),
        ("2x2x4", (3, 12, 20), "covers 4 latent frames, the history has 3"),
        ("2x3x1", (4, 12, 20), "as many rows as columns"),
    ],
)
def test_refused(rate: str, grid: tuple[int, int, int], words: str) -> None:
    shape = editor() if "no history" not in words else replace(editor(), history=None)
    even = (grid[0], grid[1] // 2 * 2, grid[2])
    with pytest.raises(RequestError, match=words):
        past = tuple(history_segments(shape, grid, rate))
        TokenPlan(segments=(Segment(role="target", grid=even), *past), shape=shape)
    with pytest.raises(RequestError, match="2x2x2"):
        turn_plan(editor("2x2x2"), (4, 16, 16), (4,), history="4x4x2")
