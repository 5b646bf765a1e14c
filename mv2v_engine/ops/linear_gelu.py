"""Linear, then the tanh GELU, in the product's epilogue where the library has one.

On CUDA torch hands both to cuBLASLt, whose GELU is the tanh approximation, on a CPU to oneDNN in
float32, and in bfloat16 where the CPU multiplies it; neither has a gradient. An epilogue sees
float32 sums: the reference rounds once more, before the GELU.

... any leading dims, C width, H hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mv2v_engine.ops.backend import check_tensors, define, has_bfloat16_products

_HAS_ONEDNN = torch.backends.mkldnn.is_available()
_HAS_BFLOAT16 = has_bfloat16_products()


def linear_gelu_reference(x: Tensor, weight_HC: Tensor, bias_H: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight_HC, bias_H), approximate="tanh")


def _on_cuda(x: Tensor, weight_HC: Tensor, bias_H: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = torch.ops.aten._addmm_activation(bias_H, rows, weight_HC.t(), use_gelu=True)
    return out.unflatten(0, x.shape[:-1])  # type: ignore[no-any-return]


def _on_cpu(x: Tensor, weight_HC: Tensor, bias_H: Tensor) -> Tensor:
    if not (_is_onednns(x) and x.dtype == weight_HC.dtype == bias_H.dtype):
        return linear_gelu_reference(x, weight_HC, bias_H)
    out = torch.ops.mkldnn._linear_pointwise(x, weight_HC, bias_H, "gelu", [], "tanh")
    return out  # type: ignore[no-any-return]


def _is_onednns(x: Tensor) -> bool:
    is_narrow = x.dtype == torch.bfloat16 and _HAS_BFLOAT16
    return _HAS_ONEDNN and x.device.type == "cpu" and (x.dtype == torch.float32 or is_narrow)


_linear_gelu = define(
    "linear_gelu",
    "(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    _on_cpu,
    lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
    _on_cuda,
)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str = "reference") -> Tensor:
    """x [..., C], weight [H, C], bias [H] -> [..., H].

    All backends but reference and native are one; on a CPU, where nothing is trained and oneDNN has
    the dtype, these are that one too.

    Raises:
        TypeError, ValueError: a dtype, device or shape is not the one above.
    """
    check_tensors(x, floating={"weight": weight, "bias": bias})
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:] or bias.shape != weight.shape[:1]:
        raise ValueError(
            "x must have shape [..., C], weight [H, C] and bias [H], "
            f"got {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    is_trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    is_fused = (_is_onednns(x) and not is_trained) or backend not in ("reference", "native")
    run = _linear_gelu if is_fused else linear_gelu_reference
    result: Tensor = run(x, weight, bias)
    return result
