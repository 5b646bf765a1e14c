"""Attention: float64 oracle, self and cross, and no math path on long sequences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mv2v_engine.errors import KernelUnavailableError
from mv2v_engine.ops import attention as module
from mv2v_engine.ops.attention import MATH_LIMIT, attention
from mv2v_engine.testing import assert_within_budget

CASES = [  # batch, queries, keys, heads, head dim
    (1, 1, 1, 1, 2),
    (2, 7, 7, 3, 10),
    (1, 65, 33, 2, 12),
    (2, 5, 130, 1, 48),
]


def _inputs(
    batch: int, queries: int, keys: int, heads: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(keys)
    q = 2 * torch.randn(batch, queries, heads, dim)
    k, v = torch.randn(2, batch, keys, heads, dim).unbind()
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("blnd,bsnd->bnls", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bnls,bsnd->blnd", scores.softmax(-1), v)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(
    case: tuple[int, int, int, int, int], dtype: torch.dtype, backend: str
) -> None:
    q, k, v = _inputs(*case, dtype)
    oracle = _naive(q.double(), k.double(), v.double())
    assert_within_budget(attention(q, k, v, backend=backend), oracle, _naive(q, k, v))


def test_long_sequences_take_a_fused_path() -> None:
    q, k, v = _inputs(1, 3, MATH_LIMIT + 1, 1, 8, torch.float32)
    oracle = _naive(q.double(), k.double(), v.double())
    assert_within_budget(attention(q, k, v), oracle, _naive(q, k, v))


def _unfusable(length: int) -> Tensor:
    """No fused kernel takes a head dim that is not the innermost stride."""
    return torch.randn(1, 4, length, 1).permute(0, 2, 3, 1)


@pytest.mark.filterwarnings("ignore:(Flash|All fused)")  # torch says why it refuses
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_the_math_path_is_refused_above_the_limit(backend: str) -> None:
    allowed, refused = _unfusable(64), _unfusable(MATH_LIMIT + 1)
    assert attention(allowed, allowed, allowed, backend=backend).shape == (1, 64, 1, 4)
    with pytest.raises(KernelUnavailableError, match=r"4097 tokens.*math path is refused"):
        attention(refused, refused, refused, backend=backend)


@pytest.mark.filterwarnings("ignore:(Flash|All fused)")
def test_the_limit_counts_keys_as_well_as_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MATH_LIMIT", 32)
    short, long = _unfusable(32), _unfusable(33)
    attention(short, short, short)
    for q, k in ((short, long), (long, short)):
        with pytest.raises(KernelUnavailableError):
            attention(q, k, k)


def test_opcheck() -> None:
    q, k, v = _inputs(2, 5, 9, 3, 4, torch.float32)
    torch.library.opcheck(torch.ops.mv2v.attention.default, (q, k, v))


def test_compiles_without_graph_breaks() -> None:
    q, k, v = _inputs(2, 5, 9, 3, 4, torch.float32)
    compiled = torch.compile(
        lambda q: attention(q, k, v, backend="auto"), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(q), attention(q, k, v))


@pytest.mark.parametrize("wrong", ["values", "heads", "dim", "batch"])
def test_rejects_bad_shapes(wrong: str) -> None:
    q, k, v = _inputs(2, 5, 9, 3, 4, torch.float32)
    if wrong == "values":
        v = v[:, :4]
    elif wrong == "heads":
        k, v = k[:, :, :2], v[:, :, :2]
    elif wrong == "dim":
        k, v = k[..., :2], v[..., :2]
    else:
        q = q[:1]
    with pytest.raises(ValueError, match="must agree"):
        attention(q, k, v)
