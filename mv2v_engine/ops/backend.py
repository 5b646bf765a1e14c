"""Which implementation an operation runs on, decided once per engine and recorded.

`reference` is torch; `triton` is the optional package `mv2v_kernels`, one module per operation;
`cuda` is the library of `csrc/cuda`, where an install has built it. An explicit request that cannot
be met raises and names the reason.
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
    "qk_norm_rope",
    "residual_norm",
    "token_merge",
)


def missing_reason(backend: BackendName, op: str, device: torch.device) -> str | None:
    """Why a backend cannot run an operation on a device; None if it can."""
    if backend in ("auto", "reference"):
        return None
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


def resolve(backend: BackendName, device: torch.device) -> BackendName:
    """The backend that `auto` means here, or the requested one if every operation has it.

    Raises:
        KernelUnavailableError: an explicit request cannot be met.
    """
    if backend == "auto":
        able = all(missing_reason("triton", op, device) is None for op in OPS)
        return "triton" if able else "reference"
    for op in OPS:
        reason = missing_reason(backend, op, device)
        if reason:
            raise KernelUnavailableError(
                f"backend {backend!r} was asked for, but {reason}; use 'auto' or 'reference'"
            )
    return backend


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
) -> Callable[..., Any]:
    """Register `mv2v::name`: the reference on CPU, the Triton launcher on CUDA where there is one.

    The launcher is imported by the first call on CUDA, never before. `cuda` stands in its place
    for an operation that has more to choose from.
    """

    def on_cuda(*args: Any) -> Any:
        return (triton_launcher(name) or reference)(*args)

    qualified = f"mv2v::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, "cpu", reference)
    torch.library.impl(qualified, "cuda", cuda or on_cuda)
    torch.library.register_fake(qualified, fake)
    packet = getattr(torch.ops.mv2v, name)
    return packet.default  # type: ignore[no-any-return]


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
    if backend not in ("triton", "cuda"):
        raise ValueError(
            f"backend must be 'auto', 'reference', 'triton' or 'cuda', got {backend!r}"
        )
    reason = _missing_on(backend, op, x.device.type)
    if reason:
        raise KernelUnavailableError(
            f"{op} was asked for with backend {backend!r}, but {reason}; use 'auto' or 'reference'"
        )
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
