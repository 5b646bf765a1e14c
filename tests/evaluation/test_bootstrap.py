"""Intervals over scenes: exact where they must be, and wide enough where they are random."""

from __future__ import annotations

import math

import pytest
import torch

from mv2v_engine.evaluation import bootstrap


def test_the_value_is_the_mean_and_none_is_left_out() -> None:
    estimate = bootstrap.mean([1.0, None, 3.0, math.nan])
    assert estimate is not None
    assert (estimate.value, estimate.count) == (2.0, 2)
    assert 1.0 <= estimate.low <= 2.0 <= estimate.high <= 3.0
    assert bootstrap.mean([None, math.nan]) is None


def test_equal_scenes_leave_no_doubt() -> None:
    estimate = bootstrap.mean([0.25] * 5)
    assert estimate == bootstrap.Estimate(0.25, 0.25, 0.25, 5)


def test_pairs_are_resampled_together() -> None:
    values = [1.0, 5.0, 2.0, 9.0, None]
    half = [0.5, 2.5, 1.0, 4.5, 7.0]
    estimate = bootstrap.ratio(half, values)
    assert estimate is not None and estimate.count == 4
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.5, 0.5, 0.5))


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered, trials = 0, 100
    for _ in range(trials):
        sample = (3 + torch.randn(40, generator=generator)).tolist()
        estimate = bootstrap.mean(sample)
        assert estimate is not None
        covered += estimate.low <= 3 <= estimate.high
        # the standard error of 40 draws is 0.158
        assert 0.35 < estimate.high - estimate.low < 0.95
    assert 86 <= covered <= 100
