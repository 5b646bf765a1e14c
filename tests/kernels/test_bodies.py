"""Every kernel's body, in the interpreter and on a GPU, where the references stand elsewhere."""

from __future__ import annotations

import importlib.util

import pytest

from tests.kernels.processes import needs_triton, run_pytest

pytestmark = [needs_triton, pytest.mark.slow]


def test_bodies_in_the_interpreter() -> None:
    assert run_pytest("tests/ops", TRITON_INTERPRET="1") > 80


@pytest.mark.gpu
def test_bodies_on_the_gpu() -> None:
    """Odd sizes, every dtype, strides, offsets beyond 2**31, canaries: all of `tests/ops`."""
    workers = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    assert run_pytest("tests/ops", *workers, MV2V_TEST_LAUNCHERS="cuda") > 80
