"""Chosen frames copied or convolved into the shortened sequence, positions with them.

Which frames is data on the device; how many is a shape, so nothing here waits for the device. Every
token of the result is written once, in place: a merged one by a gather-GEMM whose rows are the
tokens under the window (the border repeats where the grid is odd), all else by the pooling kernel,
to which a copy is a window of one cell.

B batch, F frames of a group, P tokens of a frame, C width, R rotary channels, K kept, M merged frames.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mv2v_kernels.common import check_dtypes, check_grid, dot, is_exact, on_device


@triton.jit
def _source(o_j, i_tap, GRID_H, GRID_W, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr):
    """Frame slot, and the token under cell `i_tap` of the window, of every result token."""
    columns = (GRID_W + KERNEL_W - 1) // KERNEL_W
    windows = (GRID_H + KERNEL_H - 1) // KERNEL_H * columns
    o_window = o_j % windows
    o_row = tl.minimum(o_window // columns * KERNEL_H + i_tap // KERNEL_W, GRID_H - 1)
    o_column = tl.minimum(o_window % columns * KERNEL_W + i_tap % KERNEL_W, GRID_W - 1)
    return o_j // windows, (o_row * GRID_W + o_column).to(tl.int64)


@triton.jit
def _pool_kernel(
    x_ptr,
    index_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    J,
    GRID_H,
    GRID_W,
    first,
    stride_xb,
    stride_xf,
    stride_xp,
    stride_xc,
    stride_ib,
    stride_ik,
    stride_ob,
    C: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean of every window, or its sum weighted per channel by weight [cells, C]."""
    i_b = tl.program_id(2).to(tl.int64)
    o_j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    o_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    m_x = (o_j < J)[:, None] & m_c[None, :]
    b_sum = tl.zeros([BLOCK_J, BLOCK_C], tl.float32)
    for i_tap in tl.static_range(KERNEL_H * KERNEL_W):
        o_slot, o_p = _source(o_j, i_tap, GRID_H, GRID_W, KERNEL_H, KERNEL_W)
        p_index = index_ptr + i_b * stride_ib + o_slot.to(tl.int64) * stride_ik
        o_f = tl.load(p_index, mask=o_j < J, other=0).to(tl.int64)
        p_row = x_ptr + i_b * stride_xb + o_f * stride_xf + o_p * stride_xp
        b_x = tl.load(p_row[:, None] + (o_c * stride_xc)[None, :], mask=m_x, other=0.0)
        if HAS_WEIGHT:
            b_weight = tl.load(weight_ptr + i_tap * C + o_c, mask=m_c, other=0.0)
            b_sum += b_x.to(tl.float32) * b_weight.to(tl.float32)[None, :]
        else:
            b_sum += b_x.to(tl.float32) * (1.0 / (KERNEL_H * KERNEL_W))
    if HAS_BIAS:
        b_sum += tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    p_out = out_ptr + i_b * stride_ob + (first + o_j.to(tl.int64)[:, None]) * C + o_c[None, :]
    tl.store(p_out, b_sum.to(out_ptr.dtype.element_ty), mask=m_x)


@triton.jit
def _merge_kernel(
    x_ptr,
    index_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    J,
    GRID_H,
    GRID_W,
    first,
    stride_xb,
    stride_xf,
    stride_xp,
    stride_xc,
    stride_ib,
    stride_ik,
    stride_ob,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    IS_POOLED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Windows times weight [cells, C, C / groups]; IS_POOLED: their means times weight [C, C]."""
    INNER: tl.constexpr = C // GROUPS
    CELLS: tl.constexpr = KERNEL_H * KERNEL_W
    # blocks of one group's channels side by side, so that they share their rows in L2
    BLOCKS: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N
    i_b = tl.program_id(2).to(tl.int64)
    i_group = tl.program_id(0) // BLOCKS
    o_j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    o_inner = tl.program_id(0) % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K).to(tl.int64)
    o_n = (i_group * INNER + o_inner).to(tl.int64)
    m_j, m_n = o_j < J, o_inner < INNER
    b_out = tl.zeros([BLOCK_J, BLOCK_N], tl.float32)
    p_x = x_ptr + i_b * stride_xb + i_group.to(tl.int64) * INNER * stride_xc
    p_index = index_ptr + i_b * stride_ib
    if IS_POOLED:
        for i_k in range(0, INNER, BLOCK_K):
            m_k = i_k + o_k < INNER
            b_mean = tl.zeros([BLOCK_J, BLOCK_K], tl.float32)
            for i_tap in tl.static_range(CELLS):
                o_slot, o_p = _source(o_j, i_tap, GRID_H, GRID_W, KERNEL_H, KERNEL_W)
                o_f = tl.load(p_index + o_slot.to(tl.int64) * stride_ik, mask=m_j, other=0).to(
                    tl.int64
                )
                p_row = p_x + o_f * stride_xf + o_p * stride_xp
                p_cell = p_row[:, None] + ((i_k + o_k) * stride_xc)[None, :]
                b_x = tl.load(p_cell, mask=m_j[:, None] & m_k[None, :], other=0.0)
                b_mean += b_x.to(tl.float32) * (1.0 / CELLS)
            p_weight = weight_ptr + o_n[None, :] * INNER + (i_k + o_k)[:, None]
            b_weight = tl.load(p_weight, mask=m_k[:, None] & m_n[None, :], other=0.0)
            b_out = dot(b_mean.to(x_ptr.dtype.element_ty), b_weight, b_out, EXACT)
    else:
        for i_tap in range(CELLS):
            o_slot, o_p = _source(o_j, i_tap, GRID_H, GRID_W, KERNEL_H, KERNEL_W)
            o_f = tl.load(p_index + o_slot.to(tl.int64) * stride_ik, mask=m_j, other=0).to(tl.int64)
            p_row = p_x + o_f * stride_xf + o_p * stride_xp
            p_tap = weight_ptr + (i_tap * C + o_n) * INNER
            for i_k in range(0, INNER, BLOCK_K):
                m_k = i_k + o_k < INNER
                p_cell = p_row[:, None] + ((i_k + o_k) * stride_xc)[None, :]
                b_x = tl.load(p_cell, mask=m_j[:, None] & m_k[None, :], other=0.0)
                p_weight = p_tap[None, :] + (i_k + o_k)[:, None]
                b_weight = tl.load(p_weight, mask=m_k[:, None] & m_n[None, :], other=0.0)
                b_out = dot(b_x, b_weight, b_out, EXACT)
    if HAS_BIAS:
        b_out += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_out = out_ptr + i_b * stride_ob + (first + o_j.to(tl.int64)[:, None]) * C + o_n[None, :]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_j[:, None] & m_n[None, :])


def launch_token_merge(
    x: Tensor,
    rope: Tensor,
    kept: Tensor,
    merged: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grid: list[int],
    kernel: list[int],
) -> tuple[Tensor, Tensor]:
    """Frames x [B, F, P, C], rope [1 or B, F, P, R] -> tokens [B, L', C], rope [B, L', R]."""
    check_dtypes("token_merge", x=x, rope=rope, weight=weight, bias=bias)
    if weight is not None and weight.dtype != x.dtype:
        raise TypeError(
            f"token_merge in Triton takes x and weight of one dtype, got {x.dtype} and {weight.dtype}"
        )
    batch, _, per_frame, width = x.shape
    windows = -(-grid[0] // kernel[0]) * -(-grid[1] // kernel[1])
    num_kept, num_merged = kept.shape[1] * per_frame, merged.shape[1] * windows
    shape = (batch, num_kept + num_merged)
    tokens = torch.empty((*shape, width), dtype=x.dtype, device=x.device)
    turns = torch.empty((*shape, rope.shape[-1]), dtype=rope.dtype, device=x.device)
    bias = None if bias is None or weight is None else bias.contiguous()
    with on_device(x):
        _pool(x, kept, None, None, tokens, 0, num_kept, grid, [1, 1])
        _pool(rope, kept, None, None, turns, 0, num_kept, grid, [1, 1])
        _pool(rope, merged, None, None, turns, num_kept, num_merged, grid, kernel)
        if weight is None:
            _pool(x, merged, None, None, tokens, num_kept, num_merged, grid, kernel)
        elif weight.ndim == 4 and weight.shape[1] == 1:
            per_cell = weight.flatten(1).t().contiguous()
            _pool(x, merged, per_cell, bias, tokens, num_kept, num_merged, grid, kernel)
        else:
            _merge(x, merged, weight, bias, tokens, num_kept, num_merged, grid, kernel)
    return tokens, turns


def _pool(
    x: Tensor,
    index: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    first: int,
    count: int,
    grid: list[int],
    kernel: list[int],
) -> None:
    """Write tokens `first` to `first + count` of `out`."""
    batch, width = len(out), out.shape[-1]
    if not batch * count * width:
        return
    block_c = min(max(triton.next_power_of_2(width), 16), 256)
    programs = (triton.cdiv(count, 16), triton.cdiv(width, block_c), batch)
    check_grid("token_merge", *programs)
    _pool_kernel[programs](
        x,
        index,
        x if weight is None else weight,
        x if bias is None else bias,
        out,
        count,
        *grid,
        first,
        x.stride(0) if len(x) > 1 else 0,
        *x.stride()[1:],
        *index.stride(),
        out.stride(0),
        C=width,
        KERNEL_H=kernel[0],
        KERNEL_W=kernel[1],
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        BLOCK_J=16,
        BLOCK_C=block_c,
        num_warps=4,
    )


def _merge(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    first: int,
    count: int,
    grid: list[int],
    kernel: list[int],
) -> None:
    """Pool with a weight that mixes channels: [C, C] or [C, C / groups, *kernel]."""
    batch, width = len(out), out.shape[-1]
    if not batch * count * width:
        return
    inner = weight.shape[1]
    # the reduction runs over a cell's channels, which must lie side by side: [cells, C, C / groups]
    weight = weight.flatten(2).permute(2, 0, 1) if weight.ndim == 4 else weight
    is_wide = x.dtype == torch.float32
    block = min(max(triton.next_power_of_2(inner), 16), 64 if is_wide else 128)
    blocks = width // inner * triton.cdiv(inner, block)
    programs = (blocks, triton.cdiv(count, 64 if is_wide else 128), batch)
    check_grid("token_merge", *programs)
    _merge_kernel[programs](
        x,
        index,
        weight.contiguous(),
        x if bias is None else bias,
        out,
        count,
        *grid,
        first,
        *x.stride(),
        *index.stride(),
        out.stride(0),
        C=width,
        GROUPS=width // inner,
        KERNEL_H=kernel[0],
        KERNEL_W=kernel[1],
        IS_POOLED=weight.ndim == 2,
        HAS_BIAS=bias is not None,
        BLOCK_J=64 if is_wide else 128,
        BLOCK_N=block,
        BLOCK_K=32 if is_wide else 64,
        EXACT=is_exact(x.dtype),
        num_warps=8,
        num_stages=3,
    )
