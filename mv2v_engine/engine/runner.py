"""The runner: denoises one turn on a token plan, step by step.

With static conditioning the first forward keeps the conditioning's K and V, and every later one
runs the target alone over them (METHOD 13).

C latent channels, F H W latent grid, V camera tracks.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.static_cache import ConditioningCache
from mv2v_engine.models.token_merge import MergeRecord
from mv2v_engine.progress import CancelToken, StepDone
from mv2v_engine.sampling.flow_match import Solver
from mv2v_engine.sampling.guidance import guided_velocity, needs_guidance
from mv2v_engine.tokens.plan import TokenPlan

STAGE = "sampling"


@dataclass(frozen=True, eq=False)
class Denoised:
    """Latents float32 [C, F, H, W]; the last step's merges, or the kept ones; forwards run."""

    latents: Tensor
    records: tuple[MergeRecord, ...]
    num_forwards: int


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What every step of a turn shares.

    latents: [1, C, F, H, W] per conditioning segment. cameras: [1, V, F, 12] or None.
    text, negative_text: [1, S, text_dim]; the latter only with guidance.
    """

    latents: Sequence[Tensor]
    cameras: Tensor | None
    text: Tensor
    negative_text: Tensor | None


def denoise(
    transformer: MV2VTransformer,
    plan: TokenPlan,
    conditioning: Conditioning,
    noise: Tensor,
    solver: Solver,
    *,
    guidance_scale: float,
    cancel: CancelToken,
) -> Generator[StepDone, None, Denoised]:
    """Denoise from `noise` [1, C, F, H, W]; yields after every step, returns `Denoised`.

    Raises:
        CancelledError: between two steps, if the token was set.
    """
    device = next(transformer.parameters()).device
    latents, timesteps = noise.to(device, torch.float32), solver.timesteps.to(device)
    total, began = len(timesteps), time.monotonic()
    records: list[MergeRecord] = []
    cache = ConditioningCache(plan) if plan.conditioning == "static" else None

    def velocity(noisy: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        if cache is not None and cache.is_filled:
            return transformer.forward_target(noisy, timestep, text, kept=cache)
        records.clear()
        return transformer(  # type: ignore[no-any-return]
            [noisy, *conditioning.latents],
            timestep,
            text,
            plan=plan,
            cameras=conditioning.cameras,
            records=records,
            keep=cache,
        )

    try:
        for index in range(total):
            cancel.check()
            with torch.no_grad():
                predicted = guided_velocity(
                    velocity,
                    latents,
                    timesteps[index : index + 1],
                    conditioning.text,
                    conditioning.negative_text,
                    guidance_scale,
                )
                latents = solver.step(predicted, index, latents)
            done = index + 1
            yield StepDone(STAGE, done, total, (time.monotonic() - began) / done * (total - done))
        cancel.check()
    finally:
        # an error's traceback would hold the K and V for as long as someone holds the error
        if cache is not None:
            cache.release()
    branches = 2 if conditioning.negative_text is not None and needs_guidance(guidance_scale) else 1
    return Denoised(latents[0], tuple(records), total * branches)
