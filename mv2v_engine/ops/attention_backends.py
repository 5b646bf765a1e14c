"""Which library attends: asked in the order of their speed, each refusal with its reason.

Approximate ones are never asked: they are taken by name, after a trial on the device.

B batch, L query and S key tokens, N heads, D head dim; packed: T queries and S keys of G sequences.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from mv2v_engine.config import APPROXIMATE_ATTENTION, AttentionName, EngineConfig
from mv2v_engine.errors import KernelUnavailableError
from mv2v_engine.ops import attention_libraries as libraries
from mv2v_engine.ops.attention_libraries import DENSE, PACKED, Pack

NAMES: tuple[str, ...] = get_args(AttentionName)
# an approximate library is off by 0.01 to 0.04 on the tensors of its trial; one that does not run
# its kernel, or runs it on another layout, by 0.7 and more
_TRIAL_ERROR = 0.1


def check(backend: str, device: torch.device) -> None:
    """Refuse an unknown name, and a library where there is no GPU: also under torch.compile.

    Raises:
        ValueError, KernelUnavailableError: as said.
    """
    if backend not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {backend!r}")
    if backend in ("auto", "reference") or device.type == "cuda":
        return
    if backend in DENSE and DENSE[backend].is_portable:
        return
    if libraries.capability(device) is None:
        raise _unavailable(backend, f"it needs a CUDA device, not {device.type}")


def missing(name: str, q: Tensor, k: Tensor, v: Tensor, *, packed: bool = False) -> str | None:
    """Why a library cannot take q, k and v; None if it can."""
    library = (PACKED if packed else DENSE).get(name)
    if library is None:
        return "it takes no packed sequences"
    found = libraries.capability(q.device)
    if found is None and not library.is_portable:
        return f"it needs a CUDA device, not {q.device.type}"
    reason = None if library.function is None else libraries.import_lacks(library.function)
    if reason:
        return reason
    return library.lacks(q, k, v)


def order(device: torch.device) -> tuple[str, ...]:
    """The libraries in the order of their speed on a device."""
    found = libraries.capability(device)
    # on Ampere, Ada and consumer Blackwell cuDNN is behind FlashAttention-2
    middle = (
        ("cudnn", "fa2", "torch") if found and found[0] in (9, 10) else ("fa2", "torch", "cudnn")
    )
    return ("fa3", "fa4", *middle, "xformers", "triton")


def choose(backend: str, q: Tensor, k: Tensor, v: Tensor, *, packed: bool = False) -> str | None:
    """The library that `auto` means for these tensors, None if none serves; or the one asked for.

    Raises:
        KernelUnavailableError: the library asked for by name cannot take these tensors.
    """
    if backend == "auto":
        served = (n for n in order(q.device) if missing(n, q, k, v, packed=packed) is None)
        return next(served, None)
    reason = missing(backend, q, k, v, packed=packed)
    if reason:
        raise _unavailable(backend, reason)
    return backend


def dense(name: str, q_BLND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> Tensor:
    """What a library makes of tensors that it takes, [B, L, N, D]."""
    with torch.no_grad(), _on_device(q_BLND):
        out: Tensor = DENSE[name].run(q_BLND, k_BSND, v_BSND).contiguous()
    return out


def packed(
    name: str, q_TND: Tensor, k_SND: Tensor, v_SND: Tensor, pack: Pack
) -> tuple[Tensor, Tensor]:
    """[T, N, D] and the log-sum-exp, float32 [N, T]; queries without keys have zeros and -inf."""
    with torch.no_grad(), _on_device(q_TND):
        out, lse = PACKED[name].run(q_TND, k_SND, v_SND, pack)
    expected = (q_TND.shape[1], q_TND.shape[0])
    if lse.shape != expected or lse.dtype != torch.float32:
        raise KernelUnavailableError(
            f"{name} gave a log-sum-exp of {lse.dtype} {tuple(lse.shape)}, expected float32 "
            f"{expected}; update the package, or use another attention backend"
        )
    # FlashAttention-2 marks a query without keys by +inf
    return out.contiguous(), lse.masked_fill(lse == float("inf"), float("-inf"))


def availability(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    num_heads: int = 12,
    head_dim: int = 128,
    packed: bool = False,
    approximate: bool = False,
) -> dict[str, str | None]:
    """Every library in the order it is asked, with what it lacks for such heads; None: it serves.

    The first that serves is what `auto` takes; if there is none, the reference. approximate: those
    that are taken by name alone, before their trial.
    """
    shape = (128, num_heads, head_dim) if packed else (1, 128, num_heads, head_dim)
    probe = torch.empty(shape, dtype=dtype, device=device)
    names = APPROXIMATE_ATTENTION if approximate else order(device)
    return {name: missing(name, probe, probe, probe, packed=packed) for name in names}


def resolve_attention(
    config: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_heads: int = 12,
    head_dim: int = 128,
) -> str:
    """The library that `auto` means for these heads, `reference` if none; or the one asked for.

    backend="reference" or "native" makes attention the reference too, unless a library is named.

    Raises:
        KernelUnavailableError: an explicit request cannot be met.
    """
    name = config.attention
    if name == "reference" or (name == "auto" and config.backend in ("reference", "native")):
        return "reference"
    found = availability(device, dtype=dtype, num_heads=num_heads, head_dim=head_dim)
    if name == "auto":
        return next((each for each, reason in found.items() if reason is None), "reference")
    if name in APPROXIMATE_ATTENTION:
        found[name] = _trial_lacks(name, device, dtype, num_heads, head_dim)
    if found[name]:
        raise _unavailable(name, found[name])
    return name


def _trial_lacks(
    name: str, device: torch.device, dtype: torch.dtype, num_heads: int, head_dim: int
) -> str | None:
    """Why an approximate library cannot be trusted here; None if it can.

    Some builds return what lay in memory (SageAttention 2.2.0 on Hopper), others lack the kernel of
    the device and say so when they are called. Each query of the trial attends to a few keys that
    lie together, which eight bits and half of the blocks must find.
    """
    generator = torch.Generator().manual_seed(0)
    length, run = 640, 64
    shape = (1, length, num_heads, head_dim)
    drawn = partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
    centres = drawn((1, length // run, num_heads, head_dim))
    # scores of the own run stand out by about 16 whatever the width
    centres *= 4 * head_dim**-0.25
    places = torch.arange(length, dtype=torch.int64, device="cpu") // run
    q, k, v = (drawn(shape) for _ in range(3))
    near = centres[:, places]
    q, k, v = (t.to(device, dtype) for t in (near + q / 4, near + k / 4, v))
    reason = missing(name, q, k, v)
    if reason:
        return reason
    scores = torch.einsum("blnd,bsnd->bnls", q.float(), k.float()) * head_dim**-0.5
    exact = torch.einsum("bnls,bsnd->blnd", scores.softmax(-1), v.float())
    try:
        error = float((dense(name, q, k, v).float() - exact).norm() / exact.norm())
    except (RuntimeError, ValueError, AssertionError, TypeError, NotImplementedError) as failure:
        first_line = (str(failure).splitlines() or [""])[0]
        return f"its trial failed: {type(failure).__name__}: {first_line}"
    # NaN is not below either
    if not error < _TRIAL_ERROR:
        return (
            f"its trial is off by {error:.2g} of the exact result, at most {_TRIAL_ERROR:g} is "
            "expected; build the package again, from a newer commit and for this GPU"
        )
    return None


def _unavailable(backend: str, reason: str | None) -> KernelUnavailableError:
    return KernelUnavailableError(
        f"attention was asked for with backend {backend!r}, but {reason}; use 'auto' or 'reference'"
    )


def _on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Some libraries launch on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
