"""RMSNorm over the full width, then rotary embedding of interleaved pairs in each head, or none.

B batch, L tokens, N heads, D head dim, C = N * D. The table holds cosines then sines, [., L, D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from mv2v_engine.ops import native
from mv2v_engine.ops.backend import check_tensors, define, implementation
from mv2v_engine.ops.rope import rope_reference


def rms_norm_reference(x_BLC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight: the statistics in float32, the scale in x's dtype as Wan does."""
    wide = x_BLC.float()
    # one pass over the tokens where a mean of squares takes two
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    normed = wide * torch.rsqrt(norm * norm / wide.shape[-1] + eps)
    return normed.to(weight_C.dtype).mul(weight_C).to(x_BLC.dtype)


def qk_norm_rope_reference(
    x_BLC: Tensor, weight_C: Tensor, rope_BLD: Tensor | None, num_heads: int, eps: float
) -> Tensor:
    x_BLND: Tensor = rms_norm_reference(x_BLC, weight_C, eps).unflatten(-1, (num_heads, -1))
    return x_BLND if rope_BLD is None else rope_reference(x_BLND, rope_BLD)


def _native(
    out_BLND: Tensor,
    x_BLC: Tensor,
    weight_C: Tensor,
    rope_BLD: Tensor | None,
    num_heads: int,
    eps: float,
) -> None:
    batch, length, width = x_BLC.shape
    head_dim = width // num_heads
    native.bound("qk_norm_rope", "pppnnnnndtp")(
        x_BLC.data_ptr(),
        weight_C.data_ptr(),
        native.address(rope_BLD),
        batch,
        length,
        num_heads,
        head_dim,
        1 if rope_BLD is None else len(rope_BLD),
        eps,
        torch.get_num_threads(),
        out_BLND.data_ptr(),
    )


def _fake(x: Tensor, weight: Tensor, rope: Tensor | None, num_heads: int, eps: float) -> Tensor:
    batch, length, width = x.shape
    return x.new_empty(batch, length, num_heads, width // num_heads)


_qk_norm_rope = define(
    "qk_norm_rope",
    "(Tensor x, Tensor weight, Tensor? rope, int num_heads, float eps) -> Tensor",
    qk_norm_rope_reference,
    _fake,
    native=_native,
)


def qk_norm_rope(
    x: Tensor,
    weight: Tensor,
    rope: Tensor | None,
    *,
    num_heads: int,
    eps: float = 1e-6,
    backend: str = "reference",
) -> Tensor:
    """x [B, L, C], weight [C], rope [1 or B, L, D] or None -> [B, L, N, D].

    Raises:
        TypeError, ValueError: a dtype, device or shape is not the one above.
        KernelUnavailableError: the backend was asked for by name and cannot run here.
    """
    check_tensors(x, floating={"weight": weight, "rope": rope})
    if x.ndim != 3:
        raise ValueError(f"x must have shape [B, L, C], got {tuple(x.shape)}")
    if num_heads < 1 or x.shape[-1] % (2 * num_heads):
        raise ValueError(f"{num_heads} heads of an even dim do not divide a width of {x.shape[-1]}")
    head_dim = x.shape[-1] // num_heads
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must have shape {tuple(x.shape[-1:])}, got {tuple(weight.shape)}")
    if rope is not None and (
        rope.ndim != 3
        or rope.shape[1:] != (x.shape[1], head_dim)
        or rope.shape[0] not in (1, x.shape[0])
    ):
        raise ValueError(
            f"rope must have shape [1 or {x.shape[0]}, {x.shape[1]}, {head_dim}], "
            f"got {tuple(rope.shape)}"
        )
    run = implementation(backend, "qk_norm_rope", x, qk_norm_rope_reference, _qk_norm_rope)
    result: Tensor = run(x, weight, rope, num_heads, eps)
    return result
