"""PRoPE: groups of four channels times the matrix of their token's camera.

One read and one write of the tokens.

B batch, L tokens, N heads, D head dim, C = N * D, F frames.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mv2v_kernels.common import check_dtypes, launch_rows


@triton.jit
def _prope_kernel(
    x_ptr,
    matrix_ptr,
    frame_ptr,
    out_ptr,
    L,
    stride_xb,
    stride_xl,
    stride_xn,
    stride_xd,
    stride_matrix_b,
    stride_matrix_f,
    stride_matrix_i,
    stride_matrix_j,
    stride_frame_b,
    stride_frame_l,
    C: tl.constexpr,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    i_b = tl.program_id(1).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_x = (o_c // D).to(tl.int64) * stride_xn + (o_c % D).to(tl.int64) * stride_xd
    for i_row in tl.static_range(ROWS):
        i_l = tl.program_id(0).to(tl.int64) * ROWS + i_row
        is_row = i_l < L
        p_x = x_ptr + i_b * stride_xb + i_l * stride_xl + o_x
        b_x = tl.load(p_x, mask=m_c & is_row, other=0.0).to(tl.float32)
        p_frame = frame_ptr + i_b * stride_frame_b + i_l * stride_frame_l
        i_f = tl.load(p_frame, mask=is_row, other=0).to(tl.int64)
        p_m = matrix_ptr + i_b * stride_matrix_b + i_f * stride_matrix_f
        # [BLOCK_C / 4], channels 0 to 3 of every group
        b_02, b_13 = tl.split(tl.reshape(b_x, (BLOCK_C // 4, 2, 2)))
        b_0, b_2 = tl.split(b_02)
        b_1, b_3 = tl.split(b_13)
        b_y0 = _row(p_m, b_0, b_1, b_2, b_3, stride_matrix_j)
        b_y1 = _row(p_m + stride_matrix_i, b_0, b_1, b_2, b_3, stride_matrix_j)
        b_y2 = _row(p_m + 2 * stride_matrix_i, b_0, b_1, b_2, b_3, stride_matrix_j)
        b_y3 = _row(p_m + 3 * stride_matrix_i, b_0, b_1, b_2, b_3, stride_matrix_j)
        b_y = tl.reshape(tl.join(tl.join(b_y0, b_y2), tl.join(b_y1, b_y3)), (BLOCK_C,))
        if CHANNELS < D:
            b_y = tl.where(o_c % D < CHANNELS, b_y, b_x)
        p_out = out_ptr + (i_b * L + i_l) * C + o_c
        tl.store(p_out, b_y.to(out_ptr.dtype.element_ty), mask=m_c & is_row)


@triton.jit
def _row(p_m, b_0, b_1, b_2, b_3, stride_j):
    """One row of the matrix times all groups."""
    s_0 = tl.load(p_m).to(tl.float32)
    s_1 = tl.load(p_m + stride_j).to(tl.float32)
    s_2 = tl.load(p_m + 2 * stride_j).to(tl.float32)
    s_3 = tl.load(p_m + 3 * stride_j).to(tl.float32)
    return s_0 * b_0 + s_1 * b_1 + s_2 * b_2 + s_3 * b_3


def launch_prope(x: Tensor, matrix: Tensor, frame: Tensor, channels: int) -> Tensor:
    """x [B, L, N, D], matrix [B, F, 4, 4], frame [B, L] -> [B, L, N, D]."""
    check_dtypes("prope", x=x, matrix=matrix)
    num_heads, head_dim = x.shape[2:]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        launch_rows(
            "prope",
            _prope_kernel,
            (x, matrix, frame),
            (out,),
            width=num_heads * head_dim,
            D=head_dim,
            CHANNELS=channels,
        )
    return out
