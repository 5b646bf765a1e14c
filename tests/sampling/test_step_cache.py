"""Which steps are computed: a pure function of the changes between them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mv2v_engine.sampling.step_cache import computed_steps, relative_changes


def test_changes_are_relative_to_the_step_before() -> None:
    modulation = torch.tensor([[1.0, -1.0], [1.0, -2.0], [3.0, -6.0]])
    assert relative_changes(modulation) == pytest.approx([0.5, 2.0])
    assert relative_changes(modulation[:1]) == []


def test_changes_add_up_until_the_threshold() -> None:
    # 0.1 + 0.1 reach 0.2, and then everything begins again; the last is computed all the same
    assert computed_steps([0.125, 0.125, 0.25, 0.125, 0.125, 0.0625], 0.25) == (
        True, False, True, True, False, True, True,
    )  # fmt: skip


@given(
    st.lists(st.floats(0, 10, allow_subnormal=False), max_size=30),
    st.floats(0, 10, allow_subnormal=False),
)
def test_a_schedule(changes: list[float], threshold: float) -> None:
    computed = computed_steps(changes, threshold)
    assert len(computed) == len(changes) + 1 and computed[0] and computed[-1]
    skipped = 0.0
    for change, runs in zip(changes, computed[1:], strict=True):
        skipped = 0.0 if runs else skipped + change
        assert skipped < threshold or runs
    if threshold == 0:
        assert all(computed)
    assert all(a or b for a, b in zip(computed_steps(changes, 0), computed, strict=True))
