"""One guidance branch of a turn: its text, and how its forwards are run.

C latent channels, F H W latent grid.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mv2v_engine.engine.buffers import Conditioning
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.forward_pass import TargetResidual
from mv2v_engine.models.packed import Sample
from mv2v_engine.models.static_cache import ConditioningCache
from mv2v_engine.models.token_merge import MergeRecord
from mv2v_engine.parallel.context import ContextGroup
from mv2v_engine.tokens.plan import TokenPlan

ForwardKind = Literal["whole", "target"]


class Branch:
    """Made for a turn's whole length; it keeps what one forward leaves for the next.

    cache: where the conditioning's K and V are kept, for branches to share; None computes them in
    every forward. context: the ranks that share a forward's tokens.
    """

    def __init__(
        self,
        transformer: MV2VTransformer,
        plan: TokenPlan,
        conditioning: Conditioning,
        text: Tensor,
        cache: ConditioningCache | None,
        context: ContextGroup | None = None,
    ) -> None:
        self.transformer, self.plan, self.conditioning = transformer, plan, conditioning
        self.text, self.cache, self.context = text, cache, context
        self.residual: TargetResidual | None = None
        self.records: list[MergeRecord] = []

    @property
    def kind(self) -> ForwardKind:
        """What the next forward runs."""
        return "target" if self.cache is not None and self.cache.is_filled else "whole"

    @property
    def is_repeatable(self) -> bool:
        """Whether the next forward may be captured: it leaves nothing behind but its velocity and
        records, because a replay runs none of this class's code."""
        return self.residual is None and (self.cache is None or self.cache.is_filled)

    def velocity(self, noisy: Tensor, timestep: Tensor) -> Tensor:
        """One forward: of the target alone once the conditioning is kept.

        noisy: the target as the model takes it, `StepBuffers.noisy`.
        """
        if self.cache is not None and self.cache.is_filled:
            return self.kept(noisy, timestep, self.cache)
        return self.whole(noisy, timestep)

    def kept(self, noisy: Tensor, timestep: Tensor, cache: ConditioningCache) -> Tensor:
        """A forward of the target alone."""
        return self.transformer.forward_target(
            noisy, timestep, self.text, kept=cache, residual=self.residual, context=self.context
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
            context=self.context,
        )
        return velocity

    def skipped(self, noisy: Tensor, timestep: Tensor) -> Tensor:
        """What a step gives that runs no block, after one that did."""
        assert self.residual is not None
        return self.transformer.forward_residual(
            noisy, timestep, plan=self.plan, residual=self.residual
        )

    def release(self) -> None:
        if self.cache is not None:
            self.cache.release()
        if self.residual is not None:
            self.residual.release()

    def sample(self, noisy: Tensor, timestep: Tensor) -> Sample | None:
        """The same forward for a pack; None if it has to run alone, since it keeps K and V."""
        if self.cache is not None and not self.cache.is_filled:
            return None
        is_kept = self.cache is not None
        if not is_kept:
            self.records.clear()
        return Sample(
            latents=[noisy] if is_kept else [noisy, *self.conditioning.latents],
            timestep=timestep,
            encoder_hidden_states=self.text,
            plan=self.plan,
            cameras=self.conditioning.cameras,
            records=self.records,
            kept=self.cache,
        )
