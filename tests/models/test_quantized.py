"""Weights of eight bits: how far off they are, and that nothing but the weight changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.quantized import QuantizedLinear, large_linears, quantize_linears
from mv2v_engine.testing import randomise, tiny_config
from mv2v_engine.tokens.plan import turn_plan

GRID = (3, 6, 10)


def _weight() -> Tensor:
    """Rows of very different sizes, one of zeros."""
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    return weight * torch.tensor([1e-6, 1e-2, 1.0, 30.0, 1e4, 0.0])[:, None]


def _layer(weight: Tensor, kind: Any, dtype: torch.dtype = torch.float32) -> QuantizedLinear:
    rows, columns = weight.shape
    layer = QuantizedLinear(nn.Linear(columns, rows, dtype=dtype), kind)
    layer.quantize(weight)
    return layer


def test_int8_is_within_half_a_step() -> None:
    weight = _weight()
    layer = _layer(weight, "int8")
    step = weight.abs().amax(1, keepdim=True) / 127
    assert layer.stored.dtype == torch.int8 and layer.scale.shape == (6, 1)
    assert ((layer.weight - weight).abs() <= 0.5001 * step).all()
    assert (layer.stored.abs().amax(1) == torch.tensor([127] * 5 + [0])).all()


def test_fp8_is_within_half_a_bit_of_three() -> None:
    weight = _weight()
    layer = _layer(weight, "fp8")
    assert layer.stored.dtype == torch.float8_e4m3fn
    # below 2^-6 its steps are equal, 2^-9
    normal = weight.abs() >= layer.scale * 2.0**-6
    error = (layer.weight - weight).abs()
    assert (
        error <= torch.where(normal, weight.abs() * 2.0**-4, layer.scale * 2.0**-10) * 1.001
    ).all()
    assert torch.equal(layer.weight[5], torch.zeros(40))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_half_precision_rounds_once_more(kind: Any) -> None:
    weight = _weight()
    exact, half = _layer(weight, kind), _layer(weight, kind, torch.bfloat16)
    assert torch.equal(exact.stored.float(), half.stored.float())
    assert half.weight.dtype == torch.bfloat16
    assert torch.equal(half.weight, exact.weight.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("chunk", [None, 50])
def test_a_forward_is_that_of_the_weights_it_makes(
    kind: Any, dtype: torch.dtype, chunk: int | None
) -> None:
    """To the bit, merging and chunks of the feed-forward among it."""
    config = tiny_config()
    plain = MV2VTransformer(config).eval().requires_grad_(False)
    randomise(plain)
    plain.to(dtype)
    small = MV2VTransformer(config).eval().requires_grad_(False)
    small.load_state_dict(plain.state_dict())
    small.to(dtype)
    weights = {name: linear.weight for name, linear in large_linears(small).items()}
    # q, k, v, out of two attentions, the feed-forward's two, the projector
    assert len(weights) == 11 * config.num_layers
    quantize_linears(small, kind)
    for name, weight in weights.items():
        layer = small.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        layer.quantize(weight)
        plain.get_submodule(name).weight = nn.Parameter(layer.weight, requires_grad=False)
    plan = turn_plan(config, GRID, (4, 4), merge="conv", fraction=0.5)
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    latents = [drawn(1, 4, *segment.grid) for segment in plan.segments]
    cameras = drawn(1, len(plan.segments), GRID[0], 12).float()
    text, time = drawn(1, 6, 10), torch.tensor([500.0])
    outs = []
    for model in (plain, small):
        model.set_feed_forward_chunk(chunk)
        with torch.no_grad():
            outs.append(model(latents, time, text, plan=plan, cameras=cameras))
    assert torch.equal(*outs)
    assert float(outs[0].float().abs().amax()) > 0
