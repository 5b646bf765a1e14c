"""What a block fuses around its products, as benchmark cases; see `op_cases`."""

from __future__ import annotations

import torch
from op_cases import EPS, Make, OpCase, backends_of, random_tensors, sample
from torch import Tensor
from torch.nn import functional as F

from mv2v_engine.ops.linear_gelu import linear_gelu, linear_gelu_reference
from mv2v_engine.ops.residual_norm import residual_norm, residual_norm_reference
from mv2v_engine.tokens.plan import TokenPlan


def plain_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor | None, shift: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The sum and its norm: adaLN with scale and shift [1, C], else LayerNorm's with [C]."""
    total = x + y if gate is None else torch.addcmul(x, y, gate.to(x.dtype)[:, None])
    if scale is None:
        weight, shift = weight.to(x.dtype), shift.to(x.dtype)
        return total, F.layer_norm(total, weight.shape, weight, shift, EPS)
    normed = F.layer_norm(total, weight.shape, eps=EPS)
    gain, shift = 1 + scale.to(x.dtype)[:, None], shift.to(x.dtype)[:, None]
    return total, torch.addcmul(shift, normed, gain)


def residual_norm_cases(plan: TokenPlan, device: torch.device) -> list[OpCase]:
    """After self-attention, with a gate and a LayerNorm; after cross-attention, with adaLN."""
    length, width, new = plan.length, plan.shape.dim, random_tensors(device)
    x, y, rows = new(1, length, width), new(1, length, width), sample(length, device)
    gate, scale, shift = new(3, 1, width, dtype=torch.float32).unbind()
    weight = 1 + 0.1 * new(width, dtype=torch.float32)

    def case(workload: str, gate: Tensor | None, scale: Tensor | None, shift: Tensor) -> OpCase:
        norm_weight = weight if scale is None else None

        def expected(dtype: torch.dtype) -> Tensor:
            some_x, some_y = (t[:, rows].to(dtype) for t in (x, y))
            parts = plain_residual_norm(some_x, some_y, gate, scale, shift, weight)
            return torch.cat(parts, -1)

        return OpCase(
            op="residual_norm",
            workload=f"{length:,} tokens, {workload}",
            tokens=length,
            width=width,
            phases=((4 * x.nbytes, 0),),
            backends=backends_of("residual_norm", device),
            run=lambda backend: residual_norm(
                x,
                y,
                gate=gate,
                scale=scale,
                weight=norm_weight,
                shift=shift,
                eps=EPS,
                backend=backend,
            ),
            expected=expected,
            pick=lambda result: torch.cat([part[:, rows] for part in result], -1),
            functional=lambda: plain_residual_norm(x, y, gate, scale, shift, weight),
            compilable=lambda: residual_norm_reference(
                x, y, gate, scale, norm_weight, shift, None, EPS
            ),
        )

    return [
        case("gate and LayerNorm", gate, None, shift[0]),
        case("adaLN", None, scale, shift),
    ]


def linear_gelu_cases(plan: TokenPlan, device: torch.device) -> list[OpCase]:
    """The feed-forward's first product; every backend but the reference is cuBLASLt's epilogue."""
    length, width, hidden = plan.length, plan.shape.dim, plan.shape.ffn_dim
    new, rows = random_tensors(device), sample(length, device)
    x, weight, bias = new(1, length, width), new(hidden, width) / width**0.5, new(hidden)

    def expected(dtype: torch.dtype) -> Tensor:
        return linear_gelu_reference(x[:, rows].to(dtype), weight.to(dtype), bias.to(dtype))

    moved = x.nbytes + weight.nbytes + x.element_size() * length * hidden
    case = OpCase(
        op="linear_gelu",
        workload=f"{length:,} tokens to {hidden:,} channels",
        tokens=length,
        width=width,
        phases=((moved, 2 * length * width * hidden),),
        backends={"reference": None, "auto": None},
        run=lambda backend: linear_gelu(x, weight, bias, backend=backend),
        expected=expected,
        pick=lambda out: out[:, rows],
    )
    return [case]


FUSED: dict[str, Make] = {"residual_norm": residual_norm_cases, "linear_gelu": linear_gelu_cases}
