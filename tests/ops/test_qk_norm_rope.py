"""RMSNorm over the width, then RoPE of interleaved pairs: complex float64 oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mv2v_engine.ops.qk_norm_rope import qk_norm_rope, rms_norm_reference
from mv2v_engine.testing import assert_within_budget, max_error
from tests.ops.test_rope import CASES, rope_eager, rope_oracle


def _inputs(
    batch: int, tokens: int, heads: int, dim: int, rope_batch: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(tokens)
    x = 2 * torch.randn(batch, tokens, heads * dim)
    weight = 1 + 0.3 * torch.randn(heads * dim)
    angles = 10 * torch.randn(rope_batch, tokens, dim // 2)
    # pooled rows are shorter than one: the operation must not normalise them
    length = torch.rand(rope_batch, tokens, dim // 2)
    rope = torch.cat([length * angles.cos(), length * angles.sin()], -1)
    return x.to(dtype), weight.to(dtype), rope


def _oracle(x: Tensor, weight: Tensor, rope: Tensor, heads: int) -> Tensor:
    wide, gain = x.double(), weight.double()
    normed = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain
    return rope_oracle(normed.unflatten(-1, (heads, -1)), rope)


def _eager(x: Tensor, weight: Tensor, rope: Tensor, heads: int) -> Tensor:
    normed = torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, 1e-6)
    return rope_eager(normed.unflatten(-1, (heads, -1)), rope)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(
    case: tuple[int, int, int, int, int], dtype: torch.dtype, backend: str
) -> None:
    x, weight, rope = _inputs(*case, dtype)
    heads = case[2]
    got = qk_norm_rope(x, weight, rope, num_heads=heads, backend=backend)
    assert got.shape == (case[0], case[1], heads, case[3]) and got.dtype == dtype
    assert_within_budget(got, _oracle(x, weight, rope, heads), _eager(x, weight, rope, heads))


def test_the_norm_spans_all_heads() -> None:
    x, weight, _ = _inputs(1, 4, 3, 10, 1, torch.float32)
    whole = rms_norm_reference(x, weight, 1e-6)
    per_head = rms_norm_reference(x.unflatten(-1, (3, 10)), weight[:10], 1e-6).flatten(-2)
    assert max_error(whole, per_head) > 0.01
    expected = torch.nn.functional.rms_norm(x, (30,), weight, 1e-6)
    torch.testing.assert_close(whole, expected)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_rope_is_the_norm_alone(
    case: tuple[int, int, int, int, int], dtype: torch.dtype, backend: str
) -> None:
    x, weight, _ = _inputs(*case, dtype)
    got = qk_norm_rope(x, weight, None, num_heads=case[2], backend=backend)
    assert got.shape == (case[0], case[1], case[2], case[3]) and got.dtype == dtype
    width = (x.shape[-1],)
    oracle = torch.nn.functional.rms_norm(x.double(), width, weight.double(), 1e-6)
    assert_within_budget(
        got.flatten(2), oracle, torch.nn.functional.rms_norm(x, width, weight, 1e-6)
    )


@pytest.mark.parametrize("rope_batch", [1, 2, None])
def test_opcheck(rope_batch: int | None) -> None:
    x, weight, rope = _inputs(2, 5, 3, 4, rope_batch or 1, torch.float32)
    if rope_batch is None:
        rope = None
    torch.library.opcheck(torch.ops.mv2v.qk_norm_rope.default, (x, weight, rope, 3, 1e-6))
