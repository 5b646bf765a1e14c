"""The rotation of interleaved pairs in each head: the kernel of `qk_norm_rope` without its norm."""

from __future__ import annotations

from torch import Tensor

from mv2v_kernels.common import check_dtypes
from mv2v_kernels.qk_norm_rope import launch


def launch_rope(x: Tensor, rope: Tensor) -> Tensor:
    """x [B, L, N, D], rope [1 or B, L, D] -> [B, L, N, D]."""
    check_dtypes("rope", x=x, rope=rope)
    return launch("rope", x, None, rope)
