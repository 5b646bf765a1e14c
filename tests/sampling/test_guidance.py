"""Guidance: v_neg + scale (v_pos - v_neg), in float32, without a branch that cancels."""

from __future__ import annotations

import pytest
import torch

from mv2v_engine.sampling.guidance import guide, needs_guidance

POSITIVE, NEGATIVE = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0)).unbind()


@pytest.mark.parametrize("scale", [0.0, 2.0, 5.0])
def test_formula(scale: float) -> None:
    got = guide([POSITIVE, NEGATIVE], scale)
    torch.testing.assert_close(got, (1 - scale) * NEGATIVE + scale * POSITIVE)


def test_one_velocity_is_the_answer_at_any_scale() -> None:
    assert torch.equal(guide([POSITIVE], 5.0), POSITIVE)


def test_half_precision_velocities_are_summed_in_float32() -> None:
    positive, negative = POSITIVE.bfloat16(), NEGATIVE.bfloat16()
    got = guide([positive, negative], 5.0)
    assert got.dtype == torch.float32
    assert torch.equal(got, negative.float() + 5.0 * (positive.float() - negative.float()))
    assert guide([positive], 5.0).dtype == torch.float32


def test_needs_guidance() -> None:
    assert needs_guidance(5.0) and needs_guidance(0.0) and not needs_guidance(1.0)
