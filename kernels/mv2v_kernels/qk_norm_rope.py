"""RMSNorm over the full width and the rotation of interleaved pairs, or one of them alone.

One read and one write of the tokens.

B batch, L tokens, N heads, D head dim, C = N * D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mv2v_kernels.common import check_dtypes, given, launch_rows


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
    stride_xn,
    stride_xc,
    stride_weight_c,
    stride_rope_b,
    stride_rope_l,
    stride_rope_d,
    C: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_ROPE: tl.constexpr,
):
    i_b = tl.program_id(1).to(tl.int64)
    # a token's channels of all heads, one head after the other
    o_c = tl.arange(0, BLOCK_C).to(tl.int64)
    m_c = o_c < C
    if HAS_NORM:
        o_x = o_c * stride_xc
    else:
        o_x = o_c // (2 * HALF) * stride_xn + o_c % (2 * HALF) * stride_xc
    # channel pairs, and their place in the head's table
    o_p = tl.arange(0, BLOCK_C // 2)
    m_p = o_p < C // 2
    o_angle = (o_p % HALF).to(tl.int64)
    # [BLOCK_C]
    if HAS_NORM:
        b_weight = tl.load(weight_ptr + o_c * stride_weight_c, mask=m_c, other=0.0).to(tl.float32)
    for i_row in tl.static_range(ROWS):
        i_l = tl.program_id(0).to(tl.int64) * ROWS + i_row
        b_y = tl.load(
            x_ptr + i_b * stride_xb + i_l * stride_xl + o_x, mask=m_c & (i_l < L), other=0.0
        ).to(tl.float32)
        if HAS_NORM:
            b_y = b_y * tl.rsqrt(tl.sum(b_y * b_y, 0) / C + eps) * b_weight
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
    return launch("qk_norm_rope", x.unflatten(-1, (num_heads, -1)), weight, rope, eps)


def launch(
    op: str, x: Tensor, weight: Tensor | None, rope: Tensor | None, eps: float = 0.0
) -> Tensor:
    """The norm if there is a weight [C], the rotation if there is a table: [B, L, N, D].

    x: [B, L, N, D]; with a norm, the heads of a token lie one behind the other.
    """
    num_heads, head_dim = x.shape[2:]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        table = given(None if rope is None else rope.expand(len(x), -1, -1), 3, x)
        launch_rows(
            op,
            _qk_norm_rope_kernel,
            (x, given(weight, 1, x), table),
            (out,),
            eps,
            width=num_heads * head_dim,
            HALF=head_dim // 2,
            HAS_NORM=weight is not None,
            HAS_ROPE=rope is not None,
        )
    return out
