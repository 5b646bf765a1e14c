"""x + y * gate and the next norm: float64 oracle, odd sizes, both gains, the registered op."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mv2v_engine.ops.adaln import adaln
from mv2v_engine.ops.gated_residual import gated_residual
from mv2v_engine.ops.residual_norm import residual_norm
from mv2v_engine.testing import assert_within_budget

CASES = [(1, 1, 2), (2, 7, 35), (3, 10, 24)]
FORMS = ["scale", "gate-scale", "gate-weight"]


def _inputs(
    shape: tuple[int, int, int], form: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    torch.manual_seed(sum(shape))
    x, y = torch.randn(2, *shape).to(dtype).unbind()
    gate, scale, shift = torch.randn(3, shape[0], shape[2]).unbind()
    vectors = {"scale": scale, "shift": shift}
    if form == "gate-weight":
        vectors = {"weight": scale[0], "shift": shift[0]}
    return x, y, vectors | ({"gate": gate} if form.startswith("gate") else {})


def _sum(x: Tensor, y: Tensor, gate: Tensor | None = None, **_: Tensor) -> Tensor:
    return x + (y if gate is None else y * gate.to(y.dtype)[:, None])


def _norm(s: Tensor, shift: Tensor, **gain: Tensor) -> Tensor:
    factor = gain["weight"] if "weight" in gain else (1 + gain["scale"])[:, None]
    shift = shift if "weight" in gain else shift[:, None]
    normed = torch.nn.functional.layer_norm(s, s.shape[-1:], eps=1e-6)
    return normed * factor.to(s.dtype) + shift.to(s.dtype)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_matches_float64(
    shape: tuple[int, int, int], form: str, dtype: torch.dtype, backend: str
) -> None:
    x, y, vectors = _inputs(shape, form, dtype)
    total, hidden = residual_norm(x, y, **vectors, backend=backend)
    assert total.dtype == hidden.dtype == dtype
    assert_within_budget(total, _sum(x.double(), y.double(), **vectors), _sum(x, y, **vectors))
    # the norm is of the sum as it was rounded
    assert_within_budget(hidden, _norm(total.double(), **vectors), _norm(total, **vectors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_of_the_operations_it_stands_for(dtype: torch.dtype) -> None:
    x, y, vectors = _inputs((2, 7, 35), "gate-scale", dtype)
    gate, scale, shift = vectors["gate"], vectors["scale"], vectors["shift"]
    gated, plain = gated_residual(x, y, gate), x + y
    for expected, got in (
        (gated, residual_norm(x, y, gate=gate, scale=scale, shift=shift)),
        (plain, residual_norm(x, y, scale=scale, shift=shift)),
    ):
        assert torch.equal(got[0], expected)
        assert torch.equal(got[1], adaln(expected, scale, shift))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_strided_tokens(backend: str) -> None:
    x, y, vectors = _inputs((2, 9, 12), "gate-scale")
    parts = residual_norm(x[:, 2:7], y[:, 2:7], **vectors, backend=backend)
    whole = residual_norm(x, y, **vectors, backend=backend)
    for part, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, expected[:, 2:7])


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form: str) -> None:
    x, y, vectors = _inputs((2, 7, 12), form)
    names = ("gate", "scale", "weight", "shift")
    arguments = (x, y, *(vectors.get(name) for name in names), None, 1e-6)
    torch.library.opcheck(torch.ops.mv2v.residual_norm.default, arguments)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    torch.library.opcheck(torch.ops.mv2v.residual_norm.default, (strided, *arguments[1:]))
