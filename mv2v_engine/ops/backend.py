"""Which implementation an operation runs on, decided once per engine and recorded.

`reference` is torch; `native` is the library of `csrc/cpu` for five operations, float32 without
gradients on a CPU, and torch for the others; `triton` is the optional package `mv2v_kernels`, one
module per operation; `cuda` is the library of `csrc/cuda`, where an install has built it. An
explicit request that cannot be met raises and names the reason.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from mv2v_engine.config import BackendName
from mv2v_engine.errors import KernelUnavailableError
from mv2v_engine.ops import native

OPS = (
    "adaln",
    "attention",
    "frame_responsiveness",
    "gated_residual",
    "prope",
    "qk_norm_rope",
    "residual_norm",
    "rope",
    "token_merge",
)
NATIVE_OPS = ("adaln", "gated_residual", "prope", "qk_norm_rope", "residual_norm")


def missing_reason(backend: BackendName, op: str, device: torch.device) -> str | None:
    """Why a backend cannot run an operation on a device; None if it can."""
    if backend in ("auto", "reference"):
        return None
    if backend == "native":
        if device.type != "cpu":
            return f"it needs a CPU, this engine runs on {device.type}"
        return native.missing_reason("cpu", op) if op in NATIVE_OPS else "torch does them"
    if device.type != "cuda":
        return f"it needs a CUDA device, this engine runs on {device.type}"
    if backend == "cuda":
        return native.missing_reason("cuda", op)
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if importlib.util.find_spec("mv2v_kernels") is None:
        return "no mv2v_kernels package is installed"
    found = importlib.util.find_spec(f"mv2v_kernels.{op}")
    return None if found else f"mv2v_kernels has no triton version of {op}"


def has_bfloat16_products() -> bool:
    """Whether this machine's CPU multiplies bfloat16 (AVX-512 BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve(
    backend: BackendName, device: torch.device, dtype: torch.dtype = torch.float32
) -> BackendName:
    """The backend that `auto` means here, or the requested one if every operation has it.

    dtype: of the tokens; `native` takes float32 alone.

    Raises:
        KernelUnavailableError: an explicit request cannot be met.
    """
    if backend == "auto":
        fastest: BackendName = "native" if device.type == "cpu" else "triton"
        return "reference" if _why_not(fastest, device, dtype) else fastest
    reason = _why_not(backend, device, dtype)
    if reason:
        raise KernelUnavailableError(
            f"backend {backend!r} was asked for, but {reason}; use 'auto' or 'reference'"
        )
    return backend


def _why_not(backend: BackendName, device: torch.device, dtype: torch.dtype) -> str | None:
    ops = NATIVE_OPS if backend == "native" else OPS
    reasons = (missing_reason(backend, op, device) for op in ops)
    reason = next((each for each in reasons if each), None)
    if reason is None and backend == "native" and dtype != torch.float32:
        return f"it needs float32, this engine runs in {str(dtype).removeprefix('torch.')}"
    return reason


@cache
def triton_launcher(op: str) -> Callable[..., Any] | None:
    """`mv2v_kernels.<op>.launch_<op>`, imported when first asked for; None where it is missing."""
    if missing_reason("triton", op, torch.device("cuda")):
        return None
    launcher = getattr(importlib.import_module(f"mv2v_kernels.{op}"), f"launch_{op}")
    return launcher  # type: ignore[no-any-return]


def define(
    name: str,
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
    native: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Register `mv2v::name`: the reference on CPU, the Triton launcher on CUDA where there is one.

    The launcher is imported by the first call on CUDA, never before. `cuda` stands in its place
    for an operation that has more to choose from. `native` fills outputs that `fake` lays out, on
    a CPU where the library has the operation (`_natively`).
    """

    def on_cuda(*args: Any) -> Any:
        return (triton_launcher(name) or reference)(*args)

    on_cpu = reference
    if native is not None:
        on_cpu = _natively(name, reference, fake, native)
    qualified = f"mv2v::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, "cpu", on_cpu)
    torch.library.impl(qualified, "cuda", cuda or on_cuda)
    torch.library.register_fake(qualified, fake)
    packet = getattr(torch.ops.mv2v, name)
    return packet.default  # type: ignore[no-any-return]


_ON_CPU: dict[str, Callable[..., Any]] = {}  # those of NATIVE_OPS, once the library is there


def _natively(
    name: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    fill: Callable[..., None],
) -> Callable[..., Any]:
    """What the CPU slot holds: `fill(*outputs, *args)` with dense tensors, or the reference.

    The reference has gradients and takes every other floating dtype.
    """

    def run(*args: Any) -> Any:
        dense = []
        for value in args:
            if isinstance(value, Tensor):
                if value.dtype is not torch.float32 and value.dtype is not torch.int64:
                    if value.dtype is not torch.int32:
                        return reference(*args)
                    value = value.long()
                value = value.contiguous()
            dense.append(value)
        if torch.is_grad_enabled() and any(
            isinstance(value, Tensor) and value.requires_grad for value in args
        ):
            return reference(*args)
        result = fake(*args)
        if isinstance(result, Tensor) and result.is_contiguous():
            fill(result, *dense)
            return result
        outputs = result if isinstance(result, tuple) else (result,)
        filled = [each.contiguous() for each in outputs]
        fill(*filled, *dense)
        for output, values in zip(outputs, filled, strict=True):
            if output is not values:
                output.copy_(values)
        return result

    _ON_CPU[name] = run
    return lambda *args: (reference if native.missing_reason("cpu", name) else run)(*args)


def implementation(
    backend: str, op: str, x: Tensor, reference: Callable[..., Any], registered: Callable[..., Any]
) -> Callable[..., Any]:
    """What a public operation calls for tensors like `x`.

    Raises:
        KernelUnavailableError: `backend` names kernels that cannot run on this device.
    """
    if backend == "reference":
        return reference
    if backend == "auto":
        return registered
    if backend == "native" and op not in NATIVE_OPS:
        return reference
    if backend not in ("native", "triton", "cuda"):
        raise ValueError(
            f"backend must be 'auto', 'reference', 'native', 'triton' or 'cuda', got {backend!r}"
        )
    reason = _missing_on(backend, op, x.device.type)
    if reason:
        raise KernelUnavailableError(
            f"{op} was asked for with backend {backend!r}, but {reason}; use 'auto' or 'reference'"
        )
    # a compiler and a dispatch mode have to see every operation
    is_watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    if backend == "native" and type(x) is Tensor and not is_watched:
        return _ON_CPU[op]  # without the dispatcher, which takes as long as a small call
    return registered


def _missing_on(backend: str, op: str, device_type: str) -> str | None:
    """`missing_reason`, looked up once for each kind of device and a constant to torch.compile."""
    return _looked_up(backend, op, device_type)


# The mark that torch.compiler.assume_constant_result sets. Calling that would load the compiler,
# and Triton with it, for everyone who imports the engine.
_missing_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _looked_up(backend: str, op: str, device_type: str) -> str | None:
    return missing_reason(cast(BackendName, backend), op, torch.device(device_type))


def check_tensors(
    x: Tensor,
    *,
    floating: dict[str, Tensor | None] | None = None,
    indices: dict[str, Tensor | None] | None = None,
) -> None:
    """Raise TypeError for wrong dtypes and ValueError for tensors on another device than x."""
    if not x.is_floating_point():
        raise TypeError(f"x must be of a floating dtype, got {x.dtype}")
    # on a small model's CPU turn these few lines are a part of the time
    device = x.device
    for name, tensor in (floating or {}).items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be of a floating dtype, got {tensor.dtype}")
        if tensor.device != device:
            raise _elsewhere(name, tensor, device)
    for name, tensor in (indices or {}).items():
        if tensor is None:
            continue
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
        if tensor.device != device:
            raise _elsewhere(name, tensor, device)


def _elsewhere(name: str, tensor: Tensor, device: torch.device) -> ValueError:
    return ValueError(f"{name} must be on {device} as the first tensor is, got {tensor.device}")
