"""3-D convolution on the CPU where the library's own is slow, or wrong.

PyTorch has no fast 3-D convolution for CPUs: oneDNN is not asked. A kernel of three frames is the
sum of three 2-D kernels on shifted frames, which takes a whole decoder a third of the time
(`profiling/bench_vae.py`).

In bfloat16 oneDNN is asked, and on CPUs with AMX its result is wrong, without a word, for few
channels, a stride that is the kernel and is 4 or more, and columns that it divides: a tokenizer's
case. Patches that do not overlap need no convolution: they are one matrix product.

B batch, C O channels, T H W frames, rows, columns.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv3d_by_taps(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int, int] = (1, 1, 1)
) -> Tensor:
    """`conv3d` without padding: x [B, C, T, H, W], weight [O, C, t, h, w] -> [B, O, T', H', W']."""
    batch, step, taps = len(x), stride[0], weight.shape[2]
    num_frames = (x.shape[2] - taps) // step + 1
    # frames lie one after the other with their channels innermost, what 2-D convolution is best at
    frames = x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    frames = frames.unflatten(0, (batch, -1))
    out: Tensor | None = None
    for tap in range(taps):
        shown = frames[:, tap : tap + (num_frames - 1) * step + 1 : step].flatten(0, 1)
        part = F.conv2d(shown, weight[:, :, tap], bias if out is None else None, stride[1:])
        if part.is_meta:  # a CPU's result has the layout of what it was given
            rows_first = (part.shape[0], *part.shape[2:], part.shape[1])
            part = part.flatten().view(rows_first).movedim(-1, 1)
        if out is None:
            out = part
        elif torch.is_grad_enabled():
            out = out + part
        else:
            out.add_(part)
    assert out is not None  # a kernel has at least one tap
    video: Tensor = out.unflatten(0, (batch, num_frames)).transpose(1, 2)
    return video


class PatchConv3d(nn.Conv3d):
    """A convolution whose stride is its kernel: every patch [C, t, h, w] becomes one vector [O]."""

    def __init__(self, channels: int, made: int, patch: tuple[int, int, int]) -> None:
        super().__init__(channels, made, patch, stride=patch)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        is_rounded = weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
        if x.device.type != "cpu" or not is_rounded:
            result: Tensor = super()._conv_forward(x, weight, bias)
            return result
        for axis, size in zip((2, 4, 6), weight.shape[2:], strict=True):
            count = x.shape[axis] // size
            x = x.narrow(axis, 0, count * size).unflatten(axis, (count, size))
        patches = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)
        return F.linear(patches, weight.flatten(1), bias).movedim(-1, 1)


def speed_up_conv3d(model: nn.Module) -> None:
    """Let a model's plain 3-D convolutions run by taps wherever their input is on the CPU."""
    for module in model.modules():
        if (
            isinstance(module, nn.Conv3d)
            and module.padding in ((0, 0, 0), "valid")
            and module.groups == 1
            and module.dilation == (1, 1, 1)
        ):
            module._conv_forward = MethodType(_conv_forward, module)  # type: ignore[method-assign]


def _conv_forward(module: nn.Conv3d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # tensors without memory stand for a CPU's
    if x.device.type not in ("cpu", "meta") or x.ndim != 5:
        result: Tensor = nn.Conv3d._conv_forward(module, x, weight, bias)
        return result
    step, down, across = module.stride
    return conv3d_by_taps(x, weight, bias, (step, down, across))
