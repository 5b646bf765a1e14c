"""Attention as SageAttention and SpargeAttn compute it, against float64 by a bound from the data.

Rounding q by at most a and k by at most b a channel moves a score by at most e = a |k|_1 + b |q'|_1
(q' the rounded q), times the scale; weights then move by at most tanh(e / 2) in total variation,
and the result by twice that times the largest distance of a value from it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mv2v_engine.config import EngineConfig
from mv2v_engine.errors import KernelUnavailableError
from mv2v_engine.ops.attention import attention
from mv2v_engine.ops.attention_backends import resolve_attention
from mv2v_engine.ops.attention_rounded import (
    KEYS,
    QUERIES,
    chosen_blocks,
    rounded_attention,
    rounded_blocks,
)
from mv2v_engine.testing import relative_error

CASES = [  # batch, queries, keys, heads, head dim
    (1, 1, 1, 1, 2),
    (2, 130, 65, 3, 10),
    (1, 257, 191, 2, 64),
    (1, 5, 300, 1, 128),
]


def _inputs(
    batch: int, queries: int, keys: int, heads: int, dim: int, *, offset: float = 0.0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(keys)
    sizes = (queries, keys, keys)
    q, k, v = (torch.randn(batch, size, heads, dim, generator=generator) for size in sizes)
    return [2 * q, k + offset, v]


def _exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.einsum("blnd,bsnd->bnls", q, k) * q.shape[-1] ** -0.5
    weights = scores.softmax(-1)
    return torch.einsum("bnls,bsnd->blnd", weights, v), weights


def _steps(x_BLND: Tensor, size: int) -> Tensor:
    """The scale of every token's block [B, L, N, 1], found block by block."""
    scales = torch.empty(*x_BLND.shape[:3], 1, dtype=torch.float64)
    for start in range(0, x_BLND.shape[1], size):
        block = x_BLND[:, start : start + size].double()
        scales[:, start : start + size] = block.abs().amax((1, 3))[:, None, :, None] / 127 + 1e-7
    return scales


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_error_is_that_of_the_rounding(
    case: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    q, k, v = (t.to(dtype) for t in _inputs(*case))
    oracle, _ = _exact(q, k, v)
    got = attention(q, k, v, backend="sage-reference")
    assert got.dtype == dtype and got.shape == q.shape and got.is_contiguous()

    smooth = k.double() - k.double().mean(1, keepdim=True)
    a, b = _steps(q, QUERIES) / 2, _steps(smooth, KEYS) / 2
    from_q = torch.einsum("bln,bsn->bnls", a[..., 0], smooth.abs().sum(-1))
    from_k = torch.einsum(
        "bln,bsn->bnls", q.double().abs().sum(-1) + a[..., 0] * q.shape[-1], b[..., 0]
    )
    shift = ((from_q + from_k) * q.shape[-1] ** -0.5).amax(-1)
    reach = (v.double()[:, None] - oracle[:, :, None]).norm(dim=-1).amax(2).transpose(1, 2)
    bound = 2 * torch.tanh(shift / 2) * reach
    # what float32 inside and the store add
    spare = 1e-5 + float(oracle.abs().max()) * torch.finfo(dtype).eps * case[4] ** 0.5
    error = (got.double() - oracle).norm(dim=-1).transpose(1, 2)
    assert (error <= bound + spare).all()
    if case[2] > 1 and dtype == torch.float32:
        assert 1e-4 < relative_error(got, oracle) < 0.05


def test_integers_and_scales() -> None:
    """By whole numbers, one block after the other; halves away from zero."""
    q, k, v = _inputs(1, 150, 70, 2, 12)
    smooth = k - k.mean(1, keepdim=True)
    out = torch.empty(150, 2, 12, dtype=torch.float64)
    for head in range(2):
        for start in range(0, 150, 128):
            rows = q[0, start : start + 128, head]
            s = rows.abs().max() / 127 + 1e-7
            ints = torch.floor(rows.abs() / s + 0.5).int() * rows.sign().int()
            parts = []
            for first in range(0, 70, 64):
                keys = smooth[0, first : first + 64, head]
                t = keys.abs().max() / 127 + 1e-7
                other = torch.floor(keys.abs() / t + 0.5).int() * keys.sign().int()
                parts.append((ints @ other.T).double() * s.double() * t.double())
            weights = (torch.cat(parts, 1) * 12**-0.5).softmax(-1)
            out[start : start + 128, head] = weights @ v[0, :, head].double()
    torch.testing.assert_close(rounded_attention(q, k, v)[0].double(), out, rtol=1e-5, atol=1e-6)
    ints, _ = rounded_blocks(torch.tensor([127.0, 0.5, -0.5, -1.5]).reshape(1, 1, 1, 4), 64)
    assert ints.flatten().tolist() == [127, 0, 0, -1]  # the scale is a little above one


def test_smoothing_is_what_keeps_keys_with_a_common_part() -> None:
    q, k, v = _inputs(1, 130, 200, 2, 64, offset=50.0)
    oracle, _ = _exact(q, k, v)
    assert relative_error(rounded_attention(q, k, v), oracle) < 0.05
    # a plain rounding of such keys leaves nothing of what tells them apart
    ints, scale = rounded_blocks(k.transpose(1, 2), KEYS)
    plain = (ints * scale.repeat_interleave(KEYS, 2)[:, :, :200, None]).transpose(1, 2)
    assert relative_error(_exact(q, plain, v)[0], oracle) > 0.1


@pytest.mark.parametrize(("share", "count"), [(0.5, 2), (0.01, 1), (1.0, 5)])
def test_blocks_by_their_means(share: float, count: int) -> None:
    q, k, v = _inputs(1, 200, 300, 2, 16)
    q, k = q + torch.randn(2, 16) * 2, k * 2
    smooth = k - k.mean(1, keepdim=True)
    seen = chosen_blocks(q.transpose(1, 2), smooth.transpose(1, 2), share)
    assert seen.shape == (1, 2, 2, 5) and (seen.sum(-1) == count).all()
    out = rounded_attention(q, k, v, share=share)
    for head in range(2):
        for block in range(2):
            rows = slice(128 * block, 128 * (block + 1))
            mean = q[0, rows, head].mean(0)
            means = [smooth[0, 64 * j : 64 * (j + 1), head].mean(0) for j in range(5)]
            scores = torch.stack([mean @ each for each in means])
            best = sorted(scores.argsort(descending=True)[:count].tolist())
            assert seen[0, head, block].nonzero().flatten().tolist() == best
            keys = torch.cat([torch.arange(300)[64 * j : 64 * (j + 1)] for j in best])
            expected, _ = _exact(
                q[:, rows, head : head + 1],
                k[:, keys, head : head + 1],
                v[:, keys, head : head + 1],
            )
            assert relative_error(out[:, rows, head : head + 1], expected) < 0.1
    if share == 1:
        assert torch.equal(out, rounded_attention(q, k, v))


def test_by_name_on_any_device() -> None:
    cpu = torch.device("cpu")
    for name in ("sage-reference", "sparge-reference"):
        for dtype in (torch.float32, torch.bfloat16):
            config = EngineConfig(attention=name)  # type: ignore[arg-type]
            assert resolve_attention(config, cpu, dtype, num_heads=3, head_dim=12) == name
        q, k, v = _inputs(1, 7, 0, 1, 4)
        with pytest.raises(KernelUnavailableError, match="at least one key"):
            attention(q, k, v, backend=name)
    with pytest.raises(KernelUnavailableError, match="'sage', but it needs a CUDA device, not cpu"):
        resolve_attention(EngineConfig(attention="sage"), cpu, torch.bfloat16)
