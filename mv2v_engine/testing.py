"""What the tests share: error budgets drawn from data, and tiny real models.

An operation's budget is not a hand-tuned tolerance: its error against float64 may be at most
twice that of plain eager torch in the same dtype, plus the band that rounding the exact answer
already costs. Oracles are written in float64 by the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import sdpa_flop_count

from mv2v_engine.config import TransformerConfig

FACTOR = 2.0


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def _linear_flops(x: Any, weight: Any, bias: Any, **kwargs: Any) -> int:
    return int(2 * math.prod(x) * weight[0])


def cpu_flops() -> dict[Any, Callable[..., int]]:
    """Formulas for FlopCounterMode, whose own table lacks what a forward on a CPU calls."""
    return {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        torch.ops.mv2v.linear_gelu: _linear_flops,
    }


def max_error(value: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference, in float64."""
    return float((value.double() - oracle.double()).abs().max())


def relative_error(value: Tensor, oracle: Tensor) -> float:
    """Norm of the difference over the norm of the oracle, in float64."""
    difference = (value.double() - oracle.double()).norm()
    return float(difference / oracle.double().norm())


def assert_within_budget(value: Tensor, oracle: Tensor, eager: Tensor) -> None:
    """Fail unless error(value) <= 2 * (error(eager) + rounding band), all against the oracle.

    Args:
        value: what the operation under test gave.
        oracle: the exact answer, float64.
        eager: plain torch in the same dtype as `value`.
    """
    if oracle.dtype != torch.float64 or value.dtype != eager.dtype:
        raise AssertionError(
            f"the oracle must be float64 and the eager result {value.dtype}, "
            f"got {oracle.dtype} and {eager.dtype}"
        )
    if value.shape != oracle.shape:
        raise AssertionError(f"shape {tuple(value.shape)}, expected {tuple(oracle.shape)}")
    if not bool(value.isfinite().all()):
        raise AssertionError("the result holds infinities or NaNs")
    error, plain = max_error(value, oracle), max_error(eager, oracle)
    # half a unit of the oracle's size
    band = float(oracle.abs().max()) * torch.finfo(value.dtype).eps / 2
    budget = FACTOR * (plain + band)
    if error > budget:
        raise AssertionError(
            f"error {error:.3g} exceeds the budget {budget:.3g} (eager torch: {plain:.3g})"
        )


def tiny_config(**changes: Any) -> TransformerConfig:
    """Three blocks of width 24, merging before blocks 1 and 2; any field can be changed."""
    fields: dict[str, Any] = {
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "ffn_dim": 40,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 10,
        "text_len": 6,
        "freq_dim": 16,
    }
    return TransformerConfig(**fields | changes)


def as_cameras(drawn: Tensor, config: TransformerConfig) -> Tensor:
    """Normal numbers [..., 12] as a model's cameras: true rotations and intrinsics where needed."""
    if config.camera_dim == 12:
        return drawn
    matrix = drawn.unflatten(-1, (3, 4))
    rotation = torch.linalg.qr(matrix[..., :3])[0]
    pose = torch.cat([rotation, config.scene_scale * matrix[..., 3:]], -1).flatten(-2)
    focal, centre = 1 + 0.5 * matrix[..., :2, 0].tanh(), 0.1 * matrix[..., :2, 1].tanh()
    one = torch.cat([pose, focal, centre], -1)
    count = config.camera_dim // 16
    if count == 1:
        return one
    cameras: Tensor = one.repeat_interleave(count, -2).unflatten(-2, (-1, count)).flatten(-2)
    return cameras


@torch.no_grad()
def randomise(module: nn.Module, *, seed: int = 0, std: float = 0.2) -> None:
    """Random values for every parameter, so that modules that start at zero speak too.

    Norm scales stay around one, matrices keep the size of their input.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + std * noise)
        elif parameter.ndim > 1 and not name.endswith("scale_shift_table"):
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(std * noise)


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """The operating system refuses to let a file grow further, as a full disk does; POSIX alone."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
