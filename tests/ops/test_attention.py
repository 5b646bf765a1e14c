"""Attention: float64 oracle, self and cross, and no math path on long sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine.errors import KernelUnavailableError
from mv2v_engine.ops import attention as module
from mv2v_engine.ops.attention import MATH_LIMIT, attention, attention_varlen
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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_in_bfloat16_match_float64(case: tuple[int, int, int, int, int]) -> None:
    given = _inputs(*case, torch.bfloat16)
    weight = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(1))

    def gradients(compute: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in given]
        (compute(*leaves) * weight.to(dtype)).sum().backward()
        return tuple(leaf.grad for leaf in leaves)

    ours = gradients(attention, torch.bfloat16)
    oracles = gradients(_naive, torch.float64)
    for got, oracle, eager in zip(ours, oracles, gradients(_naive, torch.bfloat16), strict=True):
        assert_within_budget(got, oracle, eager)


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
    torch.library.opcheck(torch.ops.mv2v.attention.default, (q, k, v, "auto"))


PACKS = [  # query and key lengths of every sequence, heads, head dim
    ([1], [1], 1, 2),
    ([37, 130, 1], [64, 5, 131], 2, 24),
    ([0, 9, 3], [7, 128, 0], 1, 16),  # a sequence without queries, one without keys
]


def _pack(
    queries: list[int], keys: list[int], heads: int, dim: int, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    torch.manual_seed(sum(keys))
    q = 2 * torch.randn(sum(queries), heads, dim)
    k, v = torch.randn(2, sum(keys), heads, dim).unbind()
    starts = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (queries, keys)]
    packed = {
        "cu_seqlens_q": starts[0],
        "cu_seqlens_k": starts[1],
        "max_seqlen_q": max(queries),
        "max_seqlen_k": max(keys),
    }
    return (q.to(dtype), k.to(dtype), v.to(dtype)), packed


def _naive_varlen(q: Tensor, k: Tensor, v: Tensor, pack: dict[str, Any]) -> tuple[Tensor, Tensor]:
    out, lse = torch.zeros_like(q), torch.full((q.shape[1], len(q)), -torch.inf, dtype=q.dtype)
    starts = [pack["cu_seqlens_q"].tolist(), pack["cu_seqlens_k"].tolist()]
    for a, b, c, d in zip(starts[0], starts[0][1:], starts[1], starts[1][1:], strict=False):
        if b > a and d > c:
            out[a:b] = _naive(q[None, a:b], k[None, c:d], v[None, c:d])[0]
            scores = torch.einsum("lnd,snd->nls", q[a:b], k[c:d]) * q.shape[-1] ** -0.5
            lse[:, a:b] = scores.logsumexp(-1)
    return out, lse


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pack", PACKS, ids=str)
def test_packed_matches_float64(
    pack: tuple[list[int], list[int], int, int], dtype: torch.dtype, backend: str
) -> None:
    (q, k, v), lengths = _pack(*pack, dtype)
    oracle, oracle_lse = _naive_varlen(q.double(), k.double(), v.double(), lengths)
    eager, _ = _naive_varlen(q, k, v, lengths)
    _, eager_lse = _naive_varlen(q.float(), k.float(), v.float(), lengths)
    out, lse = attention_varlen(q, k, v, **lengths, backend=backend)
    assert_within_budget(out, oracle, eager)
    # every dtype's scores are summed in float32; a query without keys has -inf
    seen = oracle_lse.isfinite()
    assert torch.equal(lse.isneginf(), ~seen)
    assert_within_budget(lse[seen], oracle_lse[seen], eager_lse[seen])


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_disjoint_keys_merge_by_their_log_sum_exp(backend: str) -> None:
    (q, k, v), lengths = _pack([17], [70], 2, 8, torch.float32)
    whole, whole_lse = attention_varlen(q, k, v, **lengths, backend=backend)
    parts = []
    for keys in (slice(0, 30), slice(30, 70)):
        count = keys.stop - keys.start
        some = {"cu_seqlens_k": torch.tensor([0, count]).int(), "max_seqlen_k": count}
        parts.append(attention_varlen(q, k[keys], v[keys], **lengths | some, backend=backend))
    both = torch.stack([lse for _, lse in parts])
    share = both.softmax(0).transpose(1, 2)[..., None]
    torch.testing.assert_close(
        sum(s * out for s, (out, _) in zip(share, parts, strict=True)), whole
    )
    torch.testing.assert_close(both.logsumexp(0), whole_lse)


def test_packed_takes_strided_heads() -> None:
    (q, k, v), lengths = _pack([9, 3], [7, 65], 3, 6, torch.float32)
    turned = [t.permute(2, 0, 1).contiguous().permute(1, 2, 0) for t in (q, k, v)]
    got = attention_varlen(turned[0], turned[1], turned[2], **lengths, backend="auto")
    expected = attention_varlen(q, k, v, **lengths, backend="auto")
    for value, plain in zip(got, expected, strict=True):
        torch.testing.assert_close(value, plain)


def test_packed_opcheck() -> None:
    (q, k, v), lengths = _pack([5, 2], [3, 9], 2, 4, torch.float32)
    torch.library.opcheck(
        torch.ops.mv2v.attention_varlen.default, (q, k, v, *lengths.values(), "auto")
    )


def test_packed_math_path_is_refused_above_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MATH_LIMIT", 8)
    (q, k, v), lengths = _pack([5, 2], [3, 9], 2, 4, torch.float32)
    attention_varlen(q, k, v, **lengths)  # as fused as dense attention is here
    q, k, v = (t.permute(2, 0, 1).contiguous().permute(1, 2, 0) for t in (q, k, v))
    with pytest.raises(KernelUnavailableError, match="above 8 tokens, got 2 queries and 9 keys"):
        attention_varlen(q, k, v, **lengths)


def test_packed_sequences_have_the_bits_of_dense_ones_on_a_cpu() -> None:
    (q, k, v), lengths = _pack([5, 70], [3, 9], 2, 4, torch.float32)
    out, _ = attention_varlen(q, k, v, **lengths)
    for rows, keys in ((slice(0, 5), slice(0, 3)), (slice(5, 75), slice(3, 12))):
        assert torch.equal(out[rows], attention(q[None, rows], k[None, keys], v[None, keys])[0])


def test_the_packed_reference_can_be_trained_with() -> None:
    (q, k, v), lengths = _pack([5], [9], 2, 4, torch.float32)
    gradients = []
    for is_packed in (True, False):
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        if is_packed:
            out, _ = attention_varlen(*inputs, **lengths)
        else:
            out = attention(*(t[None] for t in inputs))[0]
        gradients.append(torch.autograd.grad(out.square().sum(), inputs))
    for packed, dense in zip(*gradients, strict=True):
        torch.testing.assert_close(packed, dense)
