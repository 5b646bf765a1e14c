"""Approximate reuse, both kinds opt-in: kept joint conditioning, and steps that run no block.

With joint conditioning every step computes the conditioning again, because it sees the noisy
target. `reuse="approximate"` keeps its K and V from one whole forward to the next; `step_cache`
adds what the blocks added to the target before, without running them. All guidance branches do the
same at a step: guidance would multiply the difference of their errors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mv2v_engine.config import EngineConfig
from mv2v_engine.defaults import inference
from mv2v_engine.engine.graphs import Graphs
from mv2v_engine.engine.runner import Denoised, Denoiser, NoisyTurn
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.forward_pass import TargetResidual
from mv2v_engine.models.joint_cache import JointCache
from mv2v_engine.models.token_merge import MergeRecord
from mv2v_engine.sampling.step_cache import computed_steps, relative_changes
from mv2v_engine.tokens.flops import Work

Reason = Literal["first", "interval", "drift"]


@dataclass(frozen=True, eq=False)
class ReuseStep:
    """What one step did: `work` of each branch, and why if that was a refresh.

    first_drift: of the first block's output since the last refresh, the largest of all branches;
    None where it was not measured. drifts: of the K and V that a refresh replaced [blocks, 3],
    one a branch (`JointCache.drifts`).
    """

    step: int
    work: Work
    reason: Reason | None = None
    first_drift: float | None = None
    drifts: tuple[Tensor, ...] = ()


class ReusingDenoiser(Denoiser):
    """A turn whose steps reuse what earlier ones computed, as the configuration asks.

    They run eagerly: what a step leaves for later ones lies where it happens to, and a captured
    step finds nothing but what lies where it did. `kind` says what a step runs; all but "probed",
    whose gate is read on the host, are known before the turn begins.
    """

    why_eager = "steps that reuse what earlier ones left run eagerly"

    def __init__(
        self, turn: NoisyTurn, *, config: EngineConfig, graphs: Graphs | None = None
    ) -> None:
        super().__init__(turn, graphs=graphs)
        self.config = config
        self.computed: tuple[bool, ...] = (True,) * self.total
        self.done: list[ReuseStep] = []
        if config.step_cache is not None:
            self.computed = schedule(self.transformer, self.timesteps, config.step_cache)
            for branch in self.branches:
                branch.residual = TargetResidual()
        self.caches: list[JointCache] = []
        if config.reuse == "approximate":
            for branch in self.branches:
                self.caches.append(JointCache(self.plan, probes=config.reuse_drift is not None))
                branch.cache = self.caches[-1]

    @property
    def kind(self) -> Work:
        """What the next step runs, as far as it is known before: "probed" may become "whole"."""
        if not self.computed[self.index]:
            return "residual"
        if not self.caches:
            return "kept" if self.cache is not None and self.cache.is_filled else "whole"
        if self._refresh_is_due() is not None:
            return "whole"
        return "kept" if self.config.reuse_drift is None else "probed"

    def samples(self) -> None:
        """Its steps run alone: what the next one runs is decided by what this one finds."""
        return None

    @inference
    def step(self) -> None:
        kind, timestep = self.kind, self.timestep
        if kind == "residual":
            velocities = [
                self.transformer.forward_residual(
                    self.noisy, timestep, plan=self.plan, residual=branch.residual
                )
                for branch in self.branches
                if branch.residual is not None
            ]
            done = ReuseStep(self.index, kind)
        elif not self.caches:
            velocities = [branch.velocity(self.noisy, timestep) for branch in self.branches]
            done = ReuseStep(self.index, kind)
        elif self.config.reuse_drift is None:
            velocities, done = self._by_interval(timestep)
        else:
            velocities, done = self._by_drift(timestep, self.config.reuse_drift)
        self.done.append(done)
        self.advance(velocities)

    def _refresh_is_due(self) -> Reason | None:
        """Why the next step must refresh, whatever has drifted."""
        refreshed = [done.step for done in self.done if done.work == "whole"]
        if not refreshed:
            return "first"
        return "interval" if self.index - refreshed[-1] >= self.config.reuse_refresh else None

    def _by_interval(self, timestep: Tensor) -> tuple[list[Tensor], ReuseStep]:
        reason = self._refresh_is_due()
        if reason is None:
            velocities = [branch.velocity(self.noisy, timestep) for branch in self.branches]
            return velocities, ReuseStep(self.index, "kept")
        velocities = [branch.whole(self.noisy, timestep) for branch in self.branches]
        return velocities, self._refreshed(reason, None)

    def _by_drift(self, timestep: Tensor, gate: float) -> tuple[list[Tensor], ReuseStep]:
        """Run every branch's first block, and let what comes out decide for the others."""
        reason, model = self._refresh_is_due(), self.transformer
        begun, records = [], []
        for branch in self.branches:
            given = branch.conditioning
            inputs = ([self.noisy, *given.latents], timestep, branch.text)
            begun.append(
                model.begin(
                    *inputs, plan=self.plan, cameras=given.cameras, residual=branch.residual
                )
            )
            records.append(list[MergeRecord]())
            model.run_blocks(begun[-1], stop=1, records=records[-1])
        pairs = list(zip(self.caches, begun, strict=True))
        measured = [cache.probe(forward.sequence) for cache, forward in pairs]
        known = [drift for drift in measured if drift is not None]
        drift = float(torch.stack(known).max()) if known else None
        if reason is None and drift is not None and not drift < gate:
            reason = "drift"
        for cache, forward in pairs:
            if reason is None:
                forward.go_on_over(cache)
            else:
                cache.keep_output(forward.sequence)
                forward.keep_in(cache)
        velocities = []
        for branch, forward, merges in zip(self.branches, begun, records, strict=True):
            model.run_blocks(forward, records=merges)
            velocities.append(model.finish(forward))
            if reason is not None:
                branch.records = merges
        if reason is None:
            return velocities, ReuseStep(self.index, "probed", None, drift)
        return velocities, self._refreshed(reason, drift)

    def _refreshed(self, reason: Reason, drift: float | None) -> ReuseStep:
        drifts = tuple(cache.drifts for cache in self.caches if cache.drifts is not None)
        return ReuseStep(self.index, "whole", reason, drift, drifts)

    def work(self) -> dict[Work, int]:
        branches = len(self.branches)
        work: dict[Work, int] = {}
        for done in self.done:
            work[done.work] = work.get(done.work, 0) + branches
        if self.cache is not None and branches > 1:
            # with static conditioning the first branch's whole forward serves the others
            work = {**work, "whole": 1, "kept": work.get("kept", 0) + branches - 1}
        if self.config.step_cache is not None:
            work["schedule"] = self.total
        return work

    def result(self) -> Denoised:
        return replace(super().result(), reuse=self.describe())

    def describe(self) -> dict[str, Any]:
        """The reuse of the steps so far, as plain data."""
        config = self.config
        told: dict[str, Any] = {
            "conditioning": config.reuse,
            "step_cache": config.step_cache,
            "steps_computed": [step for step, runs in enumerate(self.computed) if runs],
        }
        if not self.caches:
            return told
        return {
            **told,
            "refresh": config.reuse_refresh,
            "drift_gate": config.reuse_drift,
            "refreshes": [_refresh_row(done) for done in self.done if done.work == "whole"],
            "reused": [
                {"step": done.step, "first_block_drift": _digits(done.first_drift)}
                for done in self.done
                if done.work in ("kept", "probed")
            ],
        }


def schedule(
    transformer: MV2VTransformer, timesteps_N: Tensor, threshold: float
) -> tuple[bool, ...]:
    """For each timestep whether its blocks run: a function of the weights and the steps alone."""
    with torch.no_grad():
        _, modulation = transformer.condition_embedder.time(timesteps_N)
    return computed_steps(relative_changes(modulation), threshold)


def _refresh_row(done: ReuseStep) -> dict[str, Any]:
    """A refresh: what it replaced had drifted so far, over all branches and blocks."""
    row: dict[str, Any] = {
        "step": done.step,
        "reason": done.reason,
        "first_block_drift": _digits(done.first_drift),
    }
    if done.drifts:
        all_blocks = torch.cat(done.drifts).double()
        keys, values, shares = all_blocks.unbind(1)
        row |= {
            "keys_drift": _digits(float(keys.mean())),
            "values_drift": _digits(float(values.mean())),
            "worst_keys_drift": _digits(float(keys.max())),
            "worst_values_drift": _digits(float(values.max())),
            # frames that another choice has merged since are not compared
            "compared_tokens": _digits(float(shares.mean())),
        }
    return row


def _digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
