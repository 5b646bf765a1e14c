"""The rectified-flow loss on the target's tokens (METHOD 8 and 12). B batch, T its targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mv2v_engine.models.camera_encoder import with_matrices
from mv2v_engine.models.kept import ConditioningCache
from mv2v_engine.tokens.flops import conditioning_flops
from mv2v_engine.training.distributed import own_generator
from mv2v_engine.training.odds import MemoryRecipe
from mv2v_engine.training.recipe import Batch
from mv2v_engine.training.throughput import compute_dtype


class Velocities(Protocol):
    """What says which velocity is wanted in the place of the data: `teacher.Teacher`."""

    def velocity(self, batch: Batch, noised: Noised) -> Tensor: ...


class Sampler(Protocol):
    """Where batches come from."""

    @property
    def recipe(self) -> MemoryRecipe: ...

    def draw(self, generator: torch.Generator) -> Batch: ...


@dataclass(frozen=True, eq=False)
class Noised:
    """A batch's targets at random noise levels: one level a target, uniform, then shifted towards
    noise as the sampler's are.

    uniform, level: [T]. latents: (1 - level) clean + level noise [T, C, F, H, W]; velocity:
    noise - clean, towards which plain flow is trained.
    """

    uniform: Tensor
    level: Tensor
    latents: Tensor
    velocity: Tensor

    @classmethod
    def drawn(cls, clean: Tensor, generator: torch.Generator, flow_shift: float) -> Noised:
        """Levels and noise from the generator, on the latents' device."""
        uniform = torch.rand(len(clean), generator=generator)
        level = shifted(uniform, flow_shift).to(clean.device)
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        wide = widened(level)
        latents = (1 - wide) * clean + wide * noise
        return cls(uniform, level, latents, noise - clean)

    def by(self, teacher: Velocities | None, batch: Batch) -> Noised:
        """The same with the velocity that a teacher, if there is one, wants of the targets."""
        return self if teacher is None else replace(self, velocity=teacher.velocity(batch, self))


def shifted(uniform: Tensor, shift: float) -> Tensor:
    """Noise levels, towards 1 where the shift is greater than 1."""
    return shift * uniform / (1 + (shift - 1) * uniform)


def widened(values_T: Tensor) -> Tensor:
    """Values as [T, 1, 1, 1, 1], to be multiplied with latents."""
    return values_T[:, None, None, None, None]


class BatchForward:
    """The velocities of a batch's targets; static conditioning is encoded by the first call alone.

    The first call is of all targets, in the order of `batch.targets`, and trains the model; `again`
    is of any of them and does not.

    Args:
        keeps: keep what static conditioning leaves, for `again`.
    """

    def __init__(self, model: nn.Module, batch: Batch, *, keeps: bool = False) -> None:
        self._model, self._batch = model, batch
        self._kept: ConditioningCache | None = None
        is_kept = keeps or batch.siblings is not None
        if is_kept and batch.plan.conditioning == "static":
            self._kept = ConditioningCache(batch.plan, is_trained=True)
        # for every target, the sample whose conditioning it has
        self._samples = torch.arange(len(batch.text), device=batch.text.device)
        self._cameras: Tensor | None = None
        if batch.siblings is not None:
            count = batch.siblings.latents.shape[1]
            self._samples = torch.cat([self._samples, self._samples.repeat_interleave(count)])
            given = batch.siblings.cameras.flatten(0, 1)
            self._cameras = with_matrices(batch.plan.shape, given)

    def __call__(self, target: Tensor, timestep: Tensor, end: Tensor | None = None) -> Tensor:
        """Velocities of the noisy targets [T, C, F, H, W]; timestep, end: [T]."""
        batch, size = self._batch, len(self._batch.text)
        given: dict[str, Any] = {"plan": batch.plan, "cameras": batch.cameras}
        if self._kept is not None:
            given["kept"] = self._kept
        if end is not None:
            given["end_timestep"] = end[:size]
        noisy = self._with_source(target[:size], slice(None))
        velocity: Tensor = self._model(
            [noisy, *batch.latents[1:]], timestep[:size], batch.text, **given
        )
        if self._kept is not None and self._kept.cameras is not None:
            own = self._kept.cameras
            self._cameras = own if self._cameras is None else torch.cat([own, self._cameras])
        if batch.siblings is None:
            return velocity
        rest = torch.arange(size, len(target), device=target.device)
        more = self._over_kept(
            rest, target[size:], timestep[size:], None if end is None else end[size:]
        )
        return torch.cat([velocity, more])

    @torch.no_grad()
    def again(self, rows: Tensor, target: Tensor, timestep: Tensor, end: Tensor) -> Tensor:
        """Velocities of the targets of these numbers [R], without gradients.

        target: [R, C, F, H, W], as noisy as `timestep` says.
        """
        if self._kept is not None:
            return self._over_kept(rows, target, timestep, end)
        batch, samples = self._batch, self._samples[rows]
        latents = [
            self._with_source(target, samples),
            *(each[samples] for each in batch.latents[1:]),
        ]
        cameras = None if batch.cameras is None else batch.cameras[samples]
        velocity: Tensor = self._own.forward(
            latents, timestep, batch.text[samples], plan=batch.plan, cameras=cameras,
            end_timestep=end,
        )  # fmt: skip
        return velocity

    def _over_kept(
        self, rows: Tensor, target: Tensor, timestep: Tensor, end: Tensor | None
    ) -> Tensor:
        assert self._kept is not None
        samples, cameras = self._samples[rows], self._cameras
        kept = self._kept.of_samples(samples, None if cameras is None else cameras[rows])
        latents, text = [self._with_source(target, samples)], self._batch.text[samples]
        given: dict[str, Any] = {} if end is None else {"end_timestep": end}
        velocity: Tensor = self._own.forward(
            latents, timestep, text, plan=self._batch.plan, kept=kept, **given
        )
        return velocity

    @property
    def _own(self) -> Any:
        # the parameters are the wrapped module's, and DistributedDataParallel waits for their
        # gradients
        return getattr(self._model, "module", self._model)

    def _with_source(self, target: Tensor, samples: Tensor | slice) -> Tensor:
        source = self._batch.source
        return target if source is None else torch.cat([target, source[samples]], dim=1)


def flow_loss(
    model: nn.Module,
    batch: Batch,
    generator: torch.Generator,
    *,
    flow_shift: float,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    teacher: Velocities | None = None,
) -> Tensor:
    """Mean squared error of the target's velocity at random noise levels, by the batch's weights.

    dtype: what products are computed in, by autocast; the error is always float32. teacher: says
    the wanted velocity in the place of the data.
    """
    batch = batch.to(device)
    noised = Noised.drawn(batch.targets, generator, flow_shift)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        noised = noised.by(teacher, batch)
        velocity = BatchForward(model, batch)(noised.latents, noised.level * 1000)
    return squared_error(velocity, noised.velocity, batch.weight).mean()


def squared_error(velocity: Tensor, wanted: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over channels, times the batch's weights [T, F, H, W]."""
    error = (velocity.float() - wanted).pow(2).mean(1)
    return error if weight is None else error * weight


def flow_step(
    model: nn.Module,
    sampler: Sampler,
    device: torch.device,
    teacher: Velocities | None = None,
) -> Callable[[torch.Generator], dict[str, Tensor]]:
    """A step of the loop: a batch's loss, also under the name of its conditioning mode.

    In bfloat16 on a GPU, in float32 elsewhere. `forward_tflop` is one forward of the batch by the
    plan's count, without a teacher's; its backward costs twice as much where every parameter is
    trained.
    """
    dtype, shift = compute_dtype(device), sampler.recipe.flow_shift

    def step(generator: torch.Generator) -> dict[str, Tensor]:
        batch = sampler.draw(generator)
        own = own_generator(generator)
        loss = flow_loss(
            model, batch, own, flow_shift=shift, device=device, dtype=dtype, teacher=teacher
        )
        plan = batch.plan
        flops = len(batch.targets) * plan.flops() + len(batch.text) * conditioning_flops(plan)
        return {
            "loss": loss,
            f"loss_{plan.conditioning}": loss,
            "forward_tflop": torch.tensor(flops / 1e12),
        }

    return step
