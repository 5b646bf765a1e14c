"""The rotation of interleaved pairs: complex float64 oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mv2v_engine.ops.qk_norm_rope import qk_norm_rope
from mv2v_engine.ops.rope import rope
from mv2v_engine.testing import assert_within_budget

CASES = [  # batch, tokens, heads, head dim, rope batch
    (1, 1, 1, 2, 1),
    (2, 7, 3, 10, 1),
    (3, 19, 2, 12, 3),
]


def _inputs(
    batch: int, tokens: int, heads: int, dim: int, rope_batch: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    torch.manual_seed(tokens)
    x = 2 * torch.randn(batch, tokens, heads, dim)
    angles = 10 * torch.randn(rope_batch, tokens, dim // 2)
    return x.to(dtype), torch.cat([angles.cos(), angles.sin()], -1)


def rope_oracle(x: Tensor, table: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    cos, sin = table.double().chunk(2, -1)
    return torch.view_as_real(pairs * torch.complex(cos, sin)[:, :, None]).flatten(-2)


def rope_eager(x: Tensor, table: Tensor) -> Tensor:
    cos, sin = (part[:, :, None] for part in table.to(x.dtype).chunk(2, -1))
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(
    case: tuple[int, int, int, int, int], dtype: torch.dtype, backend: str
) -> None:
    x, table = _inputs(*case, dtype)
    got = rope(x, table, backend=backend)
    assert got.shape == x.shape and got.dtype == dtype
    assert_within_budget(got, rope_oracle(x, table), rope_eager(x, table))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_the_first_slots_of_a_longer_cache(backend: str) -> None:
    """What is held of a cache is a part of its storage, whose rows are strided."""
    x, table = _inputs(2, 9, 3, 8, 1, torch.float32)
    held, heads_first = x[:, :5], x.transpose(1, 2).contiguous().transpose(1, 2)
    expected = rope(x, table, backend="reference")
    assert not held.is_contiguous() and not heads_first.is_contiguous()
    torch.testing.assert_close(rope(held, table[:, :5], backend=backend), expected[:, :5])
    torch.testing.assert_close(rope(heads_first, table, backend=backend), expected)


def test_it_is_the_rotation_behind_the_norm() -> None:
    x, table = _inputs(2, 7, 3, 10, 1, torch.float32)
    flat, weight = x.flatten(2), torch.linspace(0.5, 1.5, 30)
    plain = qk_norm_rope(flat, weight, None, num_heads=3)
    assert torch.equal(rope(plain, table), qk_norm_rope(flat, weight, table, num_heads=3))


@pytest.mark.parametrize("rope_batch", [1, 2])
def test_opcheck(rope_batch: int) -> None:
    torch.library.opcheck(
        torch.ops.mv2v.rope.default, _inputs(2, 5, 3, 4, rope_batch, torch.float32)
    )
