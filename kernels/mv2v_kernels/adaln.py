"""LayerNorm, scale and shift, camera add: one read and one write of the tokens.

B batch, L tokens, C width, F frames, R rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mv2v_kernels.common import check_dtypes, given, launch_rows


@triton.jit
def _adaln_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    camera_ptr,
    frame_ptr,
    row_ptr,
    out_ptr,
    L,
    eps,
    stride_xb,
    stride_xl,
    stride_xc,
    stride_scale_b,
    stride_scale_c,
    stride_shift_b,
    stride_shift_c,
    stride_camera_b,
    stride_camera_f,
    stride_camera_c,
    stride_frame_b,
    stride_frame_l,
    stride_row_b,
    stride_row_l,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_CAMERA: tl.constexpr,
    HAS_ROW: tl.constexpr,
):
    i_b = tl.program_id(1).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C).to(tl.int64)
    m_c = o_c < C
    # [BLOCK_C]
    if not HAS_ROW:
        p_scale = scale_ptr + i_b * stride_scale_b + o_c * stride_scale_c
        p_shift = shift_ptr + i_b * stride_shift_b + o_c * stride_shift_c
        b_gain = 1 + tl.load(p_scale, mask=m_c, other=0.0).to(tl.float32)
        b_shift = tl.load(p_shift, mask=m_c, other=0.0).to(tl.float32)
    for i_row in tl.static_range(ROWS):
        i_l = tl.program_id(0).to(tl.int64) * ROWS + i_row
        m_x = m_c & (i_l < L)
        if HAS_ROW:
            p_row = row_ptr + i_b * stride_row_b + i_l * stride_row_l
            i_r = tl.load(p_row, mask=i_l < L, other=0).to(tl.int64)
            p_scale = scale_ptr + i_r * stride_scale_b + o_c * stride_scale_c
            p_shift = shift_ptr + i_r * stride_shift_b + o_c * stride_shift_c
            b_gain = 1 + tl.load(p_scale, mask=m_x, other=0.0).to(tl.float32)
            b_shift = tl.load(p_shift, mask=m_x, other=0.0).to(tl.float32)
        p_x = x_ptr + i_b * stride_xb + i_l * stride_xl + o_c * stride_xc
        b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
        mean = tl.sum(b_x, 0) / C
        b_x = tl.where(m_c, b_x - mean, 0.0)
        variance = tl.sum(b_x * b_x, 0) / C
        b_y = b_x * tl.rsqrt(variance + eps) * b_gain + b_shift
        if HAS_CAMERA:
            p_frame = frame_ptr + i_b * stride_frame_b + i_l * stride_frame_l
            i_f = tl.load(p_frame, mask=i_l < L, other=0).to(tl.int64)
            p_camera = camera_ptr + i_b * stride_camera_b + i_f * stride_camera_f
            b_y += tl.load(p_camera + o_c * stride_camera_c, mask=m_x, other=0.0).to(tl.float32)
        p_out = out_ptr + (i_b * L + i_l) * C + o_c
        tl.store(p_out, b_y.to(out_ptr.dtype.element_ty), mask=m_x)


def launch_adaln(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    camera: Tensor | None,
    frame: Tensor | None,
    row: Tensor | None,
    eps: float,
) -> Tensor:
    """x [B, L, C], scale and shift [B, C], camera [B, F, C] by frame [B, L] -> [B, L, C].

    With row [B, L], scale and shift [R, C].
    """
    check_dtypes("adaln", x=x, scale=scale, shift=shift, camera=camera)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        by_index = given(camera, 3, x), given(frame, 2, x), given(row, 2, x)
        launch_rows(
            "adaln",
            _adaln_kernel,
            (x, scale, shift, *by_index),
            (out,),
            eps,
            width=x.shape[2],
            HAS_CAMERA=camera is not None,
            HAS_ROW=row is not None,
        )
    return out
