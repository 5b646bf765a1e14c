"""The benchmarks' cases: right oracles, right bytes and FLOPs, on tiny shapes."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import ALL_MAKERS, ONCE
from op_cases import DTYPE, OpCase, plans
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mv2v_engine.ops.backend import OPS
from mv2v_engine.testing import assert_within_budget, relative_error
from mv2v_engine.tokens.flops import flop_table

CPU = torch.device("cpu")
(PLAN,) = plans(tiny=True)


def cases(op: str) -> list[OpCase]:
    return ALL_MAKERS[op](PLAN, CPU)


def test_every_operation_has_a_case() -> None:
    assert sorted(ALL_MAKERS) == sorted([*OPS, "linear_gelu"])
    assert list(ONCE) == ["fov_overlap"]


@pytest.mark.parametrize("op", ALL_MAKERS)
def test_the_oracle_is_the_operations(op: str) -> None:
    """The whole composition, its sample in float64 and the operation agree."""
    for case in cases(op):
        oracle = case.expected(torch.float64)
        backend = next(name for name, missing in case.backends.items() if missing is None)
        assert_within_budget(case.pick(case.run(backend)), oracle, case.expected(DTYPE))
        for whole in (case.functional, case.compilable):
            if whole is not None:
                assert relative_error(case.pick(whole()), oracle) < 1e-2
        assert relative_error(oracle.flip(-1), oracle) > 0.1  # something to be wrong about


def test_flops_are_the_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    # the counter does not know oneDNN's operation
    monkeypatch.setattr("mv2v_engine.ops.linear_gelu._HAS_BFLOAT16", False)
    flops = {case.op: sum(f for _, f in case.phases) for op in ALL_MAKERS for case in cases(op)}
    per_block = flop_table(PLAN, steps=())["self_attention"] // PLAN.shape.num_layers
    assert flops["attention"] == per_block
    for op in ("frame_responsiveness", "token_merge", "linear_gelu"):
        for case in cases(op):
            with FlopCounterMode(display=False) as counter:
                case.functional() if case.functional else case.run("reference")
            assert counter.get_total_flops() == sum(flops for _, flops in case.phases)


def test_bytes_are_inputs_and_outputs() -> None:
    tokens, width = PLAN.length, PLAN.shape.dim
    moved = {op: sum(moved for moved, _ in cases(op)[0].phases) for op in ALL_MAKERS}
    half = DTYPE.itemsize * tokens * width
    assert moved["gated_residual"] == 3 * half and moved["residual_norm"] == 4 * half
    assert moved["attention"] == 4 * half
    assert moved["qk_norm_rope"] == 2 * half + 4 * tokens * PLAN.shape.attention_head_dim
    frames = len(PLAN.frame_table)
    assert moved["adaln"] == 2 * half + DTYPE.itemsize * frames * width + 8 * tokens
    case, _ = cases("token_merge")
    out, turns = case.run("reference")
    inputs = PLAN.segments[1].length
    weight = DTYPE.itemsize * 4 * width**2
    assert moved["token_merge"] == weight + (inputs + out.shape[1]) * (
        DTYPE.itemsize * width + 4 * turns.shape[-1]
    )


@pytest.mark.parametrize("width", [1536, 3072])
def test_full_size_cases_fit_together(width: int) -> None:
    """On fake tensors: what a GPU would run first, without one."""
    plan = next(p for p in plans(tiny=False) if (p.num_memory, p.shape.dim) == (10, width))
    with FakeTensorMode(), torch.inference_mode():
        for op, make in ALL_MAKERS.items():
            for case in make(plan, CPU):
                assert (case.op.startswith(op), case.tokens, case.width) == (True, 105_378, width)
                expected = case.expected(torch.float64)
                backend = "auto" if "auto" in case.backends else "reference"
                assert case.pick(case.run(backend)).shape == expected.shape
                for whole in (case.functional, case.compilable):
                    assert whole is None or case.pick(whole()).shape == expected.shape


def test_full_size_plans_are_the_targets_shapes() -> None:
    full = [(plan.length, plan.shape.dim) for plan in plans(tiny=False)]
    lengths = (90_090, 65_520, 105_378)
    assert full == [(length, width) for width in (1536, 3072) for length in lengths]
    assert {plan.shape.attention_head_dim for plan in plans(tiny=False)} == {128}


def test_packed_requests_do_not_see_each_other() -> None:
    _, case = cases("attention")
    result: tuple[Tensor, Tensor] = case.run("auto")
    dense, _ = cases("attention")
    whole = dense.run("auto")[0]
    assert result[0].shape == whole.shape
    assert relative_error(result[0], whole) > 0.1 and math.isfinite(float(result[1].sum()))
