"""Gated residual: x + y * gate, summed in float32. B batch, L tokens, C width, R rows."""

from __future__ import annotations

import torch
from torch import Tensor

from mv2v_engine.ops import native
from mv2v_engine.ops.backend import check_tensors, define, implementation
from mv2v_engine.ops.rows import check_vectors, per_token


def gated_residual_reference(
    x_BLC: Tensor, y_BLC: Tensor, gate: Tensor, row_BL: Tensor | None
) -> Tensor:
    out = torch.addcmul(x_BLC.float(), y_BLC.float(), per_token(gate, row_BL))
    return out.to(x_BLC.dtype)


def _native(
    out_BLC: Tensor, x_BLC: Tensor, y_BLC: Tensor, gate: Tensor, row_BL: Tensor | None
) -> None:
    native.bound("gated_residual", "ppppnnnntp")(
        x_BLC.data_ptr(),
        y_BLC.data_ptr(),
        gate.data_ptr(),
        native.address(row_BL),
        *x_BLC.shape,
        len(gate),
        torch.get_num_threads(),
        out_BLC.data_ptr(),
    )


_gated_residual = define(
    "gated_residual",
    "(Tensor x, Tensor y, Tensor gate, Tensor? row) -> Tensor",
    gated_residual_reference,
    lambda x, y, gate, row: torch.empty_like(x),
    native=_native,
)


def gated_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    *,
    row: Tensor | None = None,
    backend: str = "reference",
) -> Tensor:
    """x, y [B, L, C], gate [B, C] -> [B, L, C]; with row [B, L] (int64) gate [R, C] by token.

    Raises:
        TypeError, ValueError: a dtype, device or shape is not the one above.
        KernelUnavailableError: the backend was asked for by name and cannot run here.
    """
    check_tensors(x, floating={"y": y, "gate": gate}, indices={"row": row})
    check_vectors(x, row, gate=gate)
    if y.shape != x.shape:
        raise ValueError(f"y must have shape {tuple(x.shape)}, got {tuple(y.shape)}")
    run = implementation(backend, "gated_residual", x, gated_residual_reference, _gated_residual)
    result: Tensor = run(x, y, gate, row)
    return result
