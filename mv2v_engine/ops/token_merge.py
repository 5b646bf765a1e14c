"""Adaptive token merging (METHOD 7, Eq. 6): chosen frames pass a strided convolution.

Output order: the kept frames as they are, then the merged ones. Every token's rotary row moves
with it; a merged token takes the average of its parents' rows. Odd grids are replicate-padded.

B batch, F frames of a group, P tokens of a frame, C width, R rotary channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mv2v_engine.ops.backend import check_tensors, define, implementation


def _gather(frames_BFPC: Tensor, index_BK: Tensor) -> Tensor:
    frames_BFPC = frames_BFPC.expand(len(index_BK), -1, -1, -1)
    batch = torch.arange(len(index_BK), device=index_BK.device)[:, None]
    return frames_BFPC[batch, index_BK]


def _images(frames_BKPC: Tensor, grid: list[int], kernel: list[int]) -> Tensor:
    """[B * K, C, rows, columns] padded to whole kernels."""
    rows, columns = grid
    images = frames_BKPC.flatten(0, 1).transpose(1, 2).unflatten(-1, (rows, columns))
    pad = (0, -columns % kernel[1], 0, -rows % kernel[0])
    padded: Tensor = F.pad(images, pad, mode="replicate") if any(pad) else images
    return padded


def _tokens(images: Tensor, batch: int) -> Tensor:
    """[B, K * P', C]."""
    tokens: Tensor = images.flatten(2).transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2)
    return tokens


def token_merge_reference(
    x_BFPC: Tensor,
    rope_BFPR: Tensor,
    kept_BK: Tensor,
    merged_BM: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grid: list[int],
    kernel: list[int],
) -> tuple[Tensor, Tensor]:
    batch = len(x_BFPC)
    kept, kept_rope = (_gather(t, kept_BK).flatten(1, 2) for t in (x_BFPC, rope_BFPR))
    if not merged_BM.shape[1]:
        return kept, kept_rope
    images = _images(_gather(x_BFPC, merged_BM), grid, kernel)
    if weight is None or weight.ndim == 2:
        # pool in float32: the mean of four bf16 numbers should round once
        fused = _tokens(F.avg_pool2d(images.float(), kernel).to(x_BFPC.dtype), batch)
        fused = fused if weight is None else F.linear(fused, weight, bias)
    else:
        groups = images.shape[1] // weight.shape[1]
        fused = _tokens(F.conv2d(images, weight, bias, stride=kernel, groups=groups), batch)
    rope_images = _images(_gather(rope_BFPR, merged_BM), grid, kernel)
    fused_rope = _tokens(F.avg_pool2d(rope_images, kernel), batch)
    return (
        torch.cat([kept, fused.to(kept.dtype)], dim=1),
        torch.cat([kept_rope, fused_rope], dim=1),
    )


def _fake(
    x: Tensor,
    rope: Tensor,
    kept: Tensor,
    merged: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grid: list[int],
    kernel: list[int],
) -> tuple[Tensor, Tensor]:
    fused = -(-grid[0] // kernel[0]) * -(-grid[1] // kernel[1])
    length = kept.shape[1] * x.shape[2] + merged.shape[1] * fused
    return x.new_empty(len(x), length, x.shape[-1]), rope.new_empty(len(x), length, rope.shape[-1])


_token_merge = define(
    "token_merge",
    "(Tensor x, Tensor rope, Tensor kept, Tensor merged, Tensor? weight, Tensor? bias, "
    "int[] grid, int[] kernel) -> (Tensor, Tensor)",
    token_merge_reference,
    _fake,
)


def token_merge(
    x: Tensor,
    rope: Tensor,
    kept: Tensor,
    merged: Tensor,
    *,
    grid: tuple[int, int],
    kernel: tuple[int, int] = (2, 2),
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str = "reference",
) -> tuple[Tensor, Tensor]:
    """Frames x [B, F, P, C] with rope [1 or B, F, P, R] -> tokens [B, L', C], rope [B, L', R].

    kept [B, K], merged [B, M]: frame indices (int64); an empty `merged` discards the frames
    not kept. weight: [C, C / groups, *kernel] convolves, [C, C] is a linear layer after average
    pooling, None is average pooling alone.

    Raises:
        TypeError, ValueError: a dtype, device or shape is not the one above.
        KernelUnavailableError: the backend was asked for by name and cannot run here.
    """
    check_tensors(
        x,
        floating={"rope": rope, "weight": weight, "bias": bias},
        indices={"kept": kept, "merged": merged},
    )
    if x.ndim != 4 or rope.ndim != 4 or rope.shape[0] not in (1, x.shape[0]):
        raise ValueError(
            "x must have shape [B, F, P, C] and rope [1 or B, F, P, R], "
            f"got {tuple(x.shape)} and {tuple(rope.shape)}"
        )
    for name, index in (("kept", kept), ("merged", merged)):
        if index.ndim != 2 or len(index) != len(x):
            raise ValueError(f"{name} must have shape [{len(x)}, frames], got {tuple(index.shape)}")
    if min(*grid, *kernel) < 1:
        raise ValueError(f"grid and kernel must be positive, got {grid} and {kernel}")
    if x.shape[2] != grid[0] * grid[1] or rope.shape[1:3] != x.shape[1:3]:
        raise ValueError(
            f"frames of {x.shape[2]} tokens (rope {rope.shape[2]}) do not form a grid {grid}"
        )
    if weight is not None and weight.ndim == 4 and tuple(weight.shape[2:]) != tuple(kernel):
        raise ValueError(f"weight has kernel {tuple(weight.shape[2:])}, expected {kernel}")
    width = x.shape[3]
    if weight is not None and (
        weight.ndim not in (2, 4)
        or len(weight) != width
        or width % max(weight.shape[1], 1)
        or (weight.ndim == 2 and weight.shape[1] != width)
    ):
        raise ValueError(
            f"weight must have shape [{width}, {width}] or [{width}, {width} / groups, *kernel], "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (width,):
        raise ValueError(f"bias must have shape ({width},), got {tuple(bias.shape)}")
    run = implementation(backend, "token_merge", x, token_merge_reference, _token_merge)
    result: tuple[Tensor, Tensor] = run(
        x, rope, kept, merged, weight, bias, list(grid), list(kernel)
    )
    return result
