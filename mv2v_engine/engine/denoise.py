"""The loop of a turn: denoise on a token plan, step by step.

With static conditioning the first forward keeps the conditioning's K and V, and every later one
runs the target alone over them (METHOD 13). A turn with a step cache runs some of its steps without
the transformer's blocks (`sampling.step_cache`).

C latent channels, F H W latent grid.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from mv2v_engine.config import GuidanceMode
from mv2v_engine.defaults import inference, no_gradients
from mv2v_engine.engine.graphs import Graphs, Lease
from mv2v_engine.engine.step import Branch, Conditioning, StepBuffers, copied
from mv2v_engine.errors import NotFiniteError
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.kept import ConditioningCache, TargetResidual
from mv2v_engine.models.latent_rgb import LatentRGB
from mv2v_engine.models.merging import MergeRecord
from mv2v_engine.models.sample import Sample
from mv2v_engine.progress import CancelToken, Preview, StepDone
from mv2v_engine.sampling.flow_match import Solver, make_solver
from mv2v_engine.sampling.guidance import guide, guide_chain, guide_projected
from mv2v_engine.sampling.preview import Previewer
from mv2v_engine.sampling.step_cache import computed_steps, relative_changes
from mv2v_engine.tokens.flops import FORWARDS, Work, exact_work
from mv2v_engine.tokens.plan import TokenPlan

if TYPE_CHECKING:
    from mv2v_engine.engine.parts import Parts
    from mv2v_engine.engine.team import Team

STAGE = "sampling"
ForwardKind = Literal["whole", "target"]


@dataclass(frozen=True, eq=False)
class Denoised:
    """Latents float32 [C, F, H, W]; the last step's merges, or the kept ones; what was run.

    graphs: how the steps ran. reuse: which of them ran the blocks; None if all did. Both are plain
    data for the report. lesser: what was run of plans with less conditioning.
    """

    latents: Tensor
    records: tuple[MergeRecord, ...]
    work: Mapping[Work, int]
    graphs: dict[str, Any]
    reuse: dict[str, Any] | None = None
    lesser: tuple[tuple[TokenPlan, Mapping[Work, int]], ...] = ()

    @property
    def num_forwards(self) -> int:
        works = (self.work, *(work for _, work in self.lesser))
        return sum(work.get(kind, 0) for work in works for kind in FORWARDS)


class Denoiser:
    """One turn under way: its latents between two steps, and what the next step needs.

    `step` runs a step alone, with graphs where they serve. Whoever runs the branches' forwards
    elsewhere, in a pack with other turns', hands their velocities to `advance`.
    packed_steps: how many were run in a pack; counted by who packs. computed: for each step,
    whether it runs the blocks.

    Args:
        noise: [1, C, F, H, W], of deviation 1, on any device; never written to.
        solver: used by this turn alone, since it may remember its steps.
        guidance: how velocities are guided, as `SamplingConfig.guidance`.
        reference_scales: as `SamplingConfig.reference_scales`, for a plan with such images.
        graphs: replay captured steps. team: the processes that share every step.
        step_cache: below which change of the modulation a step runs no block; None runs all.
        previews: in whose colours pictures are taken; None takes none.
    """

    def __init__(
        self,
        *,
        transformer: MV2VTransformer,
        plan: TokenPlan,
        conditioning: Conditioning,
        noise: Tensor,
        solver: Solver,
        guidance_scale: float,
        guidance: GuidanceMode = "cfg",
        reference_scales: Sequence[float] = (),
        graphs: Graphs | None = None,
        team: Team | None = None,
        step_cache: float | None = None,
        previews: LatentRGB | None = None,
    ) -> None:
        device = next(transformer.parameters()).device
        self.transformer, self.plan, self.solver = transformer, plan, solver
        self.guidance_scale, self._step_cache = guidance_scale, step_cache
        self._guidance, self._sigmas = guidance, solver.sigmas.to(device, torch.float32)
        self.timesteps = solver.timesteps.to(device)
        self._ends = None if solver.ends is None else solver.ends.to(device)
        self.index, self.total, self.packed_steps = 0, len(self.timesteps), 0
        self._deltas = None if solver.deltas is None else solver.deltas.to(device)
        self.computed = (True,) * self.total
        if step_cache is not None:
            self.computed = schedule(transformer, self.timesteps, self._ends, step_cache)
        self._graphs, self._asked, reason = graphs, False, "no step ran alone"
        if graphs is None:
            reason = "graphs are off"
        if step_cache is not None:
            self._asked, reason = True, "steps that reuse what earlier ones left run eagerly"
        if team is not None:
            self._graphs, reason = None, "steps that several processes share run eagerly"
        self._lease: Lease[StepBuffers] = Lease(self._graphs, None, reason)
        # kept K and V depend on no text, so the branches share them
        self.cache = ConditioningCache(plan) if plan.conditioning == "static" else None
        self._scales, lesser = tuple(reference_scales), plan.lesser() if reference_scales else ()
        if conditioning.at_scale(guidance_scale).negative_text is None:
            lesser = ()
        self._lesser = lesser
        self._ranks = None if team is None else team.ranks.context
        has_deltas = self._deltas is not None
        if solver.noise_scale != 1:
            noise = noise * solver.noise_scale
        self._work_on(
            StepBuffers.of_turn(
                conditioning,
                noise,
                guidance_scale,
                device=device,
                moves_latents=has_deltas,
                has_ends=self._ends is not None,
            )
        )
        self._shared = None if team is None else team.begin(plan, self.buffers)
        self._previewer = None
        if previews is not None:
            self._previewer = Previewer(previews.to(device).picture, solver, self.latents)

    def _work_on(self, buffers: StepBuffers) -> None:
        self.buffers, given = buffers, buffers.conditioning
        self.branches = [
            Branch(
                self.transformer,
                self.plan,
                given,
                text,
                self.cache,
                self._ranks,
                None if self._step_cache is None else TargetResidual(),
            )
            for text in given.texts
        ]
        for plan, places in self._lesser:
            assert given.negative_text is not None
            less = replace(given, latents=[given.latents[place] for place in places])
            residual = None if self._step_cache is None else TargetResidual()
            text = given.negative_text
            # conditioning of its own, which nothing has room for: none is kept
            self.branches.append(Branch(self.transformer, plan, less, text, None, None, residual))

    @property
    def is_finished(self) -> bool:
        return self.index == self.total

    @property
    def latents(self) -> Tensor:
        """Float32 [1, C, F, H, W], which the next step moves in place."""
        return self.buffers.latents

    @property
    def timestep(self) -> Tensor:
        """The next step's, [1]."""
        return self.timesteps[self.index : self.index + 1]

    @property
    def end_timestep(self) -> Tensor | None:
        """Where the next step goes, [1]; None of plain flow."""
        return None if self._ends is None else self._ends[self.index : self.index + 1]

    def step(self) -> None:
        """Run one step, alone."""
        if self._graphs is not None and not self._asked:
            self._take(self._graphs)
        for branch in self.branches:
            if branch.cache is None:
                branch.records.clear()  # those of a step in a pack: a replay leaves none here
        given = (self.buffers.noisy, self.timestep, self.end_timestep)
        with no_gradients():
            if self._shared is not None:
                self.advance(self._shared.velocities(self.branches, *given))
            elif not self.computed[self.index]:
                self.advance([branch.skipped(*given) for branch in self.branches])
            else:
                self._load_step()
                if self._lease.entry is None:
                    self._forward()
                else:
                    self._lease.run(self._repeated(), self._forward)
                self._end_step()

    def samples(self) -> list[Sample] | None:
        """The next step's forwards for a pack, one a branch; None if the step has to run alone.

        That is one whose forwards keep something for later steps, or run on other processes: they
        know of one turn a step.
        """
        if self._step_cache is not None or self._shared is not None or self._keeps:
            return None
        given = (self.buffers.noisy, self.timestep, self.end_timestep)
        return [branch.sample(*given) for branch in self.branches]

    @inference
    def advance(self, velocities: Sequence[Tensor]) -> None:
        """End a step with the velocities of its branches, in their order."""
        self._load_step()
        self._guide(velocities)
        self._end_step()

    @property
    def _keeps(self) -> bool:
        """Whether the next step's forwards fill the kept K and V."""
        return self.cache is not None and not self.cache.is_filled

    def _repeated(self) -> tuple[ForwardKind, ...] | None:
        """The kinds of the next step's forwards; None if it may not be captured, since a replay
        runs none of the code that keeps something for later."""
        if self._keeps or self._step_cache is not None:
            return None
        return tuple("whole" if branch.cache is None else "target" for branch in self.branches)

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
        if self._previewer is not None:
            self._previewer.before(self.buffers.latents)
        self.buffers.timestep.copy_(self.timestep)
        self.buffers.sigma.copy_(self._sigmas[self.index : self.index + 1])
        if self.buffers.end_timestep is not None and self.end_timestep is not None:
            self.buffers.end_timestep.copy_(self.end_timestep)
        if self._deltas is not None:
            self.buffers.delta.copy_(self._deltas[self.index : self.index + 1])

    def _forward(self) -> list[ForwardKind]:
        """Run all of a step that runs on the device, which is what is captured.

        Returns:
            The kinds of the forwards that it ran.
        """
        given = (self.buffers.noisy, self.buffers.timestep, self.buffers.end_timestep)
        kinds, velocities = list[ForwardKind](), []
        for branch in self.branches:
            kinds.append("target" if branch.runs_target else "whole")
            samples = [branch.sample(*given)]
            velocities.extend(self.transformer.forward_samples(samples))
        self._guide(velocities)
        if self.buffers.records is not None and self.branches[0].records:
            self.buffers.keep(self.branches[0].records)
            for branch in self.branches:
                branch.records.clear()
        return kinds

    def _guide(self, velocities: Sequence[Tensor]) -> None:
        """Guide, and move the latents unless the solver does."""
        buffers = self.buffers
        if self._lesser:
            velocity = guide_chain(velocities, buffers.guidance_scale, self._scales)
        elif self._guidance == "apg":
            velocity = guide_projected(
                velocities, buffers.guidance_scale, buffers.latents, buffers.sigma
            )
        else:
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
        if self._previewer is not None:
            self._previewer.after(latents, velocity, self.index)
        self.index += 1

    def previews(self) -> list[Preview]:
        """The pictures of steps that have come since they were asked for last, if there are any."""
        if self._previewer is None:
            return []
        return self._previewer.arrived(is_last=self.is_finished)

    def work(self) -> dict[Work, int]:
        """The forwards and other work of all steps, in all branches of the plan together."""
        branches = len(self.branches) - len(self._lesser)
        run, skipped = (self.computed.count(runs) * branches for runs in (True, False))
        if self._shared is not None:
            return self._shared.work(run)
        work = exact_work(self.plan, run)
        if self._step_cache is None:
            return work
        return {**work, "residual": skipped, "schedule": self.total}

    def _lesser_work(self) -> dict[Work, int]:
        """The work of all steps in each branch of less conditioning."""
        run, skipped = (self.computed.count(runs) for runs in (True, False))
        return {"whole": run} if self._step_cache is None else {"whole": run, "residual": skipped}

    def result(self) -> Denoised:
        """The result of the steps, no longer written to.

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
        lesser = tuple((plan, self._lesser_work()) for plan, _ in self._lesser)
        return Denoised(latents, records, self.work(), self.graph_report(), reuse, lesser)

    def _require_finite(self) -> None:
        """Raise if a step's latents are not finite; the one place that waits for the device."""
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
        element_bytes = self.transformer.patch_embedding.weight.itemsize
        return None if self._shared is None else self._shared.report(element_bytes)

    def release(self) -> None:
        """Let go of what is kept: an error's traceback would hold it as long as the error lives."""
        for branch in self.branches:
            branch.release()
        self._lease.release()
        if self._shared is not None:
            self._shared.release()


def engine_denoiser(
    parts: Parts,
    plan: TokenPlan,
    conditioning: Conditioning,
    noise: Tensor,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    generator: torch.Generator,
    previews: LatentRGB | None = None,
) -> Denoiser:
    """The denoiser of a turn on an engine's weights, by its scheduler, graphs and processes.

    noise: [1, C, F, H, W] of the latents, on any device. generator: of further noise, where the
    scheduler adds some. previews: as `Denoiser`.
    """
    return Denoiser(
        transformer=parts.transformer,
        plan=plan,
        conditioning=conditioning,
        noise=noise,
        solver=make_solver(
            parts.scheduler,
            num_inference_steps,
            parts.sampling.flow_shift,
            parts.timesteps,
            generator,
        ),
        guidance_scale=guidance_scale,
        guidance=parts.sampling.guidance,
        reference_scales=parts.sampling.reference_scales,
        graphs=parts.graphs,
        team=parts.team,
        step_cache=parts.config.step_cache,
        previews=previews,
    )


def schedule(
    transformer: MV2VTransformer, timesteps_N: Tensor, ends_N: Tensor | None, threshold: float
) -> tuple[bool, ...]:
    """Whether the blocks run at each timestep: a function of the weights and the steps alone."""
    with torch.no_grad():
        _, modulation = transformer.condition_embedder.time(timesteps_N, ends_N)
    return computed_steps(relative_changes(modulation), threshold)


def not_finite(step: str, transformer: MV2VTransformer, guidance_scale: float) -> NotFiniteError:
    """The error to raise after a step that gave latents that are not finite. step: its name."""
    dtype = str(next(transformer.parameters()).dtype).removeprefix("torch.")
    wider = "use dtype=bfloat16 or float32, " if dtype == "float16" else ""
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


def denoise(
    denoiser: Denoiser, cancel: CancelToken
) -> Generator[StepDone | Preview, None, Denoised]:
    """Run a turn to its end; yields after every step, and the pictures that were asked for.

    Raises:
        CancelledError: between two steps, if the token was set.
        NotFiniteError: a step gave latents that are not finite; known at the end.
    """
    return cast("Generator[StepDone | Preview, None, Denoised]", _denoise(denoiser, cancel, False))


def stepwise(
    denoiser: Denoiser, cancel: CancelToken
) -> Generator[StepDone | Preview | StepDue, None, Denoised]:
    """Denoise as `denoise` does, with every step left to the caller, where a `StepDue` comes."""
    return _denoise(denoiser, cancel, True)


def _denoise(
    denoiser: Denoiser, cancel: CancelToken, hands_over: bool
) -> Generator[StepDone | Preview | StepDue, None, Denoised]:
    began, total = time.monotonic(), denoiser.total
    try:
        while not denoiser.is_finished:
            cancel.check()
            if hands_over:
                yield StepDue(denoiser)
            else:
                denoiser.step()
            done = denoiser.index
            yield StepDone(STAGE, done, total, (time.monotonic() - began) / done * (total - done))
            yield from denoiser.previews()
        cancel.check()
        return denoiser.result()
    finally:
        denoiser.release()
