"""RMSNorm over the full width and the rotation of interleaved pairs, or the norm alone.

One read and one write of the tokens.

B batch, L tokens, N heads, D head dim, C = N * D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mv2v_kernels.common import ROWS, check_dtypes, check_grid, on_device, row_tile


@triton.jit
def _qk_norm_rope_kernel(
    x_ptr,
    weight_ptr,
    rope_ptr,
    out_ptr,
    L,
    eps,
    stride_xb,
    stride_xl,
    stride_xc,
    stride_weight_c,
    stride_rope_b,
    stride_rope_l,
    stride_rope_d,
    C: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_ROPE: tl.constexpr,
):
    i_b = tl.program_id(1).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C).to(tl.int64)
    m_c = o_c < C
    # channel pairs, and their place in the head's table
    o_p = tl.arange(0, BLOCK_C // 2)
    m_p = o_p < C // 2
    o_angle = (o_p % HALF).to(tl.int64)
    # [BLOCK_C]
    b_weight = tl.load(weight_ptr + o_c * stride_weight_c, mask=m_c, other=0.0).to(tl.float32)
    for i_row in tl.static_range(ROWS):
        i_l = tl.program_id(0).to(tl.int64) * ROWS + i_row
        p_x = x_ptr + i_b * stride_xb + i_l * stride_xl + o_c * stride_xc
        b_x = tl.load(p_x, mask=m_c & (i_l < L), other=0.0).to(tl.float32)
        b_y = b_x * tl.rsqrt(tl.sum(b_x * b_x, 0) / C + eps) * b_weight
        if HAS_ROPE:
            # [BLOCK_C / 2]
            b_even, b_odd = tl.split(tl.reshape(b_y, (BLOCK_C // 2, 2)))
            p_cos = rope_ptr + i_b * stride_rope_b + i_l * stride_rope_l + o_angle * stride_rope_d
            m_rope = m_p & (i_l < L)
            b_cos = tl.load(p_cos, mask=m_rope, other=0.0).to(tl.float32)
            b_sin = tl.load(p_cos + HALF * stride_rope_d, mask=m_rope, other=0.0).to(tl.float32)
            b_turned = tl.join(b_even * b_cos - b_odd * b_sin, b_even * b_sin + b_odd * b_cos)
            b_y = tl.reshape(b_turned, (BLOCK_C,))
        p_out = out_ptr + (i_b * L + i_l) * C + o_c
        tl.store(p_out, b_y.to(out_ptr.dtype.element_ty), mask=m_c & (i_l < L))


def launch_qk_norm_rope(
    x: Tensor, weight: Tensor, rope: Tensor | None, num_heads: int, eps: float
) -> Tensor:
    """x [B, L, C], weight [C], rope [1 or B, L, D] -> [B, L, N, D]."""
    check_dtypes("qk_norm_rope", x=x, weight=weight, rope=rope)
    batch, length, width = x.shape
    head_dim = width // num_heads
    out = torch.empty((batch, length, num_heads, head_dim), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    rope_strides = (0, 0, 0)
    if rope is not None:
        rope_strides = (rope.stride(0) if len(rope) > 1 else 0, rope.stride(1), rope.stride(2))
    block, num_warps = row_tile("qk_norm_rope", width)
    grid = (triton.cdiv(length, ROWS), batch)
    check_grid("qk_norm_rope", *grid)
    with on_device(x):
        _qk_norm_rope_kernel[grid](
            x,
            weight,
            x if rope is None else rope,
            out,
            length,
            eps,
            *x.stride(),
            *weight.stride(),
            *rope_strides,
            C=width,
            HALF=head_dim // 2,
            BLOCK_C=block,
            ROWS=ROWS,
            HAS_ROPE=rope is not None,
            num_warps=num_warps,
        )
    return out
