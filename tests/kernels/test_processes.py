"""Triton kernels in processes of their own, two of them without a GPU.

One runs every kernel's body in the interpreter, one compiles the public operations for named GPUs
and reads the machine code. Triton decides which of the two it is when it is imported, so neither
can share a process with the other or with the rest of the tests. The third runs the bodies on a
GPU, with the launchers where the references stand elsewhere.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)


def run_pytest(*arguments: str, **environment: str) -> int:
    """The number of tests passed in a fresh process; its whole report if one of them did not."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_"))}
    inherited["PYTHONPATH"] = os.pathsep.join(sys.path[1:])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-m",
            "not gpu",
            *arguments,
        ],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    passed = re.search(r"(\d+) passed", done.stdout)
    return int(passed[1]) if passed else 0


def test_bodies_in_the_interpreter() -> None:
    assert run_pytest("tests/ops", TRITON_INTERPRET="1") > 80


@pytest.mark.gpu
def test_bodies_on_the_gpu() -> None:
    """Odd sizes, every dtype, strides, offsets beyond 2**31, canaries: all of `tests/ops`."""
    workers = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    assert run_pytest("tests/ops", *workers, MV2V_TEST_LAUNCHERS="cuda") > 80


def test_machine_code(tmp_path: Path) -> None:
    assert run_pytest("tests/kernels/compiled.py", TRITON_CACHE_DIR=str(tmp_path)) > 15
