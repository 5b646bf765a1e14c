"""The kernels on a GPU at the sizes of real turns, against float64; odd sizes are `tests/ops`' own.

Inputs, oracles and eager torch are the benchmarks' (`profiling/op_cases.py`), whose tiny cases are
tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from attention_cases import ALL_MAKERS
from op_cases import DTYPE, OpCase, plans

from mv2v_engine.testing import assert_within_budget
from mv2v_engine.tokens.plan import TokenPlan

pytestmark = pytest.mark.gpu

# the longest turn, narrow and wide: ten memory videos
TURNS = {plan.shape.dim: plan for plan in plans(tiny=False) if plan.num_memory == 10}


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def cases(op: str, plan: TokenPlan) -> list[OpCase]:
    return ALL_MAKERS[op](plan, torch.device("cuda"))


@pytest.mark.parametrize("width", TURNS)
@pytest.mark.parametrize("op", ALL_MAKERS)
@torch.inference_mode()
def test_real_sizes_match_float64(op: str, width: int) -> None:
    """Every backend that can run here; attention's are thereby held to each other."""
    for case in cases(op, TURNS[width]):
        oracle, eager = case.expected(torch.float64), case.expected(DTYPE)
        ran = [name for name, missing in case.backends.items() if missing is None]
        assert "triton" in ran or "triton" not in case.backends, case.backends["triton"]
        for backend in ran:
            got = case.pick(case.run(backend))
            print(f"{case.op} {case.workload} {backend}")
            assert_within_budget(got, oracle, eager)


@torch.inference_mode()
def test_responsiveness_has_the_same_bits_every_time() -> None:
    (case,) = cases("frame_responsiveness", TURNS[1536])
    first = case.run("triton")
    for _ in range(20):
        assert torch.equal(case.run("triton"), first)
