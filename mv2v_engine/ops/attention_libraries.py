"""The attention libraries: what each one needs, and how it is called.

A library is imported when it is first asked for, never before.

B batch, L query and S key tokens, N heads, D head dim; packed: T queries and S keys of G sequences.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
    is_flash_attention_available,
)
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mv2v_engine.ops.attention_rounded import SHARE, rounded_attention
from mv2v_engine.ops.backend import missing_reason, triton_launcher

_HALF = (torch.bfloat16, torch.float16)
_FLOATS = (*_HALF, torch.float32)


class Pack(NamedTuple):
    """Where packed sequences begin, int32 [G + 1] on the device, and bounds of their lengths."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


@dataclass(frozen=True, kw_only=True)
class Library:
    """One way to attend. run: of q, k and v, and of a `Pack` if packed.

    function: what must be importable, None inside torch. lacks: why it cannot take q, k and v.
    is_portable: it runs on every device.
    """

    run: Callable[..., Any]
    lacks: Callable[[Tensor, Tensor, Tensor], str | None]
    function: str | None = None
    is_portable: bool = False


def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device; None for any other."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@cache
def import_lacks(function: str) -> str | None:
    """Why `module.name` cannot be imported; None if it can."""
    module, _, name = function.rpartition(".")
    package = module.partition(".")[0]
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            return f"the package {error.name} is not installed"
        return f"{package} needs {error.name}, which is not installed"
    except (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        # what a library says that was built for another torch, Python or CUDA
        first_line = (str(error).splitlines() or [""])[0]
        return f"{package} cannot be imported: {type(error).__name__}: {first_line}"
    return None if hasattr(found, name) else f"the {module} that is installed has no {name}"


def _limits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    majors: tuple[int, int] = (8, 12),
    dtypes: tuple[torch.dtype, ...] = _HALF,
    head_dim: int = 256,
) -> str | None:
    """What the flash libraries have in common; they do not check all of it themselves."""
    low, high = majors
    major, minor = capability(q.device) or (0, 0)
    if not low <= major <= high:
        return f"it needs compute capability {low}.x to {high}.x, this is {major}.{minor}"
    reason = _dtype_lacks(q, k, v, dtypes=dtypes)
    if reason:
        return reason
    if q.shape[-1] > head_dim or q.shape[-1] % 8:
        return f"it takes head dims up to {head_dim} that 8 divides, not {q.shape[-1]}"
    if not (q.numel() and k.numel()):
        return "it takes at least one query and one key"
    for tensor in (q, k, v):
        rows = [s for n, s in zip(tensor.shape[:-1], tensor.stride(), strict=False) if n > 1]
        # vectors of 16 bytes
        if tensor.stride(-1) != 1 or any(stride % 8 for stride in rows):
            return (
                "it takes heads whose channels lie side by side, and other strides that 8 "
                f"divides, not {tensor.stride()}"
            )
    return None


def _dtype_lacks(q: Tensor, k: Tensor, v: Tensor, *, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if q.dtype in dtypes and q.dtype == k.dtype == v.dtype:
        return None
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"it takes q, k and v in {names} together, not {q.dtype}, {k.dtype} and {v.dtype}"


def _function(function: str) -> Any:
    module, _, name = function.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _takes(function: str, argument: str) -> bool:
    return argument in inspect.signature(_function(function)).parameters


def _scale(q: Tensor) -> float:
    return float(q.shape[-1] ** -0.5)


def _flash(function: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = _function(function)(q, k, v, softmax_scale=_scale(q))
    # FlashAttention-4, and 3 before it had return_attn_probs, always give the log-sum-exp too
    out: Tensor = found[0] if isinstance(found, tuple) else found
    return out


def _flash_varlen(
    function: str, with_lse: str, q: Tensor, k: Tensor, v: Tensor, pack: Pack
) -> tuple[Tensor, Tensor]:
    """`with_lse`: the argument that asks for the log-sum-exp, where this release has it."""
    out, lse, *_ = _function(function)(
        q,
        k,
        v,
        cu_seqlens_q=pack.cu_q,
        cu_seqlens_k=pack.cu_k,
        max_seqlen_q=pack.max_q,
        max_seqlen_k=pack.max_k,
        softmax_scale=_scale(q),
        **({with_lse: True} if _takes(function, with_lse) else {}),
    )
    return out, lse


def _sdpa(backends: list[SDPBackend], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backends, set_priority=True):
        out = F.scaled_dot_product_attention(*_heads_first(q, k, v))
    return out.transpose(1, 2)


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _sdpa_lacks(
    checks: list[Callable[..., bool]],
    dtypes: tuple[torch.dtype, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> str | None:
    """What torch itself says of its kernels."""
    reason = _dtype_lacks(q, k, v, dtypes=dtypes)
    if reason:
        return reason
    # no mask, no dropout, not causal, as many heads of keys as of queries
    params = SDPAParams(*_heads_first(q, k, v), None, 0.0, False, False)
    if any(check(params) for check in checks):
        return None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for check in checks:
            check(params, debug=True)
    reasons = [str(warning.message).splitlines()[0] for warning in said]
    return f"torch refuses it: {'; '.join(reasons) or 'this build has no such kernel'}"


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
    # the module exists on every platform, its operators only where torch has CUDA
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    out, lse = varlen_attn(q, k, v, *pack, return_aux=AuxRequest(lse=True), scale=_scale(q))
    return out, lse


def _torch_varlen_lacks(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if not is_flash_attention_available():
        return "this build of torch has no FlashAttention"
    return _limits(q, k, v)


def _fa4_varlen_lacks(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if not _takes(_FA4_VARLEN, "return_lse"):
        return "the flash_attn.cute that is installed does not give the log-sum-exp"
    return _limits(q, k, v, majors=(9, 11), head_dim=128)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    forward = _function("xformers.ops.memory_efficient_attention_forward")
    out: Tensor = forward(q, k, v, scale=_scale(q))
    return out


def _xformers_varlen(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
    """Reads the lengths on the host: the mask wants them there."""
    lengths_q, lengths_k = (cu.diff().tolist() for cu in (pack.cu_q, pack.cu_k))
    mask = _function("xformers.ops.fmha.BlockDiagonalMask").from_seqlens(lengths_q, lengths_k)
    forward = _function("xformers.ops.memory_efficient_attention_forward_requires_grad")
    out, lse = forward(q[None], k[None], v[None], attn_bias=mask, scale=_scale(q))
    if len(lse) == 1:
        lse_NT = lse[0, :, : len(q)]
    else:  # its CUTLASS kernels give a padded row for every sequence
        lse_NT = torch.cat([row[:, :n] for row, n in zip(lse, lengths_q, strict=True)], 1)
    blind = torch.tensor([keys == 0 for keys in lengths_k], device="cpu")
    blind_T = blind.repeat_interleave(torch.tensor(lengths_q, device="cpu")).to(q.device)
    return out[0].masked_fill(blind_T[:, None, None], 0), lse_NT.masked_fill(blind_T, float("-inf"))


def _triton_varlen(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
    launcher = triton_launcher("attention")
    assert launcher is not None
    out, lse = launcher(q, k, v, pack.cu_q, pack.cu_k, pack.max_q)
    return out, lse


def _triton(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    starts = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
    length, keys = q.shape[1], k.shape[1]
    pack = Pack(starts * length, starts * keys, length, keys)
    out_TND, _ = _triton_varlen(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), pack)
    out: Tensor = out_TND.unflatten(0, q.shape[:2])
    return out


def _triton_lacks(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if triton_launcher("attention") is None:
        return missing_reason("triton", "attention", q.device)
    largest = _function("mv2v_kernels.attention.MAX_HEAD_DIM")
    if q.shape[-1] > largest:
        return f"it takes head dims up to {largest}, not {q.shape[-1]}"
    return _dtype_lacks(q, k, v, dtypes=_FLOATS)


def _is_sage_1() -> bool:
    """Whether SageAttention is of its first releases (1.0.6 on PyPI), in Triton alone."""
    return _takes(_SAGE, "smooth_k")


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    given: dict[str, Any] = {"tensor_layout": "NHD", "is_causal": False, "sm_scale": _scale(q)}
    if _is_sage_1():
        # the library would take the mean from the caller's own keys
        k = k - k.mean(1, keepdim=True)
        given["smooth_k"] = False
    out: Tensor = _function(_SAGE)(q, k, v, **given)
    return out


def _sage_lacks(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    reason = _limits(q, k, v, head_dim=128)
    if reason:
        return reason
    if not _is_sage_1():
        return _arch_lacks(q, (*_INT8_GPUS, (12, 1)))
    if q.shape[-1] not in (64, 96, 128):
        return f"releases before 2 take head dims of 64, 96 or 128, not {q.shape[-1]}"
    return None


def _sparge(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = _function(_SPARGE)(
        q, k, v, topk=SHARE, is_causal=False, scale=_scale(q), tensor_layout="NHD"
    )
    return out


def _sparge_lacks(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    reason = _limits(q, k, v, head_dim=128) or _arch_lacks(q, (*_INT8_GPUS, (8, 7)))
    if reason:
        return reason
    if q.shape[-1] not in (64, 128):
        return f"it takes head dims of 64 or 128, not {q.shape[-1]}"
    if q.shape[1] < 128:
        return f"it takes at least 128 queries, not {q.shape[1]}"
    return None


def _arch_lacks(q: Tensor, known: tuple[tuple[int, int], ...]) -> str | None:
    found = capability(q.device) or (0, 0)
    if found in known:
        return None
    names = ", ".join(f"{major}.{minor}" for major, minor in sorted(known))
    return f"it has kernels for compute capability {names}, this is {found[0]}.{found[1]}"


def _rounded_lacks(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if not k.shape[1]:
        return "it takes at least one key"
    return _dtype_lacks(q, k, v, dtypes=_FLOATS)


# GPUs for which both SageAttention 2 and SpargeAttn have kernels
_INT8_GPUS = ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0))
_SAGE = "sageattention.sageattn"
_SPARGE = "spas_sage_attn.spas_sage2_attn_meansim_topk_cuda"
_FA3, _FA3_VARLEN = (f"flash_attn_interface.flash_attn_{end}" for end in ("func", "varlen_func"))
_FA4, _FA4_VARLEN = (f"flash_attn.cute.flash_attn_{end}" for end in ("func", "varlen_func"))
_FA2, _FA2_VARLEN = (f"flash_attn.flash_attn_{end}" for end in ("func", "varlen_func"))
_TORCH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
_TORCH_CHECKS = [can_use_flash_attention, can_use_efficient_attention]

DENSE = {
    "fa3": Library(run=partial(_flash, _FA3), lacks=partial(_limits, majors=(9, 9)), function=_FA3),
    "fa4": Library(
        run=partial(_flash, _FA4),
        lacks=partial(_limits, majors=(9, 11), head_dim=128),
        function=_FA4,
    ),
    "cudnn": Library(
        run=partial(_sdpa, [SDPBackend.CUDNN_ATTENTION]),
        lacks=partial(_sdpa_lacks, [can_use_cudnn_attention], _HALF),
    ),
    "fa2": Library(run=partial(_flash, _FA2), lacks=_limits, function=_FA2),
    "torch": Library(
        run=partial(_sdpa, _TORCH), lacks=partial(_sdpa_lacks, _TORCH_CHECKS, _FLOATS)
    ),
    "xformers": Library(
        run=_xformers,
        lacks=_limits,
        function="xformers.ops.memory_efficient_attention_forward",
    ),
    "triton": Library(run=_triton, lacks=_triton_lacks),
    # approximate ones: their packed forms give no log-sum-exp, or there are none
    "sage": Library(run=_sage, lacks=_sage_lacks, function=_SAGE),
    "sparge": Library(run=_sparge, lacks=_sparge_lacks, function=_SPARGE),
    "sage-reference": Library(run=rounded_attention, lacks=_rounded_lacks, is_portable=True),
    "sparge-reference": Library(
        run=partial(rounded_attention, share=SHARE), lacks=_rounded_lacks, is_portable=True
    ),
}
PACKED = {
    "fa3": Library(
        run=partial(_flash_varlen, _FA3_VARLEN, "return_attn_probs"),
        lacks=partial(_limits, majors=(9, 9)),
        function=_FA3_VARLEN,
    ),
    "fa4": Library(
        run=partial(_flash_varlen, _FA4_VARLEN, "return_lse"),
        lacks=_fa4_varlen_lacks,
        function=_FA4_VARLEN,
    ),
    "fa2": Library(
        run=partial(_flash_varlen, _FA2_VARLEN, "return_attn_probs"),
        lacks=_limits,
        function=_FA2_VARLEN,
    ),
    "torch": Library(run=_torch_varlen, lacks=_torch_varlen_lacks),
    "xformers": Library(
        run=_xformers_varlen,
        lacks=_limits,
        function="xformers.ops.memory_efficient_attention_forward_requires_grad",
    ),
    "triton": Library(run=_triton_varlen, lacks=_triton_lacks),
}
