"""The public operations compiled for GPUs that are not here, and what the machine code shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.processes import needs_triton, run_pytest

pytestmark = [needs_triton, pytest.mark.slow]


def test_machine_code(tmp_path: Path) -> None:
    assert run_pytest("tests/kernels/compiled.py", TRITON_CACHE_DIR=str(tmp_path)) == 3
