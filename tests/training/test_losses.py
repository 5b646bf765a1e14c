"""The flow loss: what the model is shown, and what is asked of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine.config import ConditioningMode, TransformerConfig
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.testing import randomise, relative_error, tiny_config
from mv2v_engine.tokens.plan import turn_plan
from mv2v_engine.training.dit import TINY_MEMORY_RECIPE, initialise
from mv2v_engine.training.latents import LatentCache
from mv2v_engine.training.losses import flow_loss, flow_step
from mv2v_engine.training.recipe import Batch, SceneSampler, Siblings

CPU = torch.device("cpu")


def make_batch(config: TransformerConfig, conditioning: ConditioningMode = "joint") -> Batch:
    plan = turn_plan(config, (2, 6, 10), (4,), fraction=0.5, conditioning=conditioning)
    torch.manual_seed(0)
    latents = [torch.randn(2, 4, *segment.grid) for segment in plan.segments]
    return Batch(plan, latents, torch.randn(2, 3, 2, 12), torch.randn(2, 6, 10))


def test_the_loss_is_the_velocitys_squared_error() -> None:
    model = MV2VTransformer(tiny_config())
    randomise(model)
    initialise(model)  # a zero head: the velocity is nothing, the error is all of it
    batch, generator = make_batch(model.config), torch.Generator().manual_seed(3)
    loss = flow_loss(model, batch, generator, flow_shift=3.0, device=CPU)
    generator.manual_seed(3)
    torch.rand(2, generator=generator)
    noise = torch.randn(batch.latents[0].shape, generator=generator)
    torch.testing.assert_close(loss, (noise - batch.latents[0]).pow(2).mean())


class _Watching(MV2VTransformer):
    """A model that keeps what it was asked."""

    def forward(self, latents: Any, timestep: Tensor, text: Tensor, **rest: Any) -> Tensor:
        self.asked = (latents, timestep, text)
        return super().forward(latents, timestep, text, **rest)


@torch.no_grad()
def test_the_target_alone_is_noised_to_the_level_the_model_is_told() -> None:
    model = _Watching(tiny_config())
    batch, generator = make_batch(model.config), torch.Generator().manual_seed(3)
    flow_loss(model, batch, generator, flow_shift=3.0, device=CPU)
    latents, timestep, text = model.asked
    generator.manual_seed(3)
    uniform = torch.rand(2, generator=generator)
    noise = torch.randn(batch.latents[0].shape, generator=generator)
    sigma = 3 * uniform / (1 + 2 * uniform)
    torch.testing.assert_close(timestep, 1000 * sigma)
    level = sigma[:, None, None, None, None]
    torch.testing.assert_close(latents[0], (1 - level) * batch.latents[0] + level * noise)
    assert all(torch.equal(a, b) for a, b in zip(latents[1:], batch.latents[1:], strict=True))
    assert torch.equal(text, batch.text)


@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_gradients_do_not_depend_on_checkpointing(conditioning: ConditioningMode) -> None:
    """Blocks computed again on the way back give the very gradients that kept ones give."""
    model = MV2VTransformer(tiny_config())
    randomise(model)
    batch, gradients = make_batch(model.config, conditioning), []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad(set_to_none=True)
        generator = torch.Generator().manual_seed(0)
        loss = flow_loss(model, batch, generator, flow_shift=3.0, device=CPU)
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    kept, recomputed = gradients
    assert set(kept) == set(recomputed) and "mergers.1.weight" in kept
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_autocast_keeps_every_gradient(conditioning: ConditioningMode) -> None:
    """A merging block's queries are first used without gradients, to choose the frames."""
    model = MV2VTransformer(tiny_config())
    randomise(model)
    batch, gradients = make_batch(model.config, conditioning), []
    for dtype in (torch.float32, torch.bfloat16):
        model.zero_grad(set_to_none=True)
        generator = torch.Generator().manual_seed(0)
        flow_loss(model, batch, generator, flow_shift=3.0, device=CPU, dtype=dtype).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    exact, rounded = gradients
    assert set(exact) == set(rounded)
    for block in range(3):
        for layer in ("to_q", "to_k", "to_v"):
            name = f"blocks.{block}.attn1.{layer}.weight"
            assert relative_error(rounded[name], exact[name]) < 0.2, name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_siblings_learn_what_each_would_beside_the_conditioning_alone(checkpointing: bool) -> None:
    model = MV2VTransformer(tiny_config())
    randomise(model)
    alone = make_batch(model.config, "static")
    # which frames merge is chosen for the first target
    alone = replace(alone, plan=replace(alone.plan, merge="off"))
    latents, cameras = torch.randn(2, 3, *alone.latents[0].shape[1:]), torch.randn(2, 3, 2, 12)
    together = replace(alone, siblings=Siblings(latents, cameras))
    levels, noise = torch.rand(8), torch.randn(8, *latents.shape[2:])

    def gradients(*batches: tuple[Batch, Tensor]) -> dict[str, Tensor]:
        """Gradients of the loss's mean over batches whose samples have these levels and noises."""
        model.zero_grad(set_to_none=True)
        for batch, chosen in batches:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "rand", lambda *_, of=chosen, **__: levels[of])
                patch.setattr(torch, "randn", lambda *_, of=chosen, **__: noise[of])
                loss = flow_loss(model, batch, torch.Generator(), flow_shift=3.0, device=CPU)
            (loss / len(batches)).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    each = []
    for index in range(4):
        others = (alone.latents[0], alone.cameras[:, 0])
        target, camera = (latents[:, index - 1], cameras[:, index - 1]) if index else others
        tracks = torch.cat([camera[:, None], alone.cameras[:, 1:]], 1)
        chosen = torch.arange(2) if index == 0 else 2 + torch.arange(2) * 3 + index - 1
        each.append((replace(alone, latents=[target, *alone.latents[1:]], cameras=tracks), chosen))
    expected = gradients(*each)
    model.gradient_checkpointing = checkpointing
    found = gradients((together, torch.arange(8)))
    assert set(found) == set(expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_a_step_says_which_mode_it_trained(cache: LatentCache) -> None:
    model = MV2VTransformer(tiny_config())
    step = flow_step(model, SceneSampler(cache, model.config, TINY_MEMORY_RECIPE), CPU)
    seen = set()
    for seed in range(6):
        metrics = step(torch.Generator().manual_seed(seed))
        (mode,) = set(metrics) - {"loss", "forward_tflop"}
        assert float(metrics["forward_tflop"]) > 0
        assert torch.equal(metrics[mode], metrics["loss"])
        seen.add(mode)
    assert seen == {"loss_joint", "loss_static"}
