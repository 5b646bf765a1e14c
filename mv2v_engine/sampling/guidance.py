"""Classifier-free guidance: two forwards that differ in text alone (METHOD 8)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def needs_guidance(guidance_scale: float) -> bool:
    """At scale 1 the negative branch cancels, so it is not computed."""
    return guidance_scale != 1.0


def guide(velocities: Sequence[Tensor], guidance_scale: float | Tensor) -> Tensor:
    """v_neg + scale (v_pos - v_neg), summed in float32; of one velocity, that one.

    velocities: the positive branch's, then the negative's if there is one. guidance_scale: a
    number, or a float32 tensor of one.
    """
    positive, *negative = (velocity.float() for velocity in velocities)
    if not negative:
        return positive
    return negative[0] + guidance_scale * (positive - negative[0])
