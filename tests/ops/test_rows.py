"""Modulation by rows that every token names: float64 oracle, and the bits of each sample alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine.ops.adaln import adaln
from mv2v_engine.ops.gated_residual import gated_residual
from mv2v_engine.ops.residual_norm import residual_norm
from mv2v_engine.testing import assert_within_budget

Op = Callable[..., Tensor]


def _modulated(x: Tensor, y: Tensor, **vectors: Any) -> Tensor:
    vectors.pop("gate")
    return adaln(x, **vectors)


def _gated(x: Tensor, y: Tensor, **vectors: Any) -> Tensor:
    kept = {name: vectors[name] for name in ("gate", "row", "backend") if name in vectors}
    return gated_residual(x, y, **kept)


def _normed(x: Tensor, y: Tensor, **vectors: Any) -> Tensor:
    return torch.cat(residual_norm(x, y, **vectors), -1)


def _affine(x: Tensor, y: Tensor, **vectors: Any) -> Tensor:
    """With a gate by rows and a LayerNorm's own weight and shift."""
    del vectors["scale"], vectors["shift"]
    weight, shift = torch.linspace(0, 2, 2 * x.shape[-1]).chunk(2)
    return torch.cat(residual_norm(x, y, weight=weight, shift=shift, **vectors), -1)


OPS: dict[str, Op] = {"adaln": _modulated, "gated": _gated, "norm": _normed, "affine": _affine}
CASES = [(1, 1, 1, 2), (2, 13, 5, 35), (1, 9, 3, 24)]  # batch, tokens, rows, width


def _inputs(
    batch: int, tokens: int, rows: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    torch.manual_seed(tokens)
    x, y = torch.randn(2, batch, tokens, width).to(dtype).unbind()
    gate, scale, shift = torch.randn(3, rows, width).unbind()
    row = torch.randint(rows, (batch, tokens))
    return x, y, {"gate": gate, "scale": scale, "shift": shift, "row": row}


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case: tuple[int, int, int, int], dtype: torch.dtype, backend: str) -> None:
    x, y, vectors = _inputs(*case, dtype)

    def plain(wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        gate, scale, shift = (vectors[n][vectors["row"]].to(wide) for n in vectors if n != "row")
        total = x.to(wide) + y.to(wide) * gate
        modulated, normed = (
            torch.nn.functional.layer_norm(t.to(wide), t.shape[-1:], eps=1e-6) * (1 + scale) + shift
            for t in (x, gated_residual(x, y, vectors["gate"], row=vectors["row"]))
        )
        return modulated, total, normed

    got = _modulated(x, y, **vectors, backend=backend)
    total, normed = _normed(x, y, **vectors, backend=backend).chunk(2, -1)
    results = (got, _gated(x, y, **vectors, backend=backend), normed)
    for value, oracle, eager in zip(results, plain(torch.float64), plain(dtype), strict=True):
        assert_within_budget(value, oracle, eager)
    assert torch.equal(total, results[1])


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_a_sample_of_a_pack_has_its_own_bits(op: str, dtype: torch.dtype, backend: str) -> None:
    x, y, vectors = _inputs(1, 12, 3, 35, dtype)
    lengths = (5, 1, 6)
    vectors["row"] = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None]
    packed = OPS[op](x, y, **vectors, backend=backend)
    del vectors["row"]
    parts = zip(x.split(lengths, 1), y.split(lengths, 1), packed.split(lengths, 1), strict=True)
    for index, (own_x, own_y, got) in enumerate(parts):
        own = {name: vector[index : index + 1] for name, vector in vectors.items()}
        assert torch.equal(got, OPS[op](own_x, own_y, **own, backend=backend))


@pytest.mark.parametrize("op", OPS)
def test_strides_opcheck_and_compile(op: str) -> None:
    x, y, vectors = _inputs(2, 6, 4, 10)
    expected = OPS[op](x, y, **vectors, backend="auto")
    strided = {
        name: vector.transpose(0, 1).contiguous().transpose(0, 1)
        for name, vector in vectors.items()
    }
    assert torch.equal(OPS[op](x, y, **strided, backend="auto"), expected)

    def run(x: Tensor) -> Tensor:
        return OPS[op](x, y, **vectors, backend="auto")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    gate, scale, shift, row = vectors.values()
    namespace = torch.ops.mv2v
    for packet, arguments in (
        (namespace.adaln, (x, scale, shift, None, None, row, 1e-6)),
        (namespace.gated_residual, (x, y, gate, row)),
        (namespace.residual_norm, (x, y, gate, scale, None, shift, row, 1e-6)),
    ):
        if op in packet.__name__:
            torch.library.opcheck(packet.default, arguments)


@pytest.mark.parametrize("op", OPS)
def test_rejects_bad_rows(op: str) -> None:
    x, y, vectors = _inputs(2, 6, 4, 10)
    bad: list[tuple[dict[str, Tensor], type[Exception], str]] = [
        ({"row": vectors["row"].float()}, TypeError, "row must be int32 or int64"),
        ({"row": vectors["row"].to("meta")}, ValueError, "row must be on cpu"),
        ({"row": vectors["row"][:, :5]}, ValueError, r"row must have shape \(2, 6\), got \(2, 5\)"),
        ({"gate": vectors["gate"][:, :5]}, ValueError, r"gate must have shape \(4, 10\), all of"),
        ({"shift": vectors["shift"][:3]}, ValueError, r"shift must have shape \(4, 10\), all of"),
    ]
    for change, error, message in bad:
        name = next(iter(change))
        is_used = {"adaln": "scale shift", "gated": "gate", "affine": "gate"}.get(op, name)
        if name == "row" or name in is_used:
            with pytest.raises(error, match=message):
                OPS[op](x, y, **vectors | change)
