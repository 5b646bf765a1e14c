"""The operations of `csrc/cpu` on rows of tokens: float64 oracles, canaries, threads, refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mv2v_engine.errors import KernelUnavailableError
from mv2v_engine.ops import (
    adaln,
    backend,
    gated_residual,
    native,
    prope,
    qk_norm_rope,
    residual_norm,
)
from mv2v_engine.ops.backend import NATIVE_OPS, resolve
from mv2v_engine.testing import assert_within_budget
from tests.torch_state import num_threads

CPU = torch.device("cpu")
needs_library = pytest.mark.skipif(
    native.missing_reason("cpu") is not None, reason="libmv2v_cpu was not built"
)
CASES = [(1, 1, 1, 6), (2, 7, 3, 10), (1, 9, 3, 48), (3, 13, 1, 70), (2, 5, 2, 130)]
FORMS = ("adaln", "camera", "rows", "affine", "plain", "affine-rows", "gate", "gate-rows")
FORMS += ("turned", "turned-each", "normed", "prope", "prope-part")
GUARD = 64


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _case(
    form: str, shape: tuple[int, int, int, int] = (2, 7, 3, 10)
) -> tuple[Callable[..., Any], Callable[[torch.dtype], tuple[Tensor, ...]]]:
    """The operation by backend, and plain torch in a dtype. shape: batch, tokens, heads, dim."""
    batch, tokens, heads, dim = shape
    width = heads * dim
    torch.manual_seed(tokens)
    x, y = (3 * torch.randn(2, batch, tokens, width) + 1).unbind()
    x = x.transpose(0, 1).contiguous().transpose(0, 1)  # strided where there are samples
    gate, scale, shift = torch.randn(batch, 6, width).unbind(1)[:3]
    weight, bias = torch.randn(2, width).unbind()
    row = frame = None
    table = [gate[:, None], scale[:, None], shift[:, None]]
    if form.endswith("rows"):
        gate, scale, shift = torch.randn(3, 4, width).unbind()
        row = torch.randint(4, (batch, tokens), dtype=torch.int32)
        table = [each[row.long()] for each in (gate, scale, shift)]

    if form in ("adaln", "camera", "rows"):
        camera = torch.randn(batch, 5, width) if form == "camera" else None
        frame = torch.randint(5, (batch, tokens)) if form == "camera" else None

        def modulated(wide: torch.dtype) -> tuple[Tensor, ...]:
            out = _norm(x.to(wide)) * (1 + table[1].to(wide)) + table[2].to(wide)
            if camera is not None and frame is not None:
                out = out + torch.stack([c[f] for c, f in zip(camera, frame, strict=True)]).to(wide)
            return (out,)

        given: dict[str, Any] = {"camera": camera, "frame": frame, "row": row}
        return lambda name: adaln.adaln(x, scale, shift, **given, backend=name), modulated

    if form.startswith("gate"):

        def gated(wide: torch.dtype) -> tuple[Tensor, ...]:
            return (x.to(wide) + y.to(wide) * table[0].to(wide),)

        return lambda name: gated_residual.gated_residual(x, y, gate, row=row, backend=name), gated

    if form in ("plain", "affine", "affine-rows"):
        is_affine = form != "plain"
        vectors: dict[str, Any] = {"scale": scale, "shift": shift}
        if is_affine:
            vectors = {"gate": gate, "weight": weight, "shift": bias, "row": row}

        def summed(wide: torch.dtype) -> tuple[Tensor, ...]:
            by = table[0].to(wide) if is_affine else 1
            total = x.to(wide) + y.to(wide) * by
            gain, add = (weight, bias) if is_affine else (1 + table[1].to(wide), table[2])
            return total, _norm(total) * gain.to(wide) + add.to(wide)

        return lambda name: residual_norm.residual_norm(x, y, **vectors, backend=name), summed

    if form.startswith("prope"):
        dim = max(4 * (dim // 4), 4)
        channels = dim if form == "prope" else max(4 * (dim // 8), 4)
        heads_first = torch.randn(batch, heads, tokens, dim).transpose(1, 2)
        matrix, frame = torch.randn(batch, 5, 4, 4), torch.randint(5, (batch, tokens))

        def projected(wide: torch.dtype) -> tuple[Tensor, ...]:
            rows = torch.stack([m[f] for m, f in zip(matrix, frame, strict=True)]).to(wide)
            quads = heads_first.to(wide).unflatten(-1, (-1, 4))
            out = (rows[:, :, None, None] @ quads[..., None]).flatten(-3)
            return (torch.cat([out[..., :channels], heads_first[..., channels:].to(wide)], -1),)

        return (
            lambda name: prope.prope(heads_first, matrix, frame, channels=channels, backend=name),
            projected,
        )

    rope = None
    if form.startswith("turned"):
        rope = torch.randn(batch if form == "turned-each" else 1, tokens, dim)

    def turned(wide: torch.dtype) -> tuple[Tensor, ...]:
        out = F.rms_norm(x.to(wide), (width,), weight.to(wide), 1e-6).unflatten(-1, (heads, dim))
        if rope is not None:
            even, odd = out.unflatten(-1, (-1, 2)).unbind(-1)
            cos, sin = rope.to(wide)[:, :, None].chunk(2, -1)
            out = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
        return (out,)

    def run(name: str) -> Tensor:
        return qk_norm_rope.qk_norm_rope(x, weight, rope, num_heads=heads, backend=name)

    return run, turned


def _results(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@needs_library
@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_matches_float64(form: str, shape: tuple[int, int, int, int]) -> None:
    run, plain = _case(form, shape)
    got, registered = _results(run("native")), _results(run("auto"))
    outputs = zip(got, plain(torch.float64), plain(torch.float32), registered, strict=True)
    for value, oracle, eager, same in outputs:
        assert_within_budget(value, oracle, eager)
        assert torch.equal(value, same) and value.stride() == same.stride()


@needs_library
@pytest.mark.parametrize("form", FORMS)
def test_outputs_are_written_whole_and_nothing_around_them(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = _case(form)
    expected = _results(run("native"))
    buffers: list[Tensor] = []

    def poisoned(shape: Any) -> Tensor:
        buffer = torch.full((torch.Size(shape).numel() + 2 * GUARD,), float("nan"))
        buffers.append(buffer)
        return buffer[GUARD:-GUARD].view(shape)

    monkeypatch.setattr(torch, "empty_like", lambda x, **layout: poisoned(x.shape))
    monkeypatch.setattr(Tensor, "new_empty", lambda x, *shape: poisoned(shape))
    got = _results(run("native"))
    monkeypatch.undo()
    for value, other in zip(got, expected, strict=True):
        assert torch.equal(value, other)
    assert len(buffers) == len(expected)
    for buffer in buffers:
        assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all()


@needs_library
@pytest.mark.parametrize("form", FORMS)
def test_threads_change_no_bit(form: str) -> None:
    run, _ = _case(form, (2, 301, 3, 58))  # more rows than two threads' grain
    found = []
    for count in (1, 2, 3):
        with num_threads(count):
            found.append(torch.cat([each.flatten() for each in _results(run("native"))]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@needs_library
def test_an_index_outside_its_table_is_refused() -> None:
    x, vector, camera = torch.randn(1, 3, 4), torch.randn(1, 4), torch.randn(1, 2, 4)
    for index in (-1, 2):
        wrong = torch.tensor([[0, 1, index]])
        rows = torch.randn(2, 4)
        with pytest.raises(IndexError, match=r"adaln.*outside of its table"):
            adaln.adaln(x, vector, vector, camera=camera, frame=wrong, backend="native")
        with pytest.raises(IndexError, match=r"adaln.*outside of its table"):
            adaln.adaln(x, rows, rows, row=wrong, backend="native")
        with pytest.raises(IndexError, match=r"gated_residual.*outside of its table"):
            gated_residual.gated_residual(x, x, rows, row=wrong, backend="native")
        with pytest.raises(IndexError, match=r"residual_norm.*outside of its table"):
            residual_norm.residual_norm(x, x, scale=rows, shift=rows, row=wrong, backend="native")
        quads, matrix = x[:, :, None], torch.randn(1, 2, 4, 4)
        with pytest.raises(IndexError, match=r"prope.*outside of its table"):
            prope.prope(quads, matrix, wrong, channels=4, backend="native")


@needs_library
def test_gradients_and_other_dtypes_are_the_references() -> None:
    x, gate = torch.randn(2, 5, 12), torch.randn(2, 12)
    gradients = []
    for name in ("native", "reference"):
        leaf = x.clone().requires_grad_()
        gated_residual.gated_residual(x, leaf, gate, backend=name).square().sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0] is not None and torch.equal(gradients[0], gradients[1])  # type: ignore[arg-type]
    for dtype in (torch.bfloat16, torch.float64):
        narrow = x.to(dtype)
        assert torch.equal(
            gated_residual.gated_residual(narrow, narrow, gate, backend="native"),
            gated_residual.gated_residual(narrow, narrow, gate),
        )


@needs_library
def test_what_native_means_here() -> None:
    assert resolve("auto", CPU) == resolve("native", CPU) == "native"
    assert resolve("auto", CPU, torch.bfloat16) == "reference"
    with pytest.raises(KernelUnavailableError, match=r"'native'.*needs float32.*in bfloat16"):
        resolve("native", CPU, torch.bfloat16)
    with pytest.raises(KernelUnavailableError, match=r"'native'.*needs a CPU.*runs on cuda"):
        resolve("native", torch.device("cuda"))


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(native, "_library", lambda name: f"libmv2v_{name}.so lies on the moon")
    backend._looked_up.cache_clear()
    yield
    backend._looked_up.cache_clear()


@pytest.mark.parametrize("form", FORMS)
def test_without_the_library_the_reference_runs_or_the_reason_is_named(
    form: str, no_library: None
) -> None:
    run, _ = _case(form)
    for value, expected in zip(_results(run("auto")), _results(run("reference")), strict=True):
        assert torch.equal(value, expected)
    with pytest.raises(KernelUnavailableError, match=r"'native', but .* lies on the moon"):
        run("native")
    assert all(backend.missing_reason("native", op, CPU) for op in NATIVE_OPS)
    assert resolve("auto", CPU) == "reference"
    with pytest.raises(KernelUnavailableError, match=r"'native' was asked for, but .* the moon"):
        resolve("native", CPU)
