"""Residual, then the norm of the next sublayer: s = x + y * gate, h = LN(s) * gain + shift.

The gain is a LayerNorm's weight, or 1 + scale of adaLN. Sums and statistics in float32; s is
rounded before its statistics are taken, as it is where it is written and read again.

B batch, L tokens, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mv2v_engine.ops.adaln import adaln_reference
from mv2v_engine.ops.backend import check_tensors, define, implementation
from mv2v_engine.ops.gated_residual import gated_residual_reference


def residual_norm_reference(
    x_BLC: Tensor,
    y_BLC: Tensor,
    gate_BC: Tensor | None,
    scale_BC: Tensor | None,
    weight_C: Tensor | None,
    shift: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    if gate_BC is None:
        s_BLC = (x_BLC.float() + y_BLC.float()).to(x_BLC.dtype)
    else:
        s_BLC = gated_residual_reference(x_BLC, y_BLC, gate_BC)
    if scale_BC is not None:
        return s_BLC, adaln_reference(s_BLC, scale_BC, shift, None, None, eps)
    assert weight_C is not None
    width, weight_C = weight_C.shape, weight_C.float()
    h_BLC = torch.nn.functional.layer_norm(s_BLC.float(), width, weight_C, shift.float(), eps)
    return s_BLC, h_BLC.to(x_BLC.dtype)


_residual_norm = define(
    "residual_norm",
    "(Tensor x, Tensor y, Tensor? gate, Tensor? scale, Tensor? weight, Tensor shift, float eps) "
    "-> (Tensor, Tensor)",
    residual_norm_reference,
    lambda x, y, gate, scale, weight, shift, eps: (torch.empty_like(x), x.new_empty(x.shape)),
)


def residual_norm(
    x: Tensor,
    y: Tensor,
    *,
    shift: Tensor,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "reference",
) -> tuple[Tensor, Tensor]:
    """x, y [B, L, C] -> s and h, both [B, L, C]; gate [B, C], none is one.

    Either scale and shift [B, C] (adaLN), or weight and shift [C] (LayerNorm).

    Raises:
        TypeError, ValueError: a dtype, device or shape is not the one above.
        KernelUnavailableError: the backend was asked for by name and cannot run here.
    """
    vectors = {"gate": gate, "scale": scale, "weight": weight, "shift": shift}
    check_tensors(x, floating={"y": y, **vectors})
    if x.ndim != 3 or y.shape != x.shape:
        raise ValueError(
            f"x and y must have one shape [B, L, C], got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if (scale is None) == (weight is None):
        raise ValueError("pass either scale, for adaLN, or weight, for a LayerNorm")
    of_sample, of_all = (x.shape[0], x.shape[2]), (x.shape[2],)
    expected = {"gate": of_sample, "scale": of_sample, "weight": of_all}
    expected["shift"] = of_all if scale is None else of_sample
    for name, vector in vectors.items():
        if vector is not None and vector.shape != expected[name]:
            raise ValueError(f"{name} must have shape {expected[name]}, got {tuple(vector.shape)}")
    run = implementation(backend, "residual_norm", x, residual_norm_reference, _residual_norm)
    result: tuple[Tensor, Tensor] = run(x, y, gate, scale, weight, shift, eps)
    return result
