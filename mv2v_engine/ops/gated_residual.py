"""Gated residual: x + y * gate, summed in float32. B batch, L tokens, C width."""

from __future__ import annotations

import torch
from torch import Tensor

from mv2v_engine.ops.backend import check_tensors, define, implementation


def gated_residual_reference(x_BLC: Tensor, y_BLC: Tensor, gate_BC: Tensor) -> Tensor:
    return (x_BLC.float() + y_BLC.float() * gate_BC.float()[:, None]).to(x_BLC.dtype)


_gated_residual = define(
    "gated_residual",
    "(Tensor x, Tensor y, Tensor gate) -> Tensor",
    gated_residual_reference,
    lambda x, y, gate: torch.empty_like(x),
)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, *, backend: str = "reference") -> Tensor:
    """x, y [B, L, C], gate [B, C] -> [B, L, C].

    Raises:
        TypeError, ValueError: a dtype, device or shape is not the one above.
        KernelUnavailableError: the backend was asked for by name and cannot run here.
    """
    check_tensors(x, floating={"y": y, "gate": gate})
    if x.ndim != 3:
        raise ValueError(f"x must have shape [B, L, C], got {tuple(x.shape)}")
    if y.shape != x.shape or gate.shape != (x.shape[0], x.shape[2]):
        raise ValueError(
            f"y must have shape {tuple(x.shape)} and gate {(x.shape[0], x.shape[2])}, "
            f"got {tuple(y.shape)} and {tuple(gate.shape)}"
        )
    run = implementation(backend, "gated_residual", x, gated_residual_reference, _gated_residual)
    result: Tensor = run(x, y, gate)
    return result
