"""Confidence intervals over scenes: the percentile bootstrap (Efron 1979).

Scenes are resampled, never pixels or turns, which depend on each other. A ratio of two
methods resamples both together, since they were measured on the same scenes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_RESAMPLES = 2000
_LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with the bounds of its 95 % interval; `count` scenes had something to measure."""

    value: float
    low: float
    high: float
    count: int


def mean(values: Sequence[float | None]) -> Estimate | None:
    """The mean over scenes; a scene without the measure is None. None if no scene has it."""
    return _estimate([values], lambda means: means[0])


def ratio(numerator: Sequence[float | None], other: Sequence[float | None]) -> Estimate | None:
    """Ratio of two means over the scenes that have both."""
    return _estimate([numerator, other], lambda means: means[0] / means[1].clamp_min(1e-12))


def difference(first: Sequence[float | None], other: Sequence[float | None]) -> Estimate | None:
    """The first mean less the other over the scenes that have both."""
    return _estimate([first, other], lambda means: means[0] - means[1])


def share(
    first: Sequence[float | None], second: Sequence[float | None], best: Sequence[float | None]
) -> Estimate | None:
    """How far the second mean is from the first on the way to the best, which is 1.

    None where the interval of best less first has 0 in it: there is no way to have a share of.
    """
    way = difference(first, best)
    if way is None or way.low <= 0 <= way.high:
        return None
    return _estimate(
        [first, second, best], lambda means: (means[0] - means[1]) / (means[0] - means[2])
    )


def _estimate(
    columns: Sequence[Sequence[float | None]], statistic: Callable[[Tensor], Tensor]
) -> Estimate | None:
    """A statistic of the columns' means [len(columns), ...] over the scenes that fill them all."""
    rows = [
        row
        for row in zip(*columns, strict=True)
        if all(value is not None and math.isfinite(value) for value in row)
    ]
    if not rows:
        return None
    table = torch.tensor(rows, dtype=torch.float64).T
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(rows), (_RESAMPLES, len(rows)), generator=generator)
    resampled = statistic(table[:, drawn].mean(2))
    tail = (1 - _LEVEL) / 2
    low, high = torch.quantile(resampled, torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return Estimate(float(statistic(table.mean(1))), float(low), float(high), len(rows))
