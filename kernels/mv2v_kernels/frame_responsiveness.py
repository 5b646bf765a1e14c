"""Frame means, then the largest softmax share of every frame; no query x frame table in memory.

Three kernels: `_frame_mean_kernel` reads the keys once; `_row_lse_kernel` leaves the log of every
query's softmax denominator; `_share_max_kernel` forms the scores again, tile by tile, and keeps each
frame's largest share. Shares are not negative, so their bit patterns order as integers do, and an
integer atomic maximum gives the same bits in whatever order the programs run.

16-bit keys have means that do not fit 16 bits: a mean is kept as the sum of two 16-bit parts, so that
tensor cores multiply it with an error of 2**-17 (bfloat16) instead of 2**-9.

B batch, Q target queries, L conditioning tokens, C width, N heads, D = C / N, F frames.
"""

from __future__ import annotations

from itertools import groupby

import torch
import triton
import triton.language as tl
from torch import Tensor

from mv2v_kernels.common import capability, check_dtypes, check_grid, dot, is_exact, on_device

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["first_token", "first_frame", "tokens"])
def _frame_mean_kernel(
    k_ptr,
    mean_ptr,
    first_token,
    first_frame,
    tokens,
    stride_kb,
    stride_kl,
    stride_kc,
    stride_mp,
    stride_mb,
    stride_mf,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_f = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    o_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_l = tl.arange(0, BLOCK_L).to(tl.int64)
    m_c = o_c < C
    p_k = k_ptr + i_b * stride_kb + (first_token + i_f * tokens) * stride_kl + o_c * stride_kc
    b_sum = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
    for i_l in range(0, tokens, BLOCK_L):
        o_row = i_l + o_l[:, None]
        m_k = (o_row < tokens) & m_c[None, :]
        b_sum += tl.load(p_k[None, :] + o_row * stride_kl, mask=m_k, other=0.0).to(tl.float32)
    b_mean = tl.sum(b_sum, 0) / tokens
    p_mean = mean_ptr + i_b * stride_mb + (first_frame + i_f) * stride_mf + o_c
    for i_part in tl.static_range(PARTS):
        b_part = b_mean.to(mean_ptr.dtype.element_ty)
        tl.store(p_mean + i_part * stride_mp, b_part, mask=m_c)
        b_mean -= b_part.to(tl.float32)


@triton.jit
def _scores(
    p_q,
    p_mean,
    first,
    m_q,
    m_f,
    stride_qc,
    stride_mp,
    scale,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXACT: tl.constexpr,
):
    """scale * q . mean [BLOCK_Q, BLOCK_F] over the D channels from `first`; pointers to channel 0."""
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)
    b_s = tl.zeros([BLOCK_Q, BLOCK_F], tl.float32)
    for i_d in range(0, D, BLOCK_D):
        m_d = i_d + o_d < D
        p_q_d = p_q[:, None] + (first + i_d + o_d)[None, :] * stride_qc
        b_q = tl.load(p_q_d, mask=m_q[:, None] & m_d[None, :], other=0.0)
        for i_part in tl.static_range(PARTS):
            p_m_d = p_mean[None, :] + (first + i_d + o_d)[:, None] + i_part * stride_mp
            b_mean = tl.load(p_m_d, mask=m_d[:, None] & m_f[None, :], other=0.0)
            b_s = dot(b_q, b_mean, b_s, EXACT)
    return b_s * scale


@triton.jit
def _row_lse_kernel(
    q_ptr,
    mean_ptr,
    lse_ptr,
    Q,
    F,
    scale,
    stride_qb,
    stride_ql,
    stride_qc,
    stride_mp,
    stride_mb,
    stride_mf,
    N: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXACT: tl.constexpr,
):
    i_n = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    o_q = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_q = o_q < Q
    p_q = q_ptr + i_b * stride_qb + o_q * stride_ql
    b_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_Q], tl.float32)
    for i_f in range(0, F, BLOCK_F):
        o_f = (i_f + tl.arange(0, BLOCK_F)).to(tl.int64)
        p_mean = mean_ptr + i_b * stride_mb + o_f * stride_mf
        b_s = _scores(
            p_q, p_mean, i_n * D, m_q, o_f < F, stride_qc, stride_mp, scale * LOG2E,
            D, PARTS, BLOCK_Q, BLOCK_F, BLOCK_D, EXACT,
        )  # fmt: skip
        b_s = tl.where((o_f < F)[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_sum = b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(b_s - b_new[:, None]), 1)
        b_max = b_new
    tl.store(lse_ptr + (i_b * N + i_n) * Q + o_q, b_max + tl.log2(b_sum), mask=m_q)


@triton.jit
def _share_max_kernel(
    q_ptr,
    mean_ptr,
    lse_ptr,
    best_ptr,
    Q,
    F,
    scale,
    stride_qb,
    stride_ql,
    stride_qc,
    stride_mp,
    stride_mb,
    stride_mf,
    N: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXACT: tl.constexpr,
):
    i_b = tl.program_id(2).to(tl.int64)
    o_q = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_f = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_q, m_f = o_q < Q, o_f < F
    b_share = tl.zeros([BLOCK_Q, BLOCK_F], tl.float32)
    p_q = q_ptr + i_b * stride_qb + o_q * stride_ql
    p_mean = mean_ptr + i_b * stride_mb + o_f * stride_mf
    for i_n in range(N):
        b_s = _scores(
            p_q, p_mean, i_n * D, m_q, m_f, stride_qc, stride_mp, scale * LOG2E,
            D, PARTS, BLOCK_Q, BLOCK_F, BLOCK_D, EXACT,
        )  # fmt: skip
        b_lse = tl.load(lse_ptr + (i_b * N + i_n) * Q + o_q, mask=m_q, other=float("inf"))
        b_share += tl.exp2(b_s - b_lse[:, None])
    b_best = tl.minimum(tl.max(b_share, 0) / N, 1.0)
    p_best = best_ptr + i_b * F + o_f
    tl.atomic_max(p_best, b_best.to(tl.int32, bitcast=True), mask=m_f, sem="relaxed")


def launch_frame_responsiveness(
    q: Tensor, k: Tensor, frames: list[int], tokens: list[int], num_heads: int
) -> Tensor:
    """q [B, Q, C], k [B, L, C] in runs of `frames` x `tokens` -> float32 [B, F]."""
    check_dtypes("frame_responsiveness", q=q, k=k)
    if q.dtype != k.dtype:
        raise TypeError(
            f"frame_responsiveness in Triton takes q and k of one dtype, got {q.dtype} and {k.dtype}"
        )
    batch, num_queries, width = q.shape
    num_frames, head_dim = sum(frames), width // num_heads
    best = torch.zeros((batch, num_frames), dtype=torch.int32, device=q.device)
    if not batch:
        return best.view(torch.float32)
    is_wide = q.dtype == torch.float32
    parts = 1 if is_wide else 2
    means = torch.empty((parts, batch, num_frames, width), dtype=k.dtype, device=k.device)
    lse = torch.empty((batch, num_heads, num_queries), dtype=torch.float32, device=q.device)
    with on_device(q):
        _launch_means(k, means, frames, tokens)
        # two sums stand in registers where heads are averaged
        block_q = 64 if is_wide or num_heads > 1 else 128
        block_f = min(max(triton.next_power_of_2(num_frames), 32), 64 if is_wide else 128)
        query_blocks, frame_blocks = (
            triton.cdiv(num_queries, block_q),
            triton.cdiv(num_frames, block_f),
        )
        kernels = (
            (_row_lse_kernel, num_heads, (lse,)),
            (_share_max_kernel, frame_blocks, (lse, best)),
        )
        for kernel, columns, outputs in kernels:
            grid = (query_blocks, columns, batch)
            check_grid("frame_responsiveness", *grid)
            kernel[grid](
                q,
                means,
                *outputs,
                num_queries,
                num_frames,
                head_dim**-0.5,
                *q.stride(),
                *means.stride()[:3],
                N=num_heads,
                D=head_dim,
                PARTS=parts,
                BLOCK_Q=block_q,
                BLOCK_F=block_f,
                BLOCK_D=32 if is_wide else 64,
                EXACT=is_exact(q.dtype),
                num_warps=8,
                # what three stages need does not fit the shared memory of sm_86, 89 and 120
                num_stages=3 if capability() in (80, 90, 100) else 2,
            )
    return best.view(torch.float32)


def _launch_means(k: Tensor, means: Tensor, frames: list[int], tokens: list[int]) -> None:
    """One launch for each stretch of frames of equal length: their sizes never leave the host."""
    batch, _, width = k.shape
    block_c = min(max(triton.next_power_of_2(width), 16), 64)
    first_token = first_frame = 0
    runs = zip(frames, tokens, strict=True)
    for per_frame, stretch in groupby(runs, key=lambda run: run[1]):
        count = sum(run[0] for run in stretch)
        grid = (triton.cdiv(width, block_c), count, batch)
        check_grid("frame_responsiveness", *grid)
        _frame_mean_kernel[grid](
            k,
            means,
            first_token,
            first_frame,
            per_frame,
            *k.stride(),
            *means.stride()[:3],
            C=width,
            PARTS=len(means),
            BLOCK_L=64,
            BLOCK_C=block_c,
            num_warps=4,
        )
        first_token += count * per_frame
        first_frame += count
