"""PRoPE: groups of four channels times the matrix of their token's camera (METHOD 5).

y[4g : 4g + 4] = M[frame] x[4g : 4g + 4] for the first channels of every head, the others as they
are; products and sums in float32.

B batch, L tokens, N heads, D head dim, F frames.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from mv2v_engine.ops import native
from mv2v_engine.ops.backend import check_tensors, define, implementation


def prope_reference(x_BLND: Tensor, matrix_BF44: Tensor, frame_BL: Tensor, channels: int) -> Tensor:
    first = torch.arange(len(matrix_BF44), device=x_BLND.device) * matrix_BF44.shape[1]
    # whole rows, as adaln looks cameras up
    rows = F.embedding(frame_BL + first[:, None], matrix_BF44.float().flatten(2).flatten(0, 1))
    quads = x_BLND[..., :channels].float().unflatten(-1, (-1, 4)).flatten(2, 3)
    with _float32_products(x_BLND.device.type):
        products: Tensor = quads @ rows.unflatten(-1, (4, 4)).mT
    turned: Tensor = products.to(x_BLND.dtype).view(*x_BLND.shape[:3], channels)
    if channels == x_BLND.shape[-1]:
        return turned
    return torch.cat([turned, x_BLND[..., channels:]], dim=-1)


def _float32_products(device_type: str) -> AbstractContextManager[object]:
    """Training's autocast would round the matrices to bfloat16."""
    if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _native(
    out_BLND: Tensor, x_BLND: Tensor, matrix_BF44: Tensor, frame_BL: Tensor, channels: int
) -> None:
    native.bound("prope", "pppnnnnnntp")(
        x_BLND.data_ptr(),
        matrix_BF44.data_ptr(),
        frame_BL.data_ptr(),
        *x_BLND.shape,
        channels,
        matrix_BF44.shape[1],
        torch.get_num_threads(),
        out_BLND.data_ptr(),
    )


_prope = define(
    "prope",
    "(Tensor x, Tensor matrix, Tensor frame, int channels) -> Tensor",
    prope_reference,
    lambda x, matrix, frame, channels: x.new_empty(*x.shape),
    native=_native,
)


def prope(
    x: Tensor,
    matrix: Tensor,
    frame: Tensor,
    *,
    channels: int,
    backend: str = "reference",
) -> Tensor:
    """x [B, L, N, D], matrix [B, F, 4, 4], frame [B, L] (int64) -> [B, L, N, D].

    channels: of a head, its first ones, a multiple of 4. The matrix has no gradient in kernels,
    which trust frame, as they trust adaln's.

    Raises:
        TypeError, ValueError: a dtype, device or shape is not the one above.
        KernelUnavailableError: the backend was asked for by name and cannot run here.
    """
    check_tensors(x, floating={"matrix": matrix}, indices={"frame": frame})
    if x.ndim != 4:
        raise ValueError(f"x must have shape [B, L, N, D], got {tuple(x.shape)}")
    if not 0 < channels <= x.shape[-1] or channels % 4:
        raise ValueError(
            f"channels must be a multiple of 4 in 4..{x.shape[-1]}, the head's, got {channels}"
        )
    if matrix.ndim != 4 or matrix.shape[2:] != (4, 4) or len(matrix) != len(x):
        raise ValueError(f"matrix must have shape [{len(x)}, F, 4, 4], got {tuple(matrix.shape)}")
    if frame.shape != x.shape[:2]:
        raise ValueError(f"frame must have shape {tuple(x.shape[:2])}, got {tuple(frame.shape)}")
    run = implementation(backend, "prope", x, prope_reference, _prope)
    result: Tensor = run(x, matrix, frame, channels)
    return result
