"""The runner: denoises one turn on a token plan, step by step.

With static conditioning the first forward keeps the conditioning's K and V, and every later one
runs the target alone over them (METHOD 13).

C latent channels, F H W latent grid.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mv2v_engine.defaults import inference
from mv2v_engine.engine.branch import Branch, ForwardKind
from mv2v_engine.engine.buffers import Conditioning, StepBuffers, copied
from mv2v_engine.engine.lease import Lease
from mv2v_engine.errors import NotFiniteError
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.forward_pass import TargetResidual
from mv2v_engine.models.packed import Sample
from mv2v_engine.models.static_cache import ConditioningCache
from mv2v_engine.models.token_merge import MergeRecord
from mv2v_engine.parallel.context import ContextGroup
from mv2v_engine.progress import CancelToken, StepDone
from mv2v_engine.sampling.flow_match import Solver
from mv2v_engine.sampling.guidance import guide
from mv2v_engine.sampling.step_cache import computed_steps, relative_changes
from mv2v_engine.tokens.flops import FORWARDS, Work, exact_work
from mv2v_engine.tokens.plan import TokenPlan

if TYPE_CHECKING:
    from mv2v_engine.engine.graphs import Graphs

STAGE = "sampling"
_LEAVES = "steps that reuse what earlier ones left run eagerly"


@dataclass(frozen=True, kw_only=True, eq=False)
class NoisyTurn:
    """A turn before its first step: what is denoised, on what, and by which schedule.

    noise: [1, C, F, H, W], on any device; never written to. solver: of this turn alone, since it
    may remember its steps.
    """

    transformer: MV2VTransformer
    plan: TokenPlan
    conditioning: Conditioning
    noise: Tensor
    solver: Solver
    guidance_scale: float

    @property
    def device(self) -> torch.device:
        """Where its forwards run."""
        return next(self.transformer.parameters()).device


@dataclass(frozen=True, eq=False)
class Denoised:
    """Latents float32 [C, F, H, W]; the last step's merges, or the kept ones; what was run.

    graphs: how the steps ran. reuse: which of them ran the blocks; None if all did. Both are plain
    data for the report.
    """

    latents: Tensor
    records: tuple[MergeRecord, ...]
    work: Mapping[Work, int]
    graphs: dict[str, Any]
    reuse: dict[str, Any] | None = None

    @property
    def num_forwards(self) -> int:
        return sum(self.work.get(kind, 0) for kind in FORWARDS)


class Denoiser:
    """One turn under way: its latents between two steps, and what the next step needs.

    `step` runs a step alone, with graphs where they serve. Whoever runs the branches' forwards
    elsewhere, in a pack with other turns', hands their velocities to `advance`.
    packed_steps: how many were run in a pack; counted by who packs.
    why_eager: what a turn says that never asked for graphs.
    step_cache: below which change of the modulation a step runs no block; None runs all
        (`sampling.step_cache`). Such a turn's steps run eagerly and alone: what a step leaves for
        later ones lies where it happens to.
    """

    why_eager = "no step ran alone"
    context: ContextGroup | None = None  # the ranks that share a forward's tokens

    def __init__(
        self,
        turn: NoisyTurn,
        *,
        graphs: Graphs | None = None,
        step_cache: float | None = None,
    ) -> None:
        device, solver, scale = turn.device, turn.solver, turn.guidance_scale
        self.transformer, self.plan, self.solver = turn.transformer, turn.plan, solver
        self.guidance_scale = scale
        self.timesteps = solver.timesteps.to(device)
        self.index, self.total, self.packed_steps = 0, len(self.timesteps), 0
        self._deltas = None if solver.deltas is None else solver.deltas.to(device)
        self._step_cache = step_cache
        self.computed = (True,) * self.total
        if step_cache is not None:
            self.computed = schedule(turn.transformer, self.timesteps, step_cache)
        self._graphs, self._asked = graphs, step_cache is not None
        why = _LEAVES if self._asked else "graphs are off" if graphs is None else self.why_eager
        self._lease = Lease(graphs, None, why)
        # kept K and V depend on no text, so the branches share them
        is_static = turn.plan.conditioning == "static"
        self.cache = ConditioningCache(turn.plan) if is_static else None
        given, has_deltas = (turn.conditioning, turn.noise, scale), self._deltas is not None
        self._work_on(StepBuffers.of_turn(*given, device=device, moves_latents=has_deltas))

    def _work_on(self, buffers: StepBuffers) -> None:
        self.buffers, given = buffers, buffers.conditioning
        self.branches = [
            Branch(self.transformer, self.plan, given, text, self.cache, self.context)
            for text in given.texts
        ]
        if self._step_cache is not None:
            for branch in self.branches:
                branch.residual = TargetResidual()

    @property
    def is_finished(self) -> bool:
        return self.index == self.total

    @property
    def latents(self) -> Tensor:
        """Float32 [1, C, F, H, W], which the next step moves in place."""
        return self.buffers.latents

    @property
    def noisy(self) -> Tensor:
        """The target as the next step's forwards take it, `StepBuffers.noisy`."""
        return self.buffers.noisy

    @property
    def timestep(self) -> Tensor:
        """Of the next step, [1]."""
        return self.timesteps[self.index : self.index + 1]

    @inference
    def step(self) -> None:
        """One step, alone."""
        if self._graphs is not None and not self._asked:
            self._take(self._graphs)
        for branch in self.branches:
            if branch.cache is None:
                branch.records.clear()  # of a step in a pack: a replay leaves none with the branch
        if not self.computed[self.index]:
            self.advance([branch.skipped(self.noisy, self.timestep) for branch in self.branches])
            return
        self._load_step()
        kinds = tuple(branch.kind for branch in self.branches)
        is_repeatable = all(branch.is_repeatable for branch in self.branches)
        self._lease.run(kinds if is_repeatable else None, self._forward)
        self._end_step()

    def samples(self) -> list[Sample] | None:
        """The next step's forwards for a pack, one a branch; None if the step has to run alone."""
        if self._step_cache is not None:
            return None
        noisy, timestep = self.noisy, self.timestep
        samples = [branch.sample(noisy, timestep) for branch in self.branches]
        ready = [sample for sample in samples if sample is not None]
        return ready if len(ready) == len(samples) else None

    @inference
    def advance(self, velocities: Sequence[Tensor]) -> None:
        """End a step with the velocities of its branches, in their order."""
        self._load_step()
        self._guide(velocities)
        self._end_step()

    def _take(self, graphs: Graphs) -> None:
        """Move to the buffers of captured steps, if graphs serve this turn."""
        self._asked = True
        if self.cache is not None and self.cache.is_filled:
            self._lease = Lease(graphs, None, "its conditioning was kept before a step ran alone")
            return
        self._lease = graphs.lease(self.transformer, self.plan, self.buffers)
        if self._lease.buffers is not None:
            self._work_on(self._lease.buffers)
        if self.cache is not None and self._lease.kept is not None:
            self.cache.keep_in(self._lease.kept)

    def _load_step(self) -> None:
        self.buffers.timestep.copy_(self.timestep)
        if self._deltas is not None:
            self.buffers.delta.copy_(self._deltas[self.index : self.index + 1])

    def _forward(self) -> list[ForwardKind]:
        """All of a step that runs on the device: what is captured. The forwards that it ran."""
        noisy, timestep = self.noisy, self.buffers.timestep
        kinds, velocities = list[ForwardKind](), []
        for branch in self.branches:
            kinds.append(branch.kind)
            velocities.append(branch.velocity(noisy, timestep))
        self._guide(velocities)
        if self.buffers.records is not None and self.branches[0].records:
            self.buffers.keep(self.branches[0].records)
            for branch in self.branches:
                branch.records.clear()
        return kinds

    def _guide(self, velocities: Sequence[Tensor]) -> None:
        """Guidance, and the latents' move unless the solver makes it."""
        buffers = self.buffers
        velocity = guide(velocities, buffers.guidance_scale)
        if buffers.velocity is None:
            buffers.latents.add_(velocity * buffers.delta)
            buffers.count_finite()
        else:
            buffers.velocity.copy_(velocity)

    def _end_step(self) -> None:
        latents, velocity = self.buffers.latents, self.buffers.velocity
        if velocity is not None:
            # the solver remembers what it is given, the next step writes over it
            latents.copy_(self.solver.step(velocity.clone(), self.index, latents.clone()))
            self.buffers.count_finite()
        self.index += 1

    def work(self) -> dict[Work, int]:
        """What the steps run, in all branches together."""
        branches, skipped = len(self.branches), self.computed.count(False)
        work = exact_work(self.plan, (self.total - skipped) * branches)
        if self._step_cache is None:
            return work
        return {**work, "residual": skipped * branches, "schedule": self.total}

    def result(self) -> Denoised:
        """What the steps made, no longer written to.

        Raises:
            NotFiniteError: a step gave latents that are not finite.
        """
        self._require_finite()
        # a forward that ran elsewhere has left its merges with the branch
        records = tuple(self.branches[0].records) or copied(self.buffers.records or ())
        latents, reuse = self.buffers.latents[0].clone(), None
        if self._step_cache is not None:
            steps = [step for step, runs in enumerate(self.computed) if runs]
            reuse = {"step_cache": self._step_cache, "steps_computed": steps}
        return Denoised(latents, records, self.work(), self.graph_report(), reuse)

    def _require_finite(self) -> None:
        """The one place of a turn's steps that waits for the device."""
        finite = int(self.buffers.finite_steps)
        if finite == self.index:
            return
        raise not_finite(
            f"step {finite + 1} of {self.total}", self.transformer, self.guidance_scale
        )

    @property
    def awaits_capture(self) -> bool:
        """Whether a later step will be captured, as far as is known."""
        return self._lease.awaits_capture

    def graph_report(self) -> dict[str, Any]:
        """How the steps so far ran, as plain data."""
        return self._lease.report(self.index)

    def parallel_report(self) -> dict[str, Any] | None:
        """How the steps ran over several processes; None where one ran them."""
        return None

    def release(self) -> None:
        """Let go of what is kept: an error's traceback would hold it as long as the error lives."""
        for branch in self.branches:
            branch.release()
        self._lease.release()


def schedule(
    transformer: MV2VTransformer, timesteps_N: Tensor, threshold: float
) -> tuple[bool, ...]:
    """For each timestep whether its blocks run: a function of the weights and the steps alone."""
    with torch.no_grad():
        _, modulation = transformer.condition_embedder.time(timesteps_N)
    return computed_steps(relative_changes(modulation), threshold)


def not_finite(step: str, transformer: MV2VTransformer, guidance_scale: float) -> NotFiniteError:
    """What to raise after a step that gave latents that are not finite. step: its name."""
    dtype = str(next(transformer.parameters()).dtype).removeprefix("torch.")
    wider = "use bfloat16 or float32, " if dtype == "float16" else ""
    # a scale of 1 or less makes no velocity larger than those that the model computed
    at, lower = "", ""
    if guidance_scale > 1:
        at, lower = f"at guidance_scale {guidance_scale:g} ", "lower guidance_scale, "
    other = "or " if wider or lower else ""
    return NotFiniteError(
        f"{step} gave latents that are not finite, {at}in {dtype}; {wider}{lower}{other}look for "
        "damaged weights with `run inspect PATH --deep`"
    )


@dataclass(frozen=True, eq=False)
class StepDue:
    """A turn waits until its next step has been run by whoever drives it."""

    denoiser: Denoiser


def denoise(denoiser: Denoiser, cancel: CancelToken) -> Generator[StepDone, None, Denoised]:
    """Run a turn to its end, alone; yields after every step.

    Raises:
        CancelledError: between two steps, if the token was set.
        NotFiniteError: a step gave latents that are not finite; known at the end.
    """
    with closing(stepwise(denoiser, cancel)) as turn:
        while True:
            try:
                event = next(turn)
            except StopIteration as stop:
                denoised: Denoised = stop.value
                return denoised
            if isinstance(event, StepDue):
                denoiser.step()
            else:
                yield event


def stepwise(
    denoiser: Denoiser, cancel: CancelToken
) -> Generator[StepDone | StepDue, None, Denoised]:
    """As `denoise`, with every step left to the caller."""
    began, total = time.monotonic(), denoiser.total
    try:
        while not denoiser.is_finished:
            cancel.check()
            yield StepDue(denoiser)
            done = denoiser.index
            yield StepDone(STAGE, done, total, (time.monotonic() - began) / done * (total - done))
        cancel.check()
        return denoiser.result()
    finally:
        denoiser.release()
