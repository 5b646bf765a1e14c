"""Whether numbers are finite, of every dtype and layout, without a word from the device."""

from __future__ import annotations

import math

import pytest
import torch

from mv2v_engine.errors import CheckpointError, NotFiniteError
from mv2v_engine.finite import largest_magnitude, refuse_weights, require_finite, weight_fault
from mv2v_engine.ops.finite import is_finite
from tests.engine.graph_stand_in import Recording

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 1000, 100_003])
def test_one_number_anywhere_is_found(size: int, dtype: torch.dtype, bad: float) -> None:
    values = torch.zeros(size, dtype=dtype)
    values[::2] = torch.finfo(dtype).max
    values[1::2] = torch.finfo(dtype).min
    assert bool(is_finite(values))
    for place in {0, size // 2, size - 1}:
        damaged = values.clone()
        damaged[place] = bad
        assert not bool(is_finite(damaged))
        assert not math.isfinite(largest_magnitude(damaged))
        assert not bool(is_finite(damaged.expand(3, size).T))


def test_floats_of_eight_bits_and_nothing_at_all() -> None:
    values = torch.tensor([1.0, 448.0]).to(torch.float8_e4m3fn)
    assert bool(is_finite(values)) and largest_magnitude(values) == 448
    assert not bool(is_finite(torch.tensor([math.nan]).to(torch.float8_e4m3fn)))
    assert bool(is_finite(torch.zeros(0, 3))) and largest_magnitude(torch.zeros(0)) == 0


def test_the_flag_waits_for_no_device() -> None:
    """A capture would refuse to; counted in place, beside a weight that has a gradient."""
    values = torch.nn.Parameter(torch.ones(5))
    count = torch.zeros(1, dtype=torch.int64)
    with Recording():
        count.add_(is_finite(values))
    assert int(count) == 1 and not is_finite(values).requires_grad


def test_what_is_not_finite_is_named() -> None:
    with pytest.raises(
        NotFiniteError, match=r"^the sums are not finite \(2 of 3 in float32\); add"
    ):
        require_finite(torch.tensor([math.nan, 1, math.inf]), "the sums", "add less")
    require_finite(torch.ones(3, device="meta"), "the sums", "add less")


def test_a_weight_too_large_for_its_dtype_is_told_apart() -> None:
    stored = torch.tensor([1.0, -7e4])
    assert weight_fault("a", stored) is None
    assert weight_fault("a", stored.bfloat16(), stored) is None
    fault = weight_fault("a", stored.half(), stored)
    assert fault == "a (up to 7e+04, too large for float16)"
    assert weight_fault("a", stored.half()) == "a (1 of 2 in float16)"
    refuse_weights("folder", [])
    with pytest.raises(CheckpointError, match=r"folder: 6 tensors .*w0, w1, w2, w3 and 2 more"):
        refuse_weights("folder", [f"w{number}" for number in range(6)])
