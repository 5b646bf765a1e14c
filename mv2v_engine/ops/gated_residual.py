"""Gated residual: x + y * gate, summed in float32. B batch, L tokens, C width."""

from __future__ import annotations

import torch
from torch import Tensor

from mv2v_engine.ops.backend import define


def gated_residual_reference(x_BLC: Tensor, y_BLC: Tensor, gate_BC: Tensor) -> Tensor:
    return (x_BLC.float() + y_BLC.float() * gate_BC.float()[:, None]).to(x_BLC.dtype)


_gated_residual = define(
    "gated_residual",
    "(Tensor x, Tensor y, Tensor gate) -> Tensor",
    gated_residual_reference,
    lambda x, y, gate: torch.empty_like(x),
)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, *, backend: str = "reference") -> Tensor:
    """x, y [B, L, C], gate [B, C] -> [B, L, C]."""
    if y.shape != x.shape or gate.shape != (x.shape[0], x.shape[2]):
        raise ValueError(
            f"y must have shape {tuple(x.shape)} and gate {(x.shape[0], x.shape[2])}, "
            f"got {tuple(y.shape)} and {tuple(gate.shape)}"
        )
    run = gated_residual_reference if backend == "reference" else _gated_residual
    result: Tensor = run(x, y, gate)
    return result
