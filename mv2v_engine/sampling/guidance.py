"""Guidance: two forwards that differ in text alone become one (METHOD 8).

Classifier-free guidance extrapolates the velocities. Adaptive projected guidance (2410.02416), as
Bernini has it, extrapolates the clean latents that they predict, by a difference that is shortened
and whose part along the prediction is halved, so that strong guidance does not oversaturate.

B batch, C latent channels, F H W latent grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

# the share of the difference along the prediction that stays, and the largest norm of a frame's
APG_PARALLEL, APG_NORM = 0.5, 50.0
_CELLS = (1, 3, 4)


def needs_guidance(guidance_scale: float) -> bool:
    """Whether the negative branch is computed: at scale 1 it cancels."""
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


def guide_chain(
    velocities: Sequence[Tensor], guidance_scale: float | Tensor, scales: Sequence[float]
) -> Tensor:
    """Words, images and video of an edit, each guided by its own scale, summed in float32.

    As Bernini has it (`rv2v`): with e of the nested conditions none, V, VI and VI with the words,
    e + s_V (e_V - e) + s_I (e_VI - e_V) + s (e_VIT - e_VI). On clean latents it is the same sum.

    velocities: of all of it, of all but the words, of the video alone, and of nothing.
    guidance_scale: of the words. scales: of the images and of the video.
    """
    parts = [velocity.float() for velocity in velocities]
    guided = parts[-1]
    steps = zip(pairwise(parts), (guidance_scale, *scales), strict=True)
    for (more, less), scale in steps:
        guided = guided + scale * (more - less)
    return guided


def guide_projected(
    velocities: Sequence[Tensor],
    guidance_scale: float | Tensor,
    latents: Tensor,
    sigma: Tensor,
) -> Tensor:
    """The velocity towards adaptively projected clean latents; of one velocity, that one.

    velocities: [B, C, F, H, W], as `guide` has them. latents: the noisy ones that they are of.
    sigma: [1], their noise level. Norms and projections are of a frame's channels and cells, as
    Bernini takes them, without momentum.
    """
    positive, *negative = (velocity.float() for velocity in velocities)
    if not negative:
        return positive
    clean, other = latents - sigma * positive, latents - sigma * negative[0]
    difference = clean - other
    norm = difference.square().sum(_CELLS, keepdim=True).sqrt()
    difference = difference * (APG_NORM / norm).clamp(max=1)
    # float64 as theirs: the part along the prediction is a small difference of large sums
    wide, along = difference.double(), clean.double()
    along = along / along.square().sum(_CELLS, keepdim=True).sqrt().clamp(min=1e-12)
    parallel = (wide * along).sum(_CELLS, keepdim=True) * along
    projected = (wide - parallel + APG_PARALLEL * parallel).to(difference.dtype)
    guided = other + guidance_scale * projected
    return (latents - guided) / sigma
