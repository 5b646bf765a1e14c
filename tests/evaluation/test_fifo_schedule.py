"""The diagonal queue: every frame takes every step once, in order, and leaves clean."""

from __future__ import annotations

import pytest

from mv2v_engine.evaluation.fifo_schedule import fifo_schedule

CASES = [(22, 10, 5, False), (3, 10, 5, False), (1, 4, 4, False), (7, 8, 4, True), (5, 4, 4, True)]
CASES += [(7, 10, 5, True), (4, 6, 3, True), (3, 2, 1, True)]


@pytest.mark.parametrize(("frames", "steps", "model", "lookahead"), CASES)
def test_every_frame_takes_every_step_once(
    frames: int, steps: int, model: int, lookahead: bool
) -> None:
    queue: list[int | None] = [None] * steps  # the video's frame in each place
    taken = dict.fromkeys(range(frames), 0)
    finished = []
    iterations = list(fifo_schedule(frames, steps, model, lookahead=lookahead))
    assert len(iterations) == frames + steps - 1
    for number, iteration in enumerate(iterations):
        queue[-1] = number if number < frames else None
        kept = []
        for forward in iteration.forwards:
            assert len(forward.frames) == len(forward.levels) == len(forward.places) == model
            for frame, level, place in zip(
                forward.frames, forward.levels, forward.places, strict=True
            ):
                held = queue[place]
                assert 0 <= frame < frames and level == steps - 1 - place
                if held is not None:
                    assert frame == held and taken[held] == level
            kept += [forward.places[offset] for offset in forward.kept]
        assert sorted(kept) == list(range(steps))  # each place once
        for held in queue:
            if held is not None:
                taken[held] += 1
        assert iteration.finished == queue[0]
        if queue[0] is not None:
            finished.append(queue[0])
        queue = [*queue[1:], None]
    assert finished == list(range(frames)) and set(taken.values()) == {steps}


def test_blocks_of_one_iteration() -> None:
    first, *_, last = fifo_schedule(6, 4, 2)
    assert [forward.frames for forward in first.forwards] == [(0, 0), (0, 0)]
    assert [forward.levels for forward in first.forwards] == [(1, 0), (3, 2)]
    assert first.finished is None
    assert [forward.frames for forward in last.forwards] == [(5, 5), (5, 5)]
    assert last.finished == 5
    fifth = list(fifo_schedule(6, 4, 2))[4]
    assert [forward.frames for forward in fifth.forwards] == [(3, 4), (1, 2)]
    assert fifth.finished == 1


def test_lookahead_keeps_what_lies_behind_cleaner_frames() -> None:
    plain = next(iter(fifo_schedule(9, 8, 4)))
    ahead = next(iter(fifo_schedule(9, 8, 4, lookahead=True)))
    assert len(plain.forwards) == 2 and len(ahead.forwards) == 4
    odd = next(iter(fifo_schedule(9, 6, 5, lookahead=True)))
    assert [forward.places[0] for forward in odd.forwards] == [1, 0, 0]
    assert [forward.kept for forward in odd.forwards] == [(3, 4), (2, 3), (0, 1)]
    for forward in ahead.forwards[:-1]:
        assert forward.kept == (2, 3)
    assert ahead.forwards[-1].places == (0, 1, 2, 3) and ahead.forwards[-1].kept == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "lookahead", "message"),
    [
        ((0, 4, 4), False, "must be at least 1, got 0, 4 and 4"),
        ((9, 10, 4), False, "a queue of 10 steps must be cut into blocks of 4"),
        ((9, 2, 4), True, "hold a forward's 4"),
        ((9, 9, 5), True, "cut into blocks of 2"),
    ],
)
def test_lengths_that_do_not_fit(
    arguments: tuple[int, int, int], lookahead: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        next(fifo_schedule(*arguments, lookahead=lookahead))
