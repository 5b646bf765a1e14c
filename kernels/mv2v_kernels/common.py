"""What the launchers share: accepted dtypes, tile sizes, the exact product, the device guard."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# rows of one program of the elementwise kernels: vectors shared by all tokens are read once for them
ROWS = 4
_MAX_WIDTH = 1 << 14
_MAX_PROGRAMS = (2**31 - 1, 2**16 - 1, 2**16 - 1)


@triton.jit
def dot(a, b, acc, EXACT: tl.constexpr):
    """acc + a @ b; EXACT multiplies in float32, which float32 inputs and the interpreter need."""
    if EXACT:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc)


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def is_exact(dtype: torch.dtype) -> bool:
    """Whether products are taken in float32 (`dot`): the interpreter cannot multiply bfloat16."""
    return dtype == torch.float32 or is_interpreted()


def capability() -> int:
    """Compute capability of the device to launch on, as 90; the interpreter has Hopper's."""
    if is_interpreted():
        return 90
    return int(triton.runtime.driver.active.get_current_target().arch)


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def check_dtypes(op: str, **tensors: Tensor | None) -> None:
    """Raises TypeError for what the kernels cannot read."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            expected = ", ".join(str(dtype) for dtype in DTYPES)
            raise TypeError(f"{op} in Triton takes {name} in {expected}, got {tensor.dtype}")


def check_grid(op: str, *grid: int) -> None:
    """Raises ValueError for more programs than CUDA starts at once."""
    if any(count > limit for count, limit in zip(grid, _MAX_PROGRAMS, strict=False)):
        raise ValueError(
            f"{op} in Triton would start {grid} programs, at most "
            f"{_MAX_PROGRAMS[: len(grid)]} are possible; pass fewer tokens or samples at a time"
        )


def launch_rows(
    op: str,
    kernel: Any,
    tensors: Sequence[Tensor],
    written: Sequence[Tensor],
    *numbers: float,
    width: int,
    **flags: Any,
) -> None:
    """Launch an elementwise kernel over the tokens of tensors[0] [B, L, ...], `ROWS` a program.

    tensors: come with their strides, behind the numbers. written: lie without gaps. width: of a
    token, which a program holds whole, 16 elements a thread. flags: the kernel's own.
    """
    x = tensors[0]
    if width > _MAX_WIDTH:
        raise ValueError(f"{op} in Triton takes a width up to {_MAX_WIDTH}, got {width}")
    block = max(triton.next_power_of_2(width), 16)
    grid = (triton.cdiv(x.shape[1], ROWS), len(x))
    check_grid(op, *grid)
    with on_device(x):
        kernel[grid](
            *tensors,
            *written,
            x.shape[1],
            *numbers,
            *(stride for tensor in tensors for stride in tensor.stride()),
            C=width,
            BLOCK_C=block,
            ROWS=ROWS,
            num_warps=min(max(block // 512, 1), 16),
            **flags,
        )


def given(tensor: Tensor | None, rank: int, x: Tensor) -> Tensor:
    """A tensor; x with strides of zero where it is missing, which a kernel does not read."""
    return x.as_strided((1,) * rank, (0,) * rank) if tensor is None else tensor
