"""The rectified-flow loss on the target's tokens (METHOD 8 and 12). B batch."""

from __future__ import annotations

from collections.abc import Callable
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


class Sampler(Protocol):
    """Where batches come from."""

    @property
    def recipe(self) -> MemoryRecipe: ...

    def draw(self, generator: torch.Generator) -> Batch: ...


def flow_loss(
    model: nn.Module,
    batch: Batch,
    generator: torch.Generator,
    *,
    flow_shift: float,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Mean squared error of the target's velocity at random noise levels, by the batch's weights.

    A level is uniform, then shifted towards noise as the sampler's are; one a sample. dtype: what
    products are computed in, by autocast; the error is always float32.
    """
    batch = batch.to(device)
    clean = batch.targets
    uniform = torch.rand(len(clean), generator=generator)
    sigma = (flow_shift * uniform / (1 + (flow_shift - 1) * uniform)).to(device)
    noise = torch.randn(clean.shape, generator=generator).to(device)
    level = sigma[:, None, None, None, None]
    target = (1 - level) * clean + level * noise
    if batch.source is not None:
        target = torch.cat([target, batch.source], dim=1)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        velocity = _velocity(model, batch, target, sigma * 1000)
    error: Tensor = (velocity.float() - (noise - clean)).pow(2).mean(1)
    if batch.weight is not None:
        error = error * batch.weight
    return error.mean()


def _velocity(model: nn.Module, batch: Batch, target: Tensor, timestep: Tensor) -> Tensor:
    """The predicted velocities of the noisy targets, in the order of `batch.targets`."""
    size, given = len(batch.text), {"plan": batch.plan, "cameras": batch.cameras}
    first = ([target[:size], *batch.latents[1:]], timestep[:size], batch.text)
    if batch.siblings is None:
        velocity: Tensor = model(*first, **given)
        return velocity
    kept = ConditioningCache(batch.plan, is_trained=True)
    velocity = model(*first, **given, kept=kept)
    count = batch.siblings.latents.shape[1]
    cameras = with_matrices(batch.plan.shape, batch.siblings.cameras.flatten(0, 1))
    # the parameters are the wrapped module's, and DistributedDataParallel waits for their gradients
    own: Any = getattr(model, "module", model)
    siblings: Tensor = own.forward(
        [target[size:]],
        timestep[size:],
        batch.text.repeat_interleave(count, 0),
        plan=batch.plan,
        kept=kept.repeated(count, cameras),
    )
    return torch.cat([velocity, siblings])


def flow_step(
    model: nn.Module, sampler: Sampler, device: torch.device
) -> Callable[[torch.Generator], dict[str, Tensor]]:
    """A step of the loop: a batch's loss, also under the name of its conditioning mode.

    In bfloat16 on a GPU, in float32 elsewhere. `forward_tflop` is one forward of the batch by the
    plan's count; its backward costs twice as much where every parameter is trained.
    """
    dtype, shift = compute_dtype(device), sampler.recipe.flow_shift

    def step(generator: torch.Generator) -> dict[str, Tensor]:
        batch = sampler.draw(generator)
        own = own_generator(generator)
        loss = flow_loss(model, batch, own, flow_shift=shift, device=device, dtype=dtype)
        plan = batch.plan
        flops = len(batch.targets) * plan.flops() + len(batch.text) * conditioning_flops(plan)
        return {
            "loss": loss,
            f"loss_{plan.conditioning}": loss,
            "forward_tflop": torch.tensor(flops / 1e12),
        }

    return step
