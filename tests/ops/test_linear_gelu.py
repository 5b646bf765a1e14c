"""Linear and tanh GELU: float64 oracle, the registered operation, and CUDA's epilogue."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mv2v_engine.ops import linear_gelu as module
from mv2v_engine.ops.backend import has_bfloat16_products
from mv2v_engine.ops.linear_gelu import linear_gelu
from mv2v_engine.testing import assert_within_budget


def _inputs(dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 9, 24), 0.3 * torch.randn(40, 24), torch.randn(40)
    return x.to(device, dtype), weight.to(device, dtype), bias.to(device, dtype)


def _gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x @ weight.t() + bias, approximate="tanh")


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_float64(dtype: torch.dtype, backend: str) -> None:
    inputs = _inputs(dtype)
    oracle = _gelu(*(t.double() for t in inputs))
    assert_within_budget(linear_gelu(*inputs, backend=backend), oracle, _gelu(*inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_epilogue_is_the_tanh_gelu(dtype: torch.dtype) -> None:
    """Within the budget of the tanh GELU, whose distance from the exact one is larger in fp32."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    inputs = _inputs(dtype, "cuda")
    oracle = _gelu(*(t.double() for t in inputs))
    assert_within_budget(linear_gelu(*inputs, backend="auto"), oracle, _gelu(*inputs))


def test_cuda_is_asked_for_one_product() -> None:
    """What torch's operator is given, by its CPU kernel: that has the exact GELU."""
    x, weight, bias = _inputs(torch.float32)
    got = module._on_cuda(x, weight, bias)
    assert got.shape == (2, 9, 40)
    torch.testing.assert_close(got, F.gelu(F.linear(x, weight, bias)))
    empty = module._on_cuda(x[:, :0], weight, bias)
    assert empty.shape == (2, 0, 40)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.mv2v.linear_gelu.default, _inputs(torch.float32))


def test_cpus_have_an_epilogue_where_nothing_is_trained() -> None:
    x, weight, bias = _inputs(torch.float32)
    with torch.profiler.profile() as profile:
        linear_gelu(x, weight, bias)
        linear_gelu(x.requires_grad_(), weight, bias).sum().backward()
        linear_gelu(x.detach().bfloat16(), weight.bfloat16(), bias.bfloat16())
    calls = {event.key: event.count for event in profile.key_averages()}
    narrow = int(has_bfloat16_products())
    assert calls["mkldnn::_linear_pointwise"] == 1 + narrow and calls["aten::gelu"] == 2 - narrow
    assert x.grad is not None and x.grad.isfinite().all()
