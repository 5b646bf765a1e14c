"""x + y * gate in one pass: two reads and one write of the tokens.

B batch, L tokens, C width, R rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mv2v_kernels.common import check_dtypes, given, launch_rows


@triton.jit
def _gated_residual_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    row_ptr,
    out_ptr,
    L,
    stride_xb,
    stride_xl,
    stride_xc,
    stride_yb,
    stride_yl,
    stride_yc,
    stride_gate_b,
    stride_gate_c,
    stride_row_b,
    stride_row_l,
    stride_out_b,
    stride_out_l,
    stride_out_c,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_ROW: tl.constexpr,
):
    i_b = tl.program_id(1).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C).to(tl.int64)
    m_c = o_c < C
    # [BLOCK_C]
    if not HAS_ROW:
        p_gate = gate_ptr + i_b * stride_gate_b + o_c * stride_gate_c
        b_gate = tl.load(p_gate, mask=m_c, other=0.0).to(tl.float32)
    for i_row in tl.static_range(ROWS):
        i_l = tl.program_id(0).to(tl.int64) * ROWS + i_row
        m_x = m_c & (i_l < L)
        if HAS_ROW:
            p_row = row_ptr + i_b * stride_row_b + i_l * stride_row_l
            i_r = tl.load(p_row, mask=i_l < L, other=0).to(tl.int64)
            p_gate = gate_ptr + i_r * stride_gate_b + o_c * stride_gate_c
            b_gate = tl.load(p_gate, mask=m_x, other=0.0).to(tl.float32)
        p_x = x_ptr + i_b * stride_xb + i_l * stride_xl + o_c * stride_xc
        p_y = y_ptr + i_b * stride_yb + i_l * stride_yl + o_c * stride_yc
        b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
        b_y = tl.load(p_y, mask=m_x, other=0.0).to(tl.float32)
        p_out = out_ptr + i_b * stride_out_b + i_l * stride_out_l + o_c * stride_out_c
        tl.store(p_out, (b_x + b_y * b_gate).to(out_ptr.dtype.element_ty), mask=m_x)


def launch_gated_residual(x: Tensor, y: Tensor, gate: Tensor, row: Tensor | None) -> Tensor:
    """x, y [B, L, C], gate [B, C] -> [B, L, C], laid out as x. With row [B, L], gate [R, C]."""
    check_dtypes("gated_residual", x=x, y=y, gate=gate)
    out = torch.empty_like(x)
    if out.numel():
        launch_rows(
            "gated_residual",
            _gated_residual_kernel,
            (x, y, gate, given(row, 2, x), out),
            (),
            width=x.shape[2],
            HAS_ROW=row is not None,
        )
    return out
