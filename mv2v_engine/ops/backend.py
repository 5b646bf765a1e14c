"""Which implementation an operation runs on, decided once per engine and recorded.

`reference` is torch; `triton` is the optional package `mv2v_kernels`, one module per operation;
`cuda` is the library of `csrc/cuda`, where an install has built it. An explicit request that cannot
be met raises and names the reason.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from mv2v_engine.config import BackendName
from mv2v_engine.errors import KernelUnavailableError
from mv2v_engine.ops import native

OPS = (
    "adaln",
    "attention",
    "frame_responsiveness",
    "gated_residual",
    "qk_norm_rope",
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


def define(
    name: str, schema: str, reference: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Register `mv2v::name`: the reference on every device, until a launcher takes CUDA's slot."""
    qualified = f"mv2v::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, ("cpu", "cuda"), reference)
    torch.library.register_fake(qualified, fake)
    packet = getattr(torch.ops.mv2v, name)
    return packet.default  # type: ignore[no-any-return]
