"""What share of a device's matrix-multiplication rate a training run gets out of it."""

from __future__ import annotations

import time

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
