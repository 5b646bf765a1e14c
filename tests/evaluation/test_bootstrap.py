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


def test_nothing_is_a_share_of_a_way_that_may_be_none() -> None:
    first, best = [1.0, 2.0, 3.0, 4.0], [0.5, 1.0, 1.5, 2.0]
    share = bootstrap.share(first, [0.75, 1.5, 2.25, 3.0], best)
    assert share is not None
    assert (share.value, share.low, share.high) == pytest.approx((0.5, 0.5, 0.5))
    # what is better counts up or down
    assert bootstrap.share(best, first, first) == bootstrap.share(first, best, best)
    # the best of these is below the first in half of the scenes alone
    assert bootstrap.share(first, first, [1.1, 1.9, 3.1, 3.9]) is None
    assert bootstrap.share(first, first, first) is None
