"""A flow becomes a flow map, whose steps are long: no teacher, critic or forward derivative.

u(x_t, t, r) is the mean velocity from noise level t to r, so that x_r = x_t - (t - r) u. It obeys
u = v - (t - r) du/dt along the flow; the derivative is a central difference of the model itself,
without gradients (AnyFlow, stage 1, arXiv 2605.13724).

T targets of a batch, C F H W latents.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mv2v_engine.tokens.flops import conditioning_flops
from mv2v_engine.training.distributed import own_generator
from mv2v_engine.training.losses import (
    BatchForward,
    Noised,
    Sampler,
    Velocities,
    shifted,
    squared_error,
    widened,
)
from mv2v_engine.training.recipe import Batch
from mv2v_engine.training.throughput import compute_dtype, training_flops_factor

# shares of a batch's targets that are plain flow, and that go to the clean end at once
PLAIN, WHOLE = 0.5, 0.25
# noise levels to either side, between which the derivative is taken
DELTA = 0.005
# squared error from which on a step's target counts ever less: the slope of a small model is rough,
# and learned as it is it becomes rougher
BOUND = 0.1
# (share of a training, longest step from there on): short steps are learned first, since long ones
# are made of them
CURRICULUM = ((0.0, 0.0), (0.05, 0.1), (0.3, 1.0))


def longest_step(done: float) -> float:
    """The largest gap t - r that is trained when a share `done` of the training is."""
    return next(gap for begin, gap in reversed(CURRICULUM) if done >= begin)


def end_levels(
    noised: Noised, generator: torch.Generator, *, longest: float, flow_shift: float
) -> Tensor:
    """Noise level r to which each target's step goes [T], at most its own; equal for plain flow.

    Half of a batch is plain. While steps are short, the others' ends lie anywhere within them;
    then half of the others go to 0, and half to any lower level, drawn as levels are.
    """
    level, count = noised.level, len(noised.level)
    # places as even as a batch allows, in any order
    place = (
        torch.randperm(count, generator=generator) + torch.rand((), generator=generator)
    ) / count
    anywhere = torch.rand(count, generator=generator)
    place, part = place.to(level.device), anywhere.to(level.device)
    if longest < 1:
        end = level - part * level.clamp(max=longest)
    else:
        end = shifted(noised.uniform * anywhere, flow_shift).to(level.device)
        end = torch.where(place < PLAIN + WHOLE, 0.0, end)
    return torch.where(place < PLAIN, level, torch.minimum(end, level))


def map_target(
    mean_velocity: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    velocity: Tensor,
    level: Tensor,
    end: Tensor,
    delta: float = DELTA,
) -> Tensor:
    """v - (t - r) du/dt: what u(x_t, t, r) has to be [T, C, F, H, W].

    The difference is central where levels to both sides are, which lie between r and 1.

    Args:
        mean_velocity: u of latents and levels, to the same ends; called once, of 2 T latents.
        latents, velocity: x_t and v. level, end: t and r [T]; where they are equal it is v.
        delta: how far to either side the difference is taken.
    """
    above, below = (level + delta).clamp(max=1), torch.maximum(level - delta, end)
    moved = [latents + widened(near - level) * velocity for near in (above, below)]
    after, before = mean_velocity(torch.cat(moved), torch.cat([above, below])).float().chunk(2)
    slope = (after - before) / widened((above - below).clamp(min=1e-6))
    return velocity - widened(level - end) * slope


def flow_map_loss(
    model: nn.Module,
    batch: Batch,
    generator: torch.Generator,
    *,
    longest: float,
    flow_shift: float,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    delta: float = DELTA,
    teacher: Velocities | None = None,
) -> dict[str, Tensor]:
    """The loss, and the plain squared errors of those targets that are plain flow and those not.

    "rows" is how many targets were run without gradients. dtype, teacher: as in `flow_loss`.
    """
    batch = batch.to(device)
    noised = Noised.drawn(batch.targets, generator, flow_shift)
    level = noised.level
    end = end_levels(noised, generator, longest=longest, flow_shift=flow_shift).to(device)
    (rows,) = torch.nonzero(end < level, as_tuple=True)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        noised = noised.by(teacher, batch)
        wanted = noised.velocity
        forward = BatchForward(model, batch, keeps=True)
        # before the others: autocast hands weights on as the first forward cast them
        mean = forward(noised.latents, level * 1000, end * 1000)
        if len(rows):
            twice, ends = rows.repeat(2), end[rows].repeat(2) * 1000

            def again(latents: Tensor, levels: Tensor) -> Tensor:
                return forward.again(twice, latents, levels * 1000, ends)

            given = (noised.latents[rows], noised.velocity[rows], level[rows], end[rows])
            wanted = wanted.index_copy(0, rows, map_target(again, *given, delta))
    error = squared_error(mean, wanted, batch.weight).flatten(1).mean(1)
    return {**balanced(error, level, end), "rows": torch.tensor(2 * len(rows))}


def balanced(error: Tensor, level: Tensor, end: Tensor) -> dict[str, Tensor]:
    """The loss of squared errors [T] of steps from t to r [T], and the plain means of both kinds.

    A target's weight is t sqrt(1 - t); those with r below t together weigh as much as those that
    are plain flow, each for each. Of these a far one weighs less, so that its pull is bounded (as
    MeanFlow's adaptive weight does, arXiv 2505.13447).
    """
    is_plain = end == level
    bounded = torch.where(is_plain, error, error / (error.detach() + BOUND))
    weighted = bounded * level * (1 - level).sqrt()
    plain, others = weighted[is_plain], weighted[~is_plain]
    if len(plain) and len(others):
        others = others * (plain.mean() / others.mean()).detach()
    found = {"loss": (plain.sum() + others.sum()) / len(error)}
    for name, chosen in (("loss_plain", is_plain), ("loss_map", ~is_plain)):
        if bool(chosen.any()):
            found[name] = error[chosen].mean()
    return found


def flow_map_step(
    model: nn.Module,
    sampler: Sampler,
    device: torch.device,
    done: Callable[[], float],
    delta: float = DELTA,
    teacher: Velocities | None = None,
) -> Callable[[torch.Generator], dict[str, Tensor]]:
    """A step of the loop, as `flow_step`.

    done: the share of the training that is done, which tells how long steps may be. delta: as in
    `map_target`. teacher: as in `flow_loss`, and not counted.
    """
    dtype, shift = compute_dtype(device), sampler.recipe.flow_shift
    factor = training_flops_factor(getattr(model, "module", model))

    def step(generator: torch.Generator) -> dict[str, Tensor]:
        batch, own = sampler.draw(generator), own_generator(generator)
        found = flow_map_loss(
            model,
            batch,
            own,
            longest=longest_step(done()),
            flow_shift=shift,
            device=device,
            dtype=dtype,
            delta=delta,
            teacher=teacher,
        )
        # forwards that train nothing are not followed by a way back
        plan, targets = batch.plan, len(batch.targets) + int(found.pop("rows")) / factor
        flops = targets * plan.flops() + len(batch.text) * conditioning_flops(plan)
        return {**found, "forward_tflop": torch.tensor(flops / 1e12)}

    return step
