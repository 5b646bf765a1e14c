"""What share of a device's matrix-multiplication rate a training run gets out of it."""

from __future__ import annotations

import time
from functools import cache

import torch
from torch import nn

_REPEATS = 20


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of large square matrix products on this device, the best of many.

    It is what the device gives, all processes of a run measuring at once, not what its data
    sheet says.
    """
    size = 8192 if device.type == "cuda" else 1024
    factors = torch.ones(2, size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(_REPEATS):
        _wait(device)
        began = time.perf_counter()
        torch.mm(factors[0], factors[1])
        _wait(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - began) / 1e12)
    return best


@cache
def compute_dtype(device: torch.device) -> torch.dtype:
    """What products are computed in where it is quickest: bfloat16 on a GPU, and on a CPU whose
    products of the embedded models' size take less than two thirds of the time in it.

    Measured once in a process, so that all it does is in one dtype.
    """
    if device.type == "cuda":
        return torch.bfloat16
    tokens, weight = torch.ones(2048, 160), torch.ones(160, 640)
    plain = [_seconds(tokens, weight) for _ in range(_REPEATS)]
    tokens, weight = tokens.bfloat16(), weight.bfloat16()
    for _ in range(_REPEATS):
        seconds = _seconds(tokens, weight)
        if 1.5 * seconds < min(plain):
            return torch.bfloat16
        # a CPU without instructions for it takes many times as long: no need to repeat that
        if seconds > sum(plain):
            break
    return torch.float32


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    began = time.perf_counter()
    torch.mm(a, b)
    return time.perf_counter() - began


def training_flops_factor(model: nn.Module) -> float:
    """A step's FLOPs over its forward's: the way back costs one forward for the gradients of
    activations and one for those of weights, the latter only where weights are trained.

    What gradient checkpointing computes twice is not counted: it is a cost, not work.
    """
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained = sum(number for number, is_trained in counts if is_trained)
    return 2 + trained / sum(number for number, _ in counts)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
