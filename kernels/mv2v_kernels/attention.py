"""Attention over packed sequences of any lengths, with the log-sum-exp of every query.

One program takes a block of queries of one sequence and head through that sequence's keys, with a
running softmax in base 2. Whole key blocks need no mask, so only the last one has it.

T packed queries, S packed keys, N heads, D head dim, G sequences.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mv2v_kernels.common import capability, check_dtypes, check_grid, dot, is_exact, on_device

LOG2E = tl.constexpr(1.4426950408889634)
MAX_HEAD_DIM = 128


@triton.jit
def _attend(
    b_q,
    p_k,
    p_v,
    b_max,
    b_sum,
    b_out,
    o_s,
    len_k,
    m_d,
    scale,
    EVEN_D: tl.constexpr,
    IS_LAST: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One block of keys: the running maximum, denominator and numerator after it."""
    # [D, S] and [S, D]
    if IS_LAST:
        m_s = o_s < len_k
        b_k = tl.load(p_k, mask=m_d[:, None] & m_s[None, :], other=0.0)
        b_v = tl.load(p_v, mask=m_s[:, None] & m_d[None, :], other=0.0)
    elif EVEN_D:
        b_k = tl.load(p_k)
        b_v = tl.load(p_v)
    else:
        b_k = tl.load(p_k, mask=m_d[:, None], other=0.0)
        b_v = tl.load(p_v, mask=m_d[None, :], other=0.0)
    b_s = dot(b_q, b_k, tl.zeros([b_q.shape[0], b_k.shape[1]], tl.float32), EXACT) * scale
    if IS_LAST:
        b_s = tl.where((o_s < len_k)[None, :], b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_p = tl.exp2(b_s - b_new[:, None])
    b_shrink = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
    if not EXACT:
        b_p = b_p.to(b_v.dtype)
    return b_new, b_sum, dot(b_p, b_v, b_out * b_shrink[:, None], EXACT)


@triton.jit
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cu_q_ptr,
    cu_k_ptr,
    T,
    scale,
    stride_qt,
    stride_qn,
    stride_qd,
    stride_ks,
    stride_kn,
    stride_kd,
    stride_vs,
    stride_vn,
    stride_vd,
    stride_ot,
    stride_on,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EXACT: tl.constexpr,
):
    i_n = tl.program_id(1).to(tl.int64)
    first_q = tl.load(cu_q_ptr + tl.program_id(2)).to(tl.int64)
    first_k = tl.load(cu_k_ptr + tl.program_id(2)).to(tl.int64)
    len_q = (tl.load(cu_q_ptr + tl.program_id(2) + 1) - first_q).to(tl.int32)
    len_k = (tl.load(cu_k_ptr + tl.program_id(2) + 1) - first_k).to(tl.int32)
    if tl.program_id(0) * BLOCK_Q >= len_q:
        return
    o_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_s = tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)
    m_q, m_d = o_q < len_q, o_d < D
    p_q = q_ptr + i_n * stride_qn + (first_q + o_q)[:, None] * stride_qt + o_d[None, :] * stride_qd
    b_q = tl.load(p_q, mask=m_q[:, None] & m_d[None, :], other=0.0)
    o_row = (first_k + o_s).to(tl.int64)
    p_k = k_ptr + i_n * stride_kn + o_row[None, :] * stride_ks + o_d[:, None] * stride_kd
    p_v = v_ptr + i_n * stride_vn + o_row[:, None] * stride_vs + o_d[None, :] * stride_vd
    b_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_Q], tl.float32)
    b_out = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    whole = len_k // BLOCK_K * BLOCK_K
    step = tl.full([], BLOCK_K, tl.int64)
    for _ in range(0, whole, BLOCK_K):
        b_max, b_sum, b_out = _attend(
            b_q, p_k, p_v, b_max, b_sum, b_out, o_s, len_k, m_d, scale * LOG2E,
            D == BLOCK_D, False, EXACT,
        )  # fmt: skip
        p_k += step * stride_ks
        p_v += step * stride_vs
    if whole < len_k:
        b_max, b_sum, b_out = _attend(
            b_q, p_k, p_v, b_max, b_sum, b_out, whole + o_s, len_k, m_d, scale * LOG2E,
            D == BLOCK_D, True, EXACT,
        )  # fmt: skip
    # no key at all leaves zeros, and a maximum of -inf
    b_sum = tl.where(b_sum == 0, 1.0, b_sum)
    b_lse = (b_max + tl.log2(b_sum)) / LOG2E
    b_out = b_out / b_sum[:, None]
    p_out = out_ptr + i_n * stride_on + (first_q + o_q)[:, None] * stride_ot + o_d[None, :]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_q[:, None] & m_d[None, :])
    tl.store(lse_ptr + i_n * T + first_q + o_q, b_lse, mask=m_q)


def _tile(dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Queries, keys, warps and stages that fit registers and shared memory."""
    if dtype == torch.float32:
        return 64, 32, 4, 1
    # without Hopper's asynchronous products, 64 keys spill registers
    return 128, 64 if capability() in (90, 100) else 32, 8, 3


def launch_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int
) -> tuple[Tensor, Tensor]:
    """q [T, N, D], k and v [S, N, D], cu_q and cu_k [G + 1] -> [T, N, D] and float32 [N, T]."""
    check_dtypes("attention", q=q, k=k, v=v)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"attention in Triton takes one dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    length, num_heads, head_dim = q.shape
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"attention in Triton takes a head dim up to {MAX_HEAD_DIM}, got {head_dim}"
        )
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((num_heads, length), dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    block_d = max(triton.next_power_of_2(head_dim), 16)
    block_q, block_k, num_warps, num_stages = _tile(q.dtype)
    grid = (triton.cdiv(max_q, block_q), num_heads, cu_q.numel() - 1)
    check_grid("attention", *grid)
    with on_device(q):
        _attention_kernel[grid](
            q,
            k,
            v,
            out,
            lse,
            cu_q,
            cu_k,
            length,
            head_dim**-0.5,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *out.stride()[:2],
            D=head_dim,
            BLOCK_D=block_d,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            EXACT=is_exact(q.dtype),
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return out, lse
