"""Rotary embedding of interleaved pairs in each head: x[2i] + i x[2i + 1] times cos + i sin.

For keys that are kept unrotated and get their positions when they are read; where they are made,
the norm before it is in the same pass (`ops.qk_norm_rope`). The product is in float32.

B batch, L tokens, N heads, D head dim. The table holds cosines then sines, [., L, D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from mv2v_engine.ops.backend import check_tensors, define, implementation


def rope_reference(x_BLND: Tensor, rope_BLD: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # it fuses real products, not complex ones
        cos, sin = rope_BLD[:, :, None].float().chunk(2, dim=-1)
        even, odd = x_BLND.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        return turned.flatten(-2).to(x_BLND.dtype)
    # a pair is a complex number: one product instead of four and a strided copy of their sums
    pairs = torch.view_as_complex(x_BLND.float().unflatten(-1, (-1, 2)))
    turn = torch.complex(*rope_BLD[:, :, None].float().chunk(2, dim=-1))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x_BLND.dtype)


_rope = define(
    "rope",
    "(Tensor x, Tensor rope) -> Tensor",
    rope_reference,
    lambda x, rope: x.new_empty(*x.shape),
)


def rope(x: Tensor, rope: Tensor, *, backend: str = "reference") -> Tensor:
    """x [B, L, N, D], rope [1 or B, L, D] -> [B, L, N, D].

    Raises:
        TypeError, ValueError: a dtype, device or shape is not the one above.
        KernelUnavailableError: the backend was asked for by name and cannot run here.
    """
    check_tensors(x, floating={"rope": rope})
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ValueError(f"x must have shape [B, L, N, D] of an even D, got {tuple(x.shape)}")
    batch, length, _, dim = x.shape
    if rope.ndim != 3 or rope.shape[1:] != (length, dim) or len(rope) not in (1, batch):
        raise ValueError(
            f"rope must have shape [1 or {batch}, {length}, {dim}], got {tuple(rope.shape)}"
        )
    run = implementation(backend, "rope", x, rope_reference, _rope)
    result: Tensor = run(x, rope)
    return result
