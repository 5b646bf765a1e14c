"""Vectors that modulate tokens: one a sample [B, C], or rows [R, C] that every token names.

Rows serve packed samples of different timesteps, and timesteps that differ within a sample.
B batch, L tokens, C width, R rows.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def per_token(vector: Tensor, row_BL: Tensor | None) -> Tensor:
    """float32, to be broadcast over tokens: [B, 1, C], or [B, L, C] by rows."""
    wide = vector.float()
    # on a CPU an embedding copies whole rows, an index element by element
    return wide[:, None] if row_BL is None else F.embedding(row_BL, wide)


def check_vectors(x: Tensor, row: Tensor | None, **vectors: Tensor | None) -> None:
    """Raise ValueError unless x is [B, L, C], row [B, L] and all vectors [B, C], or [R, C]."""
    if x.ndim != 3:
        raise ValueError(f"x must have shape [B, L, C], got {tuple(x.shape)}")
    given = {name: vector.shape for name, vector in vectors.items() if vector is not None}
    if row is None:
        expected: tuple[int, ...] = (x.shape[0], x.shape[2])
    else:
        if row.shape != x.shape[:2]:
            raise ValueError(f"row must have shape {tuple(x.shape[:2])}, got {tuple(row.shape)}")
        # how many rows there are is for the first vector to say
        expected = (*next(iter(given.values()), (1,))[:1], x.shape[2])
    for name, shape in given.items():
        if shape != expected:
            meaning = "" if row is None else ", all of as many rows"
            raise ValueError(f"{name} must have shape {expected}{meaning}, got {tuple(shape)}")
