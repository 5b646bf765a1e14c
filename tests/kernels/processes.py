"""Tests of Triton's kernels in a process of their own.

Triton decides when it is imported whether kernels are interpreted or compiled, so neither way can
share a process with the other or with the rest of the tests.
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

needs_triton = pytest.mark.skipif(
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
