"""Admission: the budget, the order, and nobody waits for a younger one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mv2v_engine.engine.batch import admit

SIZES = st.lists(st.integers(1, 100), min_size=1, max_size=30)


@given(SIZES, st.integers(1, 150), st.integers(0, 6))
def test_a_pack_keeps_its_budget_and_its_order(
    sizes: list[int], budget: int, overtaking: int
) -> None:
    admitted = admit(sizes, budget, overtaking=overtaking)
    # the oldest always runs, and alone if it is too large
    assert admitted[0] == 0 and admitted == sorted(set(admitted))
    assert sum(sizes[i] for i in admitted) <= max(budget, sizes[0])
    waiting = [i for i in range(len(sizes)) if i not in admitted]
    for i in waiting:
        # nobody waits who would fit beside the older ones, unless places are up
        used = sum(sizes[j] for j in admitted if j < i)
        assert used + sizes[i] > budget or i - waiting[0] > overtaking
    assert all(i <= waiting[0] + overtaking for i in admitted) if waiting else True


@given(SIZES, st.integers(1, 150), st.integers(0, 6), st.integers(0, 29))
def test_a_younger_turn_changes_nothing_for_an_older_one(
    sizes: list[int], budget: int, overtaking: int, cut: int
) -> None:
    whole = admit(sizes, budget, overtaking=overtaking)
    some = admit(sizes[: cut + 1], budget, overtaking=overtaking)
    assert some == [i for i in whole if i <= cut]


@given(
    st.lists(st.tuples(st.integers(1, 100), st.integers(1, 6)), min_size=1, max_size=12),
    st.integers(1, 150),
    st.integers(0, 4),
)
def test_every_turn_is_served_within_the_steps_of_older_ones(
    turns: list[tuple[int, int]], budget: int, overtaking: int
) -> None:
    """(tokens, steps) of turns; ticks until none is left."""
    left = {number: steps for number, (_, steps) in enumerate(turns)}
    begun: set[int] = set()
    for tick in range(1, sum(left.values()) + 1):
        queue = sorted(left)
        admitted = [
            queue[i]
            for i in admit([turns[number][0] for number in queue], budget, overtaking=overtaking)
        ]
        begun |= set(admitted)
        # those that ran before and now wait hold memory
        assert len((begun & set(queue)) - set(admitted)) <= overtaking
        for number in admitted:
            left[number] -= 1
            if not left[number]:
                del left[number]
                # no later than if the turns ran one after the other
                assert tick <= sum(steps for _, steps in turns[: number + 1])
    assert not left


def test_sizes_are_read_no_further_than_needed() -> None:
    def sizes(known: int) -> Iterator[int]:
        yield from [4, 3, 9, 2, 9, 9][:known]
        raise AssertionError("one size too many")

    assert admit(sizes(2), 7) == [0, 1]
    assert admit(sizes(5), 10, overtaking=2) == [0, 1, 3]
    with pytest.raises(AssertionError):
        admit(sizes(5), 10, overtaking=3)
