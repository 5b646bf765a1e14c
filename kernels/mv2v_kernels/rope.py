"""The rotation of interleaved pairs in each head: one read and one write of the tokens.

B batch, L tokens, N heads, D head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mv2v_kernels.common import ROWS, check_dtypes, check_grid, on_device, row_tile


@triton.jit
def _rope_kernel(
    x_ptr,
    rope_ptr,
    out_ptr,
    L,
    stride_xb,
    stride_xl,
    stride_xn,
    stride_xd,
    stride_rope_b,
    stride_rope_l,
    stride_rope_d,
    C: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    i_b = tl.program_id(1).to(tl.int64)
    # a token's channels of all heads, one head after the other
    o_c = tl.arange(0, BLOCK_C).to(tl.int64)
    m_c = o_c < C
    o_x = o_c // (2 * HALF) * stride_xn + o_c % (2 * HALF) * stride_xd
    # channel pairs, and their place in the head's table
    o_p = tl.arange(0, BLOCK_C // 2)
    m_p = o_p < C // 2
    o_angle = (o_p % HALF).to(tl.int64)
    for i_row in tl.static_range(ROWS):
        i_l = tl.program_id(0).to(tl.int64) * ROWS + i_row
        p_x = x_ptr + i_b * stride_xb + i_l * stride_xl + o_x
        b_x = tl.load(p_x, mask=m_c & (i_l < L), other=0.0).to(tl.float32)
        # [BLOCK_C / 2]
        b_even, b_odd = tl.split(tl.reshape(b_x, (BLOCK_C // 2, 2)))
        p_cos = rope_ptr + i_b * stride_rope_b + i_l * stride_rope_l + o_angle * stride_rope_d
        m_rope = m_p & (i_l < L)
        b_cos = tl.load(p_cos, mask=m_rope, other=0.0).to(tl.float32)
        b_sin = tl.load(p_cos + HALF * stride_rope_d, mask=m_rope, other=0.0).to(tl.float32)
        b_turned = tl.join(b_even * b_cos - b_odd * b_sin, b_even * b_sin + b_odd * b_cos)
        p_out = out_ptr + (i_b * L + i_l) * C + o_c
        b_y = tl.reshape(b_turned, (BLOCK_C,))
        tl.store(p_out, b_y.to(out_ptr.dtype.element_ty), mask=m_c & (i_l < L))


def launch_rope(x: Tensor, rope: Tensor) -> Tensor:
    """x [B, L, N, D], rope [1 or B, L, D] -> [B, L, N, D]."""
    check_dtypes("rope", x=x, rope=rope)
    batch, length, heads, head_dim = x.shape
    width = heads * head_dim
    out = torch.empty((batch, length, heads, head_dim), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    block, num_warps = row_tile("rope", width)
    grid = (triton.cdiv(length, ROWS), batch)
    check_grid("rope", *grid)
    with on_device(x):
        _rope_kernel[grid](
            x,
            rope,
            out,
            length,
            *x.stride(),
            rope.stride(0) if len(rope) > 1 else 0,
            rope.stride(1),
            rope.stride(2),
            C=width,
            HALF=head_dim // 2,
            BLOCK_C=block,
            ROWS=ROWS,
            num_warps=num_warps,
        )
    return out
