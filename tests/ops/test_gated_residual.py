"""x + y * gate: float64 oracle, odd sizes, strides, the registered operation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mv2v_engine.ops.gated_residual import gated_residual
from mv2v_engine.testing import assert_within_budget

CASES = [(1, 1, 1), (2, 7, 35), (3, 22, 24)]


def _inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(sum(shape))
    x, y = torch.randn(2, *shape).to(dtype).unbind()
    return x, y, torch.randn(shape[0], shape[2])


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_matches_float64(shape: tuple[int, int, int], dtype: torch.dtype, backend: str) -> None:
    x, y, gate = _inputs(shape, dtype)
    oracle = x.double() + y.double() * gate.double()[:, None]
    eager = x + y * gate.to(dtype)[:, None]
    assert_within_budget(gated_residual(x, y, gate, backend=backend), oracle, eager)


def test_bfloat16_rounds_once() -> None:
    x, y, gate = _inputs((2, 7, 35), torch.bfloat16)
    once = (x.double() + y.double() * gate.double()[:, None]).to(torch.bfloat16)
    got = gated_residual(x, y, gate)
    # float32 sums may fall on the other side of a tie, never further
    assert (got != once).float().mean() < 0.01


@pytest.mark.parametrize("is_strided", [False, True])
def test_opcheck(is_strided: bool) -> None:
    x, y, gate = _inputs((2, 7, 12), torch.float32)
    if is_strided:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    torch.library.opcheck(torch.ops.mv2v.gated_residual.default, (x, y, gate, None))
