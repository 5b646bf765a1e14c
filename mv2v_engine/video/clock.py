"""The time stamps of a video as ticks of one constant rate, with every frame on a tick of its own.

A constant rate comes through frame for frame. A variable one gets its nominal rate, and frames that
are held longer are repeated, so that none is lost and each is shown when it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np

# seconds since the first frame, float64
_Times: TypeAlias = "np.ndarray[Any, Any]"

_DEFAULT_RATE = Fraction(25)
# nominal rates of cameras and screens; NTSC's beside their neighbours
_STANDARD = (
    *(Fraction(rate) for rate in (1, 2, 3, 4, 5, 6, 8, 10, 12)),
    *(Fraction(15000, 1001), Fraction(15), Fraction(20)),
    *(Fraction(24000, 1001), Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(30)),
    *(Fraction(rate) for rate in (48, 50)),
    *(Fraction(60000, 1001), Fraction(60)),
    *(Fraction(rate) for rate in (72, 75, 90, 100, 120, 144, 165, 200, 240, 300, 480, 500, 1000)),
)
# ticks that a video may be stretched to by its holds; far more than anybody edits
_MAX_TICKS = 1 << 20
# the part of a frame by which stamps may miss their ticks beside rounding to the time base
_SLACK = 0.1
# frames a second up to which a nominal rate is looked for, however slow most frames are
_USUAL_MOST = 121


def clock(
    num_frames: int,
    stamps: Sequence[int],
    time_base: Fraction | None,
    rates: Sequence[Fraction | None],
    *,
    guesses: bool = False,
) -> tuple[Fraction, tuple[int, ...], str | None]:
    """The constant rate, the stored frame of each of its ticks, and a note if they are not all one.

    stamps: increasing, one a frame, or none. rates: what the file says of itself.
    guesses: its container only guesses the last stamps, as MPEG's do.
    """
    nominal = [rate for rate in rates if rate]
    identity = tuple(range(num_frames))
    if len(stamps) < 2 or not time_base:
        return (nominal or [_DEFAULT_RATE])[0], identity, None
    ticks_of_base = np.array(stamps, np.int64) - stamps[0]
    seconds = ticks_of_base * float(time_base)
    measured = (num_frames - 1) / ((stamps[-1] - stamps[0]) * time_base)
    for rate in nominal:
        # the whole span must fit the rate, up to the rounding of stamps to the time base
        slack = Fraction(1, 20) + rate * time_base * 3 / 2
        if abs(rate / measured - 1) * (num_frames - 1) <= slack and _drift(seconds, rate) <= 0.5:
            return rate, identity, None
    shortest = int(np.diff(ticks_of_base).min()) * time_base
    # two stamps that nearly meet do not make a thousand frames a second of a film
    usual = 1 / float(np.median(np.diff(seconds)))
    most = max(_USUAL_MOST, 2.1 * usual)
    candidates = sorted(rate for rate in {*nominal, *_STANDARD, 1 / shortest} if rate <= most)
    held = None if guesses else _fitting(seconds, candidates, time_base, shortest)
    if held is None:
        if _drift(seconds, measured) <= 0.5:
            return measured, identity, None
        for rate in nominal:
            if _drift(seconds, rate) <= 1 + rate * time_base:  # never more than a frame off
                return rate, identity, None
        held = _fitting(seconds, candidates, time_base, shortest) if guesses else None
    if held is None:
        short = [rate for rate in candidates if _is_short(seconds, rate)]
        held = min(short, key=lambda rate: _num_lost(seconds, rate), default=measured)
    ticks = np.rint(seconds * float(held)).astype(np.int64)
    # where two frames lie on one tick, the later one
    order = np.repeat(identity, np.diff(ticks, append=ticks[-1] + 1)).tolist()
    note = f"its frame rate varies: at {float(held):g} frames a second, "
    if lost := num_frames - len(set(order)):
        return held, tuple(order), f"{note}{lost} of {num_frames} frames share another's place"
    if len(order) > num_frames:
        note += f"held frames are repeated ({num_frames} became {len(order)})"
        return held, tuple(order), note
    return held, tuple(order), None


def _fitting(
    times: _Times,
    candidates: Sequence[Fraction],
    time_base: Fraction,
    shortest: Fraction,
) -> Fraction | None:
    """The slowest rate on whose ticks all frames lie; of those within 1 %, the best fit."""
    found: list[tuple[float, Fraction]] = []
    for rate in candidates:
        # no finer than the frames: on a fine enough grid, any stamp lies on a tick
        is_finer = (shortest - time_base) * rate > Fraction(21, 20)
        if is_finer or (found and rate > found[0][1] * Fraction(101, 100)):
            break
        ticks = _ticks(times, rate)
        if ticks is None:
            continue
        off = float(np.abs(times * float(rate) - ticks).max())
        if off <= _SLACK + float(rate * time_base):
            found.append((off, rate))
    return min(found)[1] if found else None


def _ticks(times: _Times, rate: Fraction) -> np.ndarray[Any, Any] | None:
    """The tick of each frame; None if two share one, or there are too many."""
    if not _is_short(times, rate):
        return None
    ticks = np.rint(times * float(rate)).astype(np.int64)
    return ticks if bool((np.diff(ticks) > 0).all()) else None


def _is_short(times: _Times, rate: Fraction) -> bool:
    """Whether the ticks of a rate are few enough to be listed."""
    return bool(times[-1] * float(rate) <= max(_MAX_TICKS, 4 * len(times)))


def _num_lost(times: _Times, rate: Fraction) -> int:
    """Frames that share their tick with another."""
    return len(times) - len(np.unique(np.rint(times * float(rate))))


def _drift(times: _Times, rate: Fraction) -> float:
    """The most that a frame is away from the tick of its number, in frames."""
    return float(np.abs(times * float(rate) - np.arange(len(times))).max())
