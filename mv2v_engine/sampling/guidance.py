"""Classifier-free guidance: two forwards that differ in text alone (METHOD 8)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def needs_guidance(guidance_scale: float) -> bool:
    """At scale 1 the negative branch cancels, so it is not computed."""
    return guidance_scale != 1.0


def guided_velocity(
    velocity: Velocity,
    latents: Tensor,
    timestep: Tensor,
    text: Tensor,
    negative_text: Tensor | None,
    guidance_scale: float,
) -> Tensor:
    """v_neg + scale (v_pos - v_neg), summed in float32.

    velocity(latents, timestep, text) is one forward. negative_text None: no guidance.
    """
    positive = velocity(latents, timestep, text).float()
    if negative_text is None or not needs_guidance(guidance_scale):
        return positive
    negative = velocity(latents, timestep, negative_text).float()
    return negative + guidance_scale * (positive - negative)
