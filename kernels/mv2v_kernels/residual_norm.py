"""Residual and the next sublayer's LayerNorm: two reads and two writes of the tokens.

B batch, L tokens, C width, R rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mv2v_kernels.common import check_dtypes, given, launch_rows


@triton.jit
def _residual_norm_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    gain_ptr,
    shift_ptr,
    row_ptr,
    sum_ptr,
    out_ptr,
    L,
    eps,
    stride_xb,
    stride_xl,
    stride_xc,
    stride_yb,
    stride_yl,
    stride_yc,
    stride_gate_b,
    stride_gate_c,
    stride_gain_b,
    stride_gain_c,
    stride_shift_b,
    stride_shift_c,
    stride_row_b,
    stride_row_l,
    stride_sum_b,
    stride_sum_l,
    stride_sum_c,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    IS_SCALE: tl.constexpr,
    HAS_ROW: tl.constexpr,
):
    i_b = tl.program_id(1).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C).to(tl.int64)
    m_c = o_c < C
    # [BLOCK_C]; a LayerNorm's vectors serve every token, with rows or without
    if not (HAS_ROW and IS_SCALE):
        p_gain = gain_ptr + i_b * stride_gain_b + o_c * stride_gain_c
        p_shift = shift_ptr + i_b * stride_shift_b + o_c * stride_shift_c
        b_gain = tl.load(p_gain, mask=m_c, other=0.0).to(tl.float32)
        b_shift = tl.load(p_shift, mask=m_c, other=0.0).to(tl.float32)
        if IS_SCALE:
            b_gain += 1
    if HAS_GATE and not HAS_ROW:
        p_gate = gate_ptr + i_b * stride_gate_b + o_c * stride_gate_c
        b_gate = tl.load(p_gate, mask=m_c, other=0.0).to(tl.float32)
    for i_row in tl.static_range(ROWS):
        i_l = tl.program_id(0).to(tl.int64) * ROWS + i_row
        m_x = m_c & (i_l < L)
        if HAS_ROW:
            p_row = row_ptr + i_b * stride_row_b + i_l * stride_row_l
            i_r = tl.load(p_row, mask=i_l < L, other=0).to(tl.int64)
            if IS_SCALE:
                p_gain = gain_ptr + i_r * stride_gain_b + o_c * stride_gain_c
                p_shift = shift_ptr + i_r * stride_shift_b + o_c * stride_shift_c
                b_gain = 1 + tl.load(p_gain, mask=m_x, other=0.0).to(tl.float32)
                b_shift = tl.load(p_shift, mask=m_x, other=0.0).to(tl.float32)
            if HAS_GATE:
                p_gate = gate_ptr + i_r * stride_gate_b + o_c * stride_gate_c
                b_gate = tl.load(p_gate, mask=m_x, other=0.0).to(tl.float32)
        p_x = x_ptr + i_b * stride_xb + i_l * stride_xl + o_c * stride_xc
        p_y = y_ptr + i_b * stride_yb + i_l * stride_yl + o_c * stride_yc
        b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
        b_y = tl.load(p_y, mask=m_x, other=0.0).to(tl.float32)
        if HAS_GATE:
            b_y *= b_gate
        b_sum = (b_x + b_y).to(sum_ptr.dtype.element_ty)
        p_sum = sum_ptr + i_b * stride_sum_b + i_l * stride_sum_l + o_c * stride_sum_c
        tl.store(p_sum, b_sum, mask=m_x)
        b_x = b_sum.to(tl.float32)
        b_x = tl.where(m_c, b_x - tl.sum(b_x, 0) / C, 0.0)
        variance = tl.sum(b_x * b_x, 0) / C
        b_out = b_x * tl.rsqrt(variance + eps) * b_gain + b_shift
        p_out = out_ptr + (i_b * L + i_l) * C + o_c
        tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_x)


def launch_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    shift: Tensor,
    row: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """x, y [B, L, C], gate [B, C], scale and shift [B, C] or weight and shift [C] -> s, h.

    With row [B, L], gate, scale and the shift beside a scale are [R, C].
    """
    check_dtypes("residual_norm", x=x, y=y, gate=gate, scale=scale, weight=weight, shift=shift)
    total, out = torch.empty_like(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # a LayerNorm's vectors serve every sample
    gain = scale if weight is None else weight.expand(len(x), -1)
    shift = shift if weight is None else shift.expand(len(x), -1)
    assert gain is not None
    if out.numel():
        launch_rows(
            "residual_norm",
            _residual_norm_kernel,
            (x, y, given(gate, 2, x), gain, shift, given(row, 2, x), total),
            (out,),
            eps,
            width=x.shape[2],
            HAS_GATE=gate is not None,
            IS_SCALE=scale is not None,
            HAS_ROW=row is not None,
        )
    return total, out
