"""Guidance: v_neg + scale (v_pos - v_neg), in float32, without a branch that cancels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mv2v_engine.sampling.guidance import guided_velocity, needs_guidance

LATENTS = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
TEXT, NEGATIVE = torch.tensor([2.0]), torch.tensor([-1.0])
TIMESTEP = torch.tensor([500.0])


class _Model:
    """A velocity that shows its arguments, and counts its calls."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype, self.texts = dtype, list[float]()

    def __call__(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        self.texts.append(float(text))
        return (latents * text + timestep / 1000).to(self.dtype)


@pytest.mark.parametrize("scale", [0.0, 2.0, 5.0])
def test_formula(scale: float) -> None:
    model = _Model()
    got = guided_velocity(model, LATENTS, TIMESTEP, TEXT, NEGATIVE, scale)
    positive, negative = LATENTS * 2 + 0.5, -LATENTS + 0.5
    torch.testing.assert_close(got, negative + scale * (positive - negative))
    assert sorted(model.texts) == [-1.0, 2.0]


@pytest.mark.parametrize(("negative", "scale"), [(NEGATIVE, 1.0), (None, 5.0)])
def test_one_forward_where_one_suffices(negative: Tensor | None, scale: float) -> None:
    model = _Model()
    got = guided_velocity(model, LATENTS, TIMESTEP, TEXT, negative, scale)
    assert model.texts == [2.0]
    torch.testing.assert_close(got, LATENTS * 2 + 0.5)


def test_half_precision_velocities_are_summed_in_float32() -> None:
    model = _Model(torch.bfloat16)
    got = guided_velocity(model, LATENTS, TIMESTEP, TEXT, NEGATIVE, 5.0)
    positive = (LATENTS * 2 + 0.5).bfloat16().float()
    negative = (-LATENTS + 0.5).bfloat16().float()
    assert got.dtype == torch.float32
    assert torch.equal(got, negative + 5.0 * (positive - negative))


def test_needs_guidance() -> None:
    assert needs_guidance(5.0) and needs_guidance(0.0) and not needs_guidance(1.0)
