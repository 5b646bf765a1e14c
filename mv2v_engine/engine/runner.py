"""The runner: denoises one turn on a token plan, step by step.

With static conditioning the first forward keeps the conditioning's K and V, and every later one
runs the target alone over them (METHOD 13).

C latent channels, F H W latent grid, V camera tracks.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.forward_pass import TargetResidual
from mv2v_engine.models.static_cache import ConditioningCache
from mv2v_engine.models.token_merge import MergeRecord
from mv2v_engine.progress import CancelToken, StepDone
from mv2v_engine.sampling.flow_match import Solver
from mv2v_engine.sampling.guidance import guide, needs_guidance
from mv2v_engine.tokens.flops import FORWARDS, Work, exact_work
from mv2v_engine.tokens.plan import TokenPlan

STAGE = "sampling"


@dataclass(frozen=True, eq=False)
class Denoised:
    """Latents float32 [C, F, H, W]; the last step's merges, or the kept ones; what was run.

    reuse: what an approximation did, for the report; None for an exact turn.
    """

    latents: Tensor
    records: tuple[MergeRecord, ...]
    work: Mapping[Work, int]
    reuse: dict[str, Any] | None = None

    @property
    def num_forwards(self) -> int:
        return sum(self.work.get(kind, 0) for kind in FORWARDS)


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


class Branch:
    """One guidance branch of a turn: its text, and how its forwards are run."""

    def __init__(
        self,
        transformer: MV2VTransformer,
        plan: TokenPlan,
        conditioning: Conditioning,
        text: Tensor,
        cache: ConditioningCache | None,
    ) -> None:
        self.transformer, self.plan, self.conditioning = transformer, plan, conditioning
        self.text, self.cache = text, cache
        self.residual: TargetResidual | None = None
        self.records: list[MergeRecord] = []

    def velocity(self, noisy: Tensor, timestep: Tensor) -> Tensor:
        """One forward: of the target alone once the conditioning is kept."""
        if self.cache is not None and self.cache.is_filled:
            return self.kept(noisy, timestep, self.cache)
        return self.whole(noisy, timestep)

    def kept(self, noisy: Tensor, timestep: Tensor, cache: ConditioningCache) -> Tensor:
        """A forward of the target alone."""
        return self.transformer.forward_target(
            noisy, timestep, self.text, kept=cache, residual=self.residual
        )

    def whole(self, noisy: Tensor, timestep: Tensor) -> Tensor:
        """A forward of everything, kept if there is a cache."""
        self.records.clear()
        velocity: Tensor = self.transformer(
            [noisy, *self.conditioning.latents],
            timestep,
            self.text,
            plan=self.plan,
            cameras=self.conditioning.cameras,
            records=self.records,
            keep=self.cache,
            residual=self.residual,
        )
        return velocity

    def release(self) -> None:
        if self.cache is not None:
            self.cache.release()
        if self.residual is not None:
            self.residual.release()


class Denoiser:
    """One turn under way: its latents between two steps, and what the next step needs.

    `step` runs a step alone. Whoever runs the branches' forwards elsewhere, in a pack with other
    turns' or as a captured graph, hands their velocities to `advance`.
    """

    def __init__(
        self,
        transformer: MV2VTransformer,
        plan: TokenPlan,
        conditioning: Conditioning,
        noise: Tensor,
        solver: Solver,
        *,
        guidance_scale: float,
    ) -> None:
        device = next(transformer.parameters()).device
        self.plan, self.solver, self.guidance_scale = plan, solver, guidance_scale
        self.latents = noise.to(device, torch.float32)
        self.timesteps = solver.timesteps.to(device)
        self.index, self.total = 0, len(self.timesteps)
        texts = [conditioning.text]
        if conditioning.negative_text is not None and needs_guidance(guidance_scale):
            texts.append(conditioning.negative_text)
        # kept K and V depend on no text, so the branches share them
        self.cache = ConditioningCache(plan) if plan.conditioning == "static" else None
        self.branches = [
            Branch(transformer, plan, conditioning, text, self.cache) for text in texts
        ]

    @property
    def is_finished(self) -> bool:
        return self.index == self.total

    @property
    def timestep(self) -> Tensor:
        """Of the next step, [1]."""
        return self.timesteps[self.index : self.index + 1]

    @torch.no_grad()
    def step(self) -> None:
        """One step, alone."""
        timestep = self.timestep
        self.advance([branch.velocity(self.latents, timestep) for branch in self.branches])

    @torch.no_grad()
    def advance(self, velocities: Sequence[Tensor]) -> None:
        """End a step with the velocities of its branches, in their order."""
        velocity = guide(velocities, self.guidance_scale)
        self.latents = self.solver.step(velocity, self.index, self.latents)
        self.index += 1

    def work(self) -> dict[Work, int]:
        """What the steps run, in all branches together."""
        return exact_work(self.plan, self.total * len(self.branches))

    def result(self) -> Denoised:
        return Denoised(self.latents[0], tuple(self.branches[0].records), self.work())

    def release(self) -> None:
        """Let go of what is kept: an error's traceback would hold it as long as the error lives."""
        for branch in self.branches:
            branch.release()


def denoise(denoiser: Denoiser, cancel: CancelToken) -> Generator[StepDone, None, Denoised]:
    """Run a turn to its end, alone; yields after every step.

    Raises:
        CancelledError: between two steps, if the token was set.
    """
    began, total = time.monotonic(), denoiser.total
    try:
        while not denoiser.is_finished:
            cancel.check()
            denoiser.step()
            done = denoiser.index
            yield StepDone(STAGE, done, total, (time.monotonic() - began) / done * (total - done))
        cancel.check()
    finally:
        denoiser.release()
    return denoiser.result()
