"""Linear, then the tanh GELU, in the product's epilogue where the library has one.

On CUDA torch hands both to cuBLASLt, whose GELU is the tanh approximation; torch's own operator is
the exact GELU on a CPU, so it serves on CUDA alone. The epilogue sees float32 sums: the reference
rounds once more, before the GELU.

... any leading dims, C width, H hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mv2v_engine.ops.backend import check_tensors, define


def linear_gelu_reference(x: Tensor, weight_HC: Tensor, bias_H: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight_HC, bias_H), approximate="tanh")


def _on_cuda(x: Tensor, weight_HC: Tensor, bias_H: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = torch.ops.aten._addmm_activation(bias_H, rows, weight_HC.t(), use_gelu=True)
    return out.unflatten(0, x.shape[:-1])  # type: ignore[no-any-return]


_linear_gelu = define(
    "linear_gelu",
    "(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    linear_gelu_reference,
    lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
    _on_cuda,
)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str = "reference") -> Tensor:
    """x [..., C], weight [H, C], bias [H] -> [..., H]. All backends but the reference are one.

    Raises:
        TypeError, ValueError: a dtype, device or shape is not the one above.
    """
    check_tensors(x, floating={"weight": weight, "bias": bias})
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:] or bias.shape != weight.shape[:1]:
        raise ValueError(
            "x must have shape [..., C], weight [H, C] and bias [H], "
            f"got {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    run = linear_gelu_reference if backend == "reference" else _linear_gelu
    result: Tensor = run(x, weight, bias)
    return result
