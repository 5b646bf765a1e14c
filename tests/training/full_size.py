"""A step of training at full size, on fake tensors: what it holds and what it needs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from mv2v_engine.config import TransformerConfig
from mv2v_engine.counting import LiveBytes
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.tokens.plan import TokenPlan
from mv2v_engine.training.losses import flow_loss
from mv2v_engine.training.recipe import Batch
from tests.torch_state import default_dtype

GIB = 1 << 30


def assert_a_step_fits(
    shape: TransformerConfig,
    prepare: Callable[[MV2VTransformer], tuple[list[nn.Parameter], Optimizer, TokenPlan]],
    cameras: tuple[int, ...] | None = None,
) -> tuple[MV2VTransformer, int]:
    """The model of this shape after a step, and how many of its parameters train.

    prepare: the parameters that train, what trains them, and the tokens of a batch.
    """
    with FakeTensorMode(), LiveBytes() as memory:
        with default_dtype(torch.bfloat16):
            model = MV2VTransformer(shape)
        trained, optimizer, plan = prepare(model)
        average = [parameter.detach().clone() for parameter in trained]
        latents = [torch.empty(1, shape.in_channels, *s.grid) for s in plan.segments]
        poses: Tensor | None = None if cameras is None else torch.empty(*cameras)
        batch = Batch(plan, latents, poses, torch.empty(1, shape.text_len, shape.text_dim))
        generator, device = torch.Generator(), torch.device("cpu")
        loss = flow_loss(
            model, batch, generator, flow_shift=5.0, device=device, dtype=torch.bfloat16
        )
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [parameter.detach() for parameter in trained], 0.001)
        del loss, batch, latents, poses
        held = memory.now
    count = sum(parameter.numel() for parameter in trained)
    print(f"\n{count:,} parameters train")
    print(f"weights and states {held / GIB:.1f} GiB, peak {memory.peak / GIB:.1f} GiB")
    frozen = sum(p.numel() for p in model.parameters()) - count
    # float32 weights, their average and Adam's two moments; bfloat16 for what is frozen
    assert held == pytest.approx(4 * 4 * count + 2 * frozen, rel=0.01)
    # a block's input each and one block's own activations; all blocks' would be many times as much
    assert memory.peak < 16 * GIB
    return model, count
