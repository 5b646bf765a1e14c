"""Residual, then the norm of the next sublayer: s = x + y * gate, h = LN(s) * gain + shift.

The gain is a LayerNorm's weight, or 1 + scale of adaLN. Sums and statistics in float32; s is
rounded before its statistics are taken, as it is where it is written and read again.

B batch, L tokens, C width, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mv2v_engine.ops import native
from mv2v_engine.ops.adaln import adaln_reference
from mv2v_engine.ops.backend import check_tensors, define, implementation
from mv2v_engine.ops.gated_residual import gated_residual_reference
from mv2v_engine.ops.rows import check_vectors


def residual_norm_reference(
    x_BLC: Tensor,
    y_BLC: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    weight_C: Tensor | None,
    shift: Tensor,
    row_BL: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    if gate is None:
        s_BLC = (x_BLC.float() + y_BLC.float()).to(x_BLC.dtype)
    else:
        s_BLC = gated_residual_reference(x_BLC, y_BLC, gate, row_BL)
    if scale is not None:
        return s_BLC, adaln_reference(s_BLC, scale, shift, None, None, row_BL, eps)
    assert weight_C is not None
    width, weight_C = weight_C.shape, weight_C.float()
    h_BLC = torch.nn.functional.layer_norm(s_BLC.float(), width, weight_C, shift.float(), eps)
    return s_BLC, h_BLC.to(x_BLC.dtype)


def _native(
    s_BLC: Tensor,
    h_BLC: Tensor,
    x_BLC: Tensor,
    y_BLC: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    weight_C: Tensor | None,
    shift: Tensor,
    row_BL: Tensor | None,
    eps: float,
) -> None:
    batch, length, width = x_BLC.shape
    vectors = gate if scale is None else scale
    native.bound("residual_norm", "pppppppnnnndtpp")(
        x_BLC.data_ptr(),
        y_BLC.data_ptr(),
        native.address(gate),
        native.address(scale),
        native.address(weight_C),
        shift.data_ptr(),
        # without a gate or a scale no vector is a row's
        None if vectors is None else native.address(row_BL),
        batch,
        length,
        width,
        batch if vectors is None else len(vectors),
        eps,
        torch.get_num_threads(),
        s_BLC.data_ptr(),
        h_BLC.data_ptr(),
    )


_residual_norm = define(
    "residual_norm",
    "(Tensor x, Tensor y, Tensor? gate, Tensor? scale, Tensor? weight, Tensor shift, Tensor? row, "
    "float eps) -> (Tensor, Tensor)",
    residual_norm_reference,
    lambda x, y, gate, scale, weight, shift, row, eps: (
        torch.empty_like(x),
        torch.empty_like(x, memory_format=torch.contiguous_format),
    ),
    native=_native,
)


def residual_norm(
    x: Tensor,
    y: Tensor,
    *,
    shift: Tensor,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    row: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "reference",
) -> tuple[Tensor, Tensor]:
    """x, y [B, L, C] -> s and h, both [B, L, C]; gate [B, C], none is one.

    Either scale and shift [B, C] (adaLN), or weight and shift [C] (LayerNorm). With row [B, L]
    (int64) gate, scale and adaLN's shift are rows [R, C], and every token names its own.

    Raises:
        TypeError, ValueError: a dtype, device or shape is not the one above.
        KernelUnavailableError: the backend was asked for by name and cannot run here.
    """
    vectors = {"gate": gate, "scale": scale, "weight": weight, "shift": shift}
    check_tensors(x, floating={"y": y, **vectors}, indices={"row": row})
    if x.ndim != 3 or y.shape != x.shape:
        raise ValueError(
            f"x and y must have one shape [B, L, C], got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if (scale is None) == (weight is None):
        raise ValueError("pass either scale, for adaLN, or weight, for a LayerNorm")
    of_all = {"weight": weight, "shift": shift} if scale is None else {}
    check_vectors(x, row, **{name: v for name, v in vectors.items() if name not in of_all})
    for name, vector in of_all.items():
        if vector is not None and vector.shape != x.shape[2:]:
            raise ValueError(f"{name} must have shape ({x.shape[2]},), got {tuple(vector.shape)}")
    run = implementation(backend, "residual_norm", x, residual_norm_reference, _residual_norm)
    result: tuple[Tensor, Tensor] = run(x, y, gate, scale, weight, shift, row, eps)
    return result
