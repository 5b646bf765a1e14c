"""`import mv2v_engine` in a fresh process: quick, and torch is the only heavy thing it loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("diffusers", "transformers", "triton", "av", "PIL", "matplotlib", "xformers", "accelerate")


def in_fresh_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def seconds_to_import(module: str) -> float:
    code = (
        "import time; began = time.perf_counter(); import {0}; print(time.perf_counter() - began)"
    )
    return float(in_fresh_process(code.format(module)))


def test_the_engine_imports_in_two_seconds() -> None:
    torch_alone = min(seconds_to_import("torch") for _ in range(3))
    engine = min(seconds_to_import("mv2v_engine") for _ in range(3))
    # a machine on which torch alone is slow is judged by what the engine adds
    assert engine <= 2.0 or engine - torch_alone <= 1.0


def test_heavy_libraries_are_not_loaded() -> None:
    # torch itself may load some of them, where they are installed
    code = (
        "import sys, torch; before = set(sys.modules); import mv2v_engine; "
        f"print(*({set(HEAVY)} & (set(sys.modules) - before)))"
    )
    assert in_fresh_process(code) == ""


def test_commands_load_nothing_of_the_service() -> None:
    web = {"fastapi", "prometheus_client", "pydantic", "starlette", "uvicorn"}
    # some of them may come with torch or diffusers, where these are installed
    code = (
        "import sys, torch; before = set(sys.modules); import mv2v_engine.run; "
        f"print(*({web} & (set(sys.modules) - before)))"
    )
    assert in_fresh_process(code) == ""


def test_nothing_is_left_behind() -> None:
    code = (
        "import os, torch; before = dict(os.environ); threads = torch.get_num_threads(); "
        "import mv2v_engine; assert dict(os.environ) == before; "
        "assert torch.get_num_threads() == threads; assert not torch.cuda.is_initialized()"
    )
    in_fresh_process(code)
