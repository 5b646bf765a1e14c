"""Scaled dot-product attention, dense or packed; never the math path on long sequences.

The math path stores every score: 192 GiB on ReCamMaster's 65,520 tokens. Above 4,096 tokens it
is refused and the message says what to install. On CUDA the libraries of `attention_backends` are
asked in the order of their speed; where none serves, and on a CPU, torch chooses.

B batch, L query and S key tokens, N heads, D head dim; packed: T queries and S keys of G sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mv2v_engine.errors import KernelUnavailableError, is_out_of_memory
from mv2v_engine.ops import attention_backends as backends
from mv2v_engine.ops.attention_libraries import Pack
from mv2v_engine.ops.backend import check_tensors, define

MATH_LIMIT = 4096
# cuDNN leads on Hopper; torch by itself would pick FlashAttention-2
_FUSED = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
]


class _Products(torch.autograd.Function):
    """Attention as bfloat16 products of all scores at once, q, k, v [G, L, D].

    On a CPU torch's fused attention gains nothing from bfloat16, and its way back loses.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2))
        weights = torch.softmax(scores, dim=-1)
        ctx.save_for_backward(q, k, v, weights)
        return torch.bmm(weights, v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, weights = ctx.saved_tensors
        grad = grad.contiguous()
        grad_v = torch.bmm(weights.transpose(1, 2), grad)
        grad_weights = torch.bmm(grad, v.transpose(1, 2))
        scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        scale = q.shape[-1] ** -0.5
        return torch.bmm(scores, k) * scale, torch.bmm(scores.transpose(1, 2), q) * scale, grad_v


def attention_reference(q_BLND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q_BLND, k_BSND, v_BSND))
    is_short = max(q.shape[2], k.shape[2]) <= MATH_LIMIT
    if q.requires_grad and is_short and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        flat = (t.flatten(0, 1) for t in (q, k, v))
        products: Tensor = _Products.apply(*flat)  # type: ignore[no-untyped-call]
        unflat: Tensor = products.unflatten(0, q.shape[:2]).transpose(1, 2)
        return unflat
    if is_short:
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        try:
            with sdpa_kernel(_FUSED, set_priority=True):
                out = F.scaled_dot_product_attention(q, k, v)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise KernelUnavailableError(
                f"no fused attention takes {k.shape[2]} tokens of {q.dtype} with head dim "
                f"{q.shape[3]} on {q.device}, and the math path is refused above {MATH_LIMIT} "
                "tokens; use bfloat16 or float16 on CUDA, or install flash-attn or triton"
            ) from error
    return out.transpose(1, 2)


def _dense(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    library = backends.choose(backend, q, k, v)
    if library is not None:
        return backends.dense(library, q, k, v)
    # an operator may not return a view of something it does not own: keep the layout fixed
    return attention_reference(q, k, v).contiguous()


_attention = define(
    "attention",
    "(Tensor q, Tensor k, Tensor v, str backend) -> Tensor",
    _dense,
    lambda q, k, v, backend: q.new_empty(q.shape),
    _dense,
)


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "reference") -> Tensor:
    """q [B, L, N, D], k and v [B, S, N, D] -> [B, L, N, D]; every query sees every key.

    backend: `auto` takes the fastest library that serves; a library by its name, such as `fa3`,
    `cudnn` or this project's own `triton`, is used or refused; `reference` can be trained with.

    Raises:
        TypeError, ValueError: a dtype, device or shape is not the one above.
        KernelUnavailableError: the backend cannot run here, or only the math path could.
    """
    check_tensors(q, floating={"k": k, "v": v})
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(
            "q must have shape [B, L, N, D] and k [B, S, N, D], "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if k.shape != v.shape or q.shape[2:] != k.shape[2:] or q.shape[0] != k.shape[0]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must agree in batch, "
            "heads and head dim, and k and v in length"
        )
    backends.check(backend, q.device)
    if backend == "reference":
        return attention_reference(q, k, v)
    result: Tensor = _attention(q, k, v, backend)
    return result


def attention_varlen_reference(
    q_TND: Tensor, k_SND: Tensor, v_SND: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> tuple[Tensor, Tensor]:
    """One sequence after the other; reads the lengths on the host.

    In float32 at least. On a CPU as `attention` does it; elsewhere all scores are formed.
    """
    out_TND = torch.zeros(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)
    lse_NT = out_TND.new_full((q_TND.shape[1], len(q_TND)), float("-inf"), dtype=torch.float32)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for index in range(len(starts_q) - 1):
        rows = slice(starts_q[index], starts_q[index + 1])
        keys = slice(starts_k[index], starts_k[index + 1])
        q, k, v = (t.transpose(0, 1) for t in (q_TND[rows], k_SND[keys], v_SND[keys]))
        if q.shape[1] and k.shape[1]:
            out, lse_NT[:, rows] = _one_of_a_pack(q, k, v)
            out_TND[rows] = out.transpose(0, 1).to(out_TND.dtype)
    return out_TND, lse_NT


def _one_of_a_pack(q_NLD: Tensor, k_NSD: Tensor, v_NSD: Tensor) -> tuple[Tensor, Tensor]:
    """[N, L, D] and the log-sum-exp [N, L] of one sequence, neither empty, in float32 at least."""
    wide = torch.promote_types(q_NLD.dtype, torch.float32)
    q, k, v = (t.to(wide) for t in (q_NLD, k_NSD, v_NSD))
    if q.device.type == "cpu" and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        # what scaled_dot_product_attention calls here; it keeps the log-sum-exp to itself
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = fused(q[None], k[None], v[None])
        return out[0], lse[0]
    if max(q.shape[1], k.shape[1]) > MATH_LIMIT:
        raise KernelUnavailableError(
            f"no fused attention takes packed sequences of {q_NLD.dtype} on {q.device}, and the "
            f"math path is refused above {MATH_LIMIT} tokens, got {q.shape[1]} queries and "
            f"{k.shape[1]} keys; use bfloat16 or float16 on CUDA, or install triton"
        )
    scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    library = backends.choose(backend, q, k, v, packed=True)
    if library is not None:
        return backends.packed(library, q, k, v, Pack(cu_q, cu_k, max_q, max_k))
    return attention_varlen_reference(q, k, v, cu_q, cu_k)


def _varlen_fake(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, name: str
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


_attention_varlen = define(
    "attention_varlen",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, str backend) -> (Tensor, Tensor)",
    _varlen,
    _varlen_fake,
    _varlen,
)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    backend: str = "reference",
) -> tuple[Tensor, Tensor]:
    """Packed q [T, N, D], k and v [S, N, D] -> [T, N, D] and the log-sum-exp, float32 [N, T].

    Sequence g has queries cu_seqlens_q[g] to cu_seqlens_q[g + 1] and keys likewise: int32 [G + 1],
    on the device; the kernels trust them. max_seqlen_q, max_seqlen_k: at least the longest, known
    on the host. A sequence without keys gives zeros and -inf. Two results over disjoint keys merge
    exactly: the weights are softmax(lse), which has no gradient. backend: as in `attention`.

    Raises:
        TypeError, ValueError: a dtype, device or shape is not the one above.
        KernelUnavailableError: the backend cannot run here, or only the math path could.
    """
    check_tensors(
        q,
        floating={"k": k, "v": v},
        indices={"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k},
    )
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:]:
        raise ValueError(
            "q must have shape [T, N, D], k and v [S, N, D], "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    for name, starts in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if starts.ndim != 1 or starts.shape != cu_seqlens_q.shape or len(starts) < 2:
            raise ValueError(
                "cu_seqlens_q and cu_seqlens_k must have shape [sequences + 1], at least one "
                f"sequence, got {tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}"
            )
        if starts.dtype != torch.int32 or not starts.is_contiguous():
            raise TypeError(f"{name} must be contiguous int32, got {starts.dtype}")
    for name, longest, tokens in (("q", max_seqlen_q, len(q)), ("k", max_seqlen_k, len(k))):
        if not 1 <= longest <= max(tokens, 1):
            raise ValueError(f"max_seqlen_{name} must lie in 1..{tokens}, got {longest}")
    backends.check(backend, q.device)
    if backend == "reference":
        return attention_varlen_reference(q, k, v, cu_seqlens_q, cu_seqlens_k)
    result: tuple[Tensor, Tensor] = _attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, backend
    )
    return result
