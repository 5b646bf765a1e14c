"""Numbers that are not finite, in words; `ops.finite` has the flag of a turn under way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mv2v_engine.errors import CheckpointError, NotFiniteError
from mv2v_engine.ops.finite import extremes, is_finite

_SHOWN = 4


@torch.no_grad()
def largest_magnitude(values: Tensor) -> float:
    """The largest absolute value, 0 of none; NaN if there is one. Waits for the device."""
    low, high = extremes(values)
    return float(torch.maximum(-low, high))


def require_finite(values: Tensor, what: str, advice: str) -> None:
    """Refuse what was computed and is not finite; waits for the device. On meta there are no bits.

    Args:
        what: the tensor's name in the message, in the plural. advice: what the user can do.

    Raises:
        NotFiniteError: a number is NaN or infinite.
    """
    if not values.is_meta and not bool(is_finite(values)):
        raise NotFiniteError(f"{what} are not finite ({_share(values)}); {advice}")


def weight_fault(name: str, weight: Tensor, stored: Tensor | None = None) -> str | None:
    """What is wrong with the numbers of a weight, in words; None if they are finite, or on meta.

    stored: the weight as its file holds it, before it was cast, where that is known.
    """
    if weight.is_meta or bool(is_finite(weight)):
        return None
    if stored is not None and bool(is_finite(stored)):
        dtype = str(weight.dtype).removeprefix("torch.")
        return f"{name} (up to {largest_magnitude(stored):.3g}, too large for {dtype})"
    return f"{name} ({_share(weight)})"


def refuse_weights(path: Path | str, faults: Sequence[str]) -> None:
    """Refuse weights of which `weight_fault` found some at fault.

    Raises:
        CheckpointError: there are any; names the first of them.
    """
    if faults:
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise CheckpointError(
            f"{path}: {len(faults)} tensor{'s have' if len(faults) > 1 else ' has'} numbers that "
            f"are not finite: {', '.join(faults[:_SHOWN])}{more}; copy or download the weights "
            "again, or load them with dtype=bfloat16 or float32 if float16 has no room for them; "
            "check_weights=False loads them as they are"
        )


def _share(values: Tensor) -> str:
    """How many numbers are not finite, of which dtype."""
    dtype = str(values.dtype).removeprefix("torch.")
    values = values.detach().float()
    count = values.numel() - int(values.isfinite().sum())
    return f"{count:,} of {values.numel():,} in {dtype}"
