"""Adaptive LayerNorm with the camera: y = LN(x) * (1 + scale) + shift + camera[frame].

Statistics and sums in float32, one rounding at the end.

B batch, L tokens, C width, F frames, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mv2v_engine.ops import native
from mv2v_engine.ops.backend import check_tensors, define, implementation
from mv2v_engine.ops.rows import check_vectors, per_token


def adaln_reference(
    x_BLC: Tensor,
    scale: Tensor,
    shift: Tensor,
    camera_BFC: Tensor | None,
    frame_BL: Tensor | None,
    row_BL: Tensor | None,
    eps: float,
) -> Tensor:
    x, width = x_BLC.float(), x_BLC.shape[-1:]
    if row_BL is None and len(scale) == 1:
        # the norm's own affine part: one pass where the sum below takes two
        y_BLC = F.layer_norm(x, width, 1 + scale[0].float(), shift[0].float(), eps)
    else:
        gain, added = 1 + per_token(scale, row_BL), per_token(shift, row_BL)
        y_BLC = torch.addcmul(added, F.layer_norm(x, width, eps=eps), gain)
    if camera_BFC is not None and frame_BL is not None:
        if len(camera_BFC) > 1:
            first = torch.arange(len(camera_BFC), device=x_BLC.device) * camera_BFC.shape[1]
            frame_BL = frame_BL + first[:, None]
        # whole rows: a lookup is several times faster than indexing on a CPU
        y_BLC += F.embedding(frame_BL, camera_BFC.flatten(0, 1)).float()
    return y_BLC.to(x_BLC.dtype)


def _native(
    out_BLC: Tensor,
    x_BLC: Tensor,
    scale: Tensor,
    shift: Tensor,
    camera_BFC: Tensor | None,
    frame_BL: Tensor | None,
    row_BL: Tensor | None,
    eps: float,
) -> None:
    batch, length, width = x_BLC.shape
    native.bound("adaln", "ppppppnnnnndtp")(
        x_BLC.data_ptr(),
        scale.data_ptr(),
        shift.data_ptr(),
        native.address(camera_BFC),
        native.address(frame_BL),
        native.address(row_BL),
        batch,
        length,
        width,
        0 if camera_BFC is None else camera_BFC.shape[1],
        len(scale),
        eps,
        torch.get_num_threads(),
        out_BLC.data_ptr(),
    )


_adaln = define(
    "adaln",
    "(Tensor x, Tensor scale, Tensor shift, Tensor? camera, Tensor? frame, Tensor? row, float eps) "
    "-> Tensor",
    adaln_reference,
    # layer_norm lays its result out afresh, whatever the strides of x
    lambda x, scale, shift, camera, frame, row, eps: torch.empty_like(
        x, memory_format=torch.contiguous_format
    ),
    native=_native,
)


def adaln(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    camera: Tensor | None = None,
    frame: Tensor | None = None,
    row: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "reference",
) -> Tensor:
    """x [B, L, C] modulated by scale, shift [B, C]; camera [B, F, C] added by frame [B, L] (int64).

    The camera embedding joins the modulated state before q, k, v (METHOD 5). With row [B, L]
    (int64) scale and shift are rows [R, C], and every token names its own; kernels trust it, as
    they trust frame.

    Raises:
        TypeError, ValueError: a dtype, device or shape is not the one above.
        KernelUnavailableError: the backend was asked for by name and cannot run here.
    """
    check_tensors(
        x,
        floating={"scale": scale, "shift": shift, "camera": camera},
        indices={"frame": frame, "row": row},
    )
    check_vectors(x, row, scale=scale, shift=shift)
    if (camera is None) != (frame is None):
        raise ValueError("camera and frame belong together: pass both or neither")
    if camera is not None and frame is not None:
        expected = (x.shape[0], camera.shape[1], x.shape[2])
        if camera.shape != expected or frame.shape != x.shape[:2]:
            raise ValueError(
                f"camera must have shape {expected} and frame {tuple(x.shape[:2])}, "
                f"got {tuple(camera.shape)} and {tuple(frame.shape)}"
            )
    run = implementation(backend, "adaln", x, adaln_reference, _adaln)
    result: Tensor = run(x, scale, shift, camera, frame, row, eps)
    return result
