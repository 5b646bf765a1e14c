"""The time stamps of a video as ticks of one constant rate, with every frame on a tick of its own.

A constant rate comes through frame for frame. A variable one gets its nominal rate, and frames that
are held longer are repeated, so that none is lost and each is shown when it was.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

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
# of a frame, by which stamps may miss their ticks beside the rounding to the time base
_SLACK = Fraction(1, 10)


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
    seconds = [(stamp - stamps[0]) * time_base for stamp in stamps]
    measured = (num_frames - 1) / seconds[-1]
    half = Fraction(1, 2)
    for rate in nominal:
        # the whole span must fit the rate, up to the rounding of stamps to the time base
        slack = Fraction(1, 20) + rate * time_base * 3 / 2
        if abs(rate / measured - 1) * (num_frames - 1) <= slack and _drift(seconds, rate) <= half:
            return rate, identity, None
    shortest = min(later - earlier for earlier, later in pairwise(seconds))
    candidates = sorted({*nominal, *_STANDARD, 1 / shortest})
    held = None if guesses else _fitting(seconds, candidates, time_base, shortest)
    if held is None:
        if _drift(seconds, measured) <= half:
            return measured, identity, None
        for rate in nominal:
            if _drift(seconds, rate) <= 1 + rate * time_base:  # never more than a frame off
                return rate, identity, None
        held = _fitting(seconds, candidates, time_base, shortest) if guesses else None
    if held is None:
        held = next((rate for rate in candidates if _ticks(seconds, rate) is not None), None)
    ticks = None if held is None else _ticks(seconds, held)
    if held is None or ticks is None:
        return measured, *_nearest(seconds, measured)
    order = [
        index
        for index, (tick, following) in enumerate(pairwise([*ticks, ticks[-1] + 1]))
        for _ in range(following - tick)
    ]
    note = None
    if len(order) > num_frames:
        note = (
            f"its frame rate varies: at {float(held):g} frames a second, held frames are repeated "
            f"({num_frames} became {len(order)})"
        )
    return held, tuple(order), note


def _fitting(
    seconds: Sequence[Fraction],
    candidates: Sequence[Fraction],
    time_base: Fraction,
    shortest: Fraction,
) -> Fraction | None:
    """The slowest rate on whose ticks all frames lie; of those within 1 %, the best fit."""
    found: list[tuple[Fraction, Fraction]] = []
    for rate in candidates:
        # no finer than the frames: on a fine enough grid, any stamp lies on a tick
        is_finer = (shortest - time_base) * rate > Fraction(21, 20)
        if is_finer or (found and rate > found[0][1] * Fraction(101, 100)):
            break
        ticks = _ticks(seconds, rate)
        if ticks is None:
            continue
        off = max(abs(second * rate - tick) for second, tick in zip(seconds, ticks, strict=True))
        if off <= _SLACK + rate * time_base:
            found.append((off, rate))
    return min(found)[1] if found else None


def _ticks(seconds: Sequence[Fraction], rate: Fraction) -> list[int] | None:
    """The tick of each frame; None if two share one, or there are too many."""
    if seconds[-1] * rate > max(_MAX_TICKS, 4 * len(seconds)):
        return None
    ticks: list[int] = []
    for second in seconds:
        ticks.append(round(second * rate))
        if len(ticks) > 1 and ticks[-1] <= ticks[-2]:
            return None
    return ticks


def _nearest(seconds: Sequence[Fraction], rate: Fraction) -> tuple[tuple[int, ...], str]:
    """As many ticks as frames, each with the frame nearest in time: no rate holds all of them."""
    order = []
    for tick in range(len(seconds)):
        time = tick / rate
        after = min(bisect_left(seconds, time), len(seconds) - 1)
        before = max(after - 1, 0)
        order.append(before if time - seconds[before] <= seconds[after] - time else after)
    lost = len(seconds) - len(set(order))
    return tuple(order), (
        f"its frame rate varies too much for one rate: at {float(rate):.4g} frames a second, "
        f"{lost} of {len(seconds)} frames are left out"
    )


def _drift(seconds: Sequence[Fraction], rate: Fraction) -> Fraction:
    """The most that a frame is away from the tick of its number, in frames."""
    return max(abs(second * rate - tick) for tick, second in enumerate(seconds))
