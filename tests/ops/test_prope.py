"""PRoPE: groups of four channels times their frame's matrix, against loops in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mv2v_engine.ops.prope import prope
from mv2v_engine.testing import assert_within_budget

CASES = [  # batch, tokens, heads, head dim, channels, frames
    (1, 1, 1, 4, 4, 1),
    (2, 7, 3, 12, 12, 5),
    (2, 9, 3, 20, 8, 4),
    (3, 65, 5, 48, 24, 7),
]
Case = tuple[int, int, int, int, int, int]


def _inputs(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, heads, dim, _, frames = case
    torch.manual_seed(tokens)
    x = 2 * torch.randn(batch, tokens, heads, dim)
    # a translation is larger than a rotation's entries
    matrix = torch.randn(batch, frames, 4, 4) * torch.tensor([1.0, 1.0, 1.0, 3.0])
    return x.to(dtype), matrix, torch.randint(frames, (batch, tokens))


def _oracle(x: Tensor, matrix: Tensor, frame: Tensor, channels: int) -> Tensor:
    out = x.double()
    for b, token in torch.cartesian_prod(*map(torch.arange, frame.shape)).reshape(-1, 2).tolist():
        by = matrix[b, frame[b, token]].double()
        for first in range(0, channels, 4):
            for head in range(x.shape[2]):
                out[b, token, head, first : first + 4] = (
                    by @ x[b, token, head, first : first + 4].double()
                )
    return out


def _eager(x: Tensor, matrix: Tensor, frame: Tensor, channels: int) -> Tensor:
    rows = torch.stack([m[f] for m, f in zip(matrix, frame, strict=True)]).to(x.dtype)
    quads = x[..., :channels].unflatten(-1, (-1, 4))
    turned = (rows[:, :, None, None] @ quads[..., None]).flatten(-3)
    return torch.cat([turned, x[..., channels:]], -1)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case: Case, dtype: torch.dtype, backend: str) -> None:
    x, matrix, frame = _inputs(case, dtype)
    channels = case[4]
    got = prope(x, matrix, frame, channels=channels, backend=backend)
    assert got.shape == x.shape and got.dtype == dtype and got.is_contiguous()
    given = (x, matrix, frame, channels)
    assert_within_budget(got, _oracle(*given), _eager(*given))
    assert torch.equal(got[..., channels:], x[..., channels:])


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_strides_are_anyones(backend: str) -> None:
    """What attention gives lies head by head, and P^T is P with other strides."""
    x, matrix, frame = _inputs((2, 7, 3, 12, 12, 5))
    dense = prope(x, matrix.mT.contiguous(), frame, channels=8, backend=backend)
    by_head = x.transpose(1, 2).contiguous().transpose(1, 2)
    rows = torch.cat([torch.zeros(2, 5, 12), matrix.flatten(2)], -1)
    view = rows[..., 12:].unflatten(-1, (4, 4)).mT
    got = prope(by_head, view, frame.int(), channels=8, backend=backend)
    assert torch.equal(got, dense) and got.is_contiguous()


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_the_identity_changes_no_bit(backend: str) -> None:
    x, _, frame = _inputs((2, 9, 3, 20, 8, 4))
    identity = torch.eye(4).expand(2, 4, 4, 4)
    assert torch.equal(prope(x, identity, frame, channels=20, backend=backend), x)


def test_the_gradient_of_the_reference_is_by_the_transposed_matrix() -> None:
    x, matrix, frame = _inputs((2, 9, 3, 20, 8, 4))
    x.requires_grad_()
    gradient = torch.randn_like(x)
    prope(x, matrix, frame, channels=8).backward(gradient)
    assert x.grad is not None
    expected = prope(gradient, matrix.mT, frame, channels=8)
    torch.testing.assert_close(x.grad, expected)


def test_autocast_leaves_the_matrices_in_float32() -> None:
    x, matrix, frame = _inputs((2, 9, 3, 20, 8, 4))
    expected = prope(x, matrix, frame, channels=8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prope(x, matrix, frame, channels=8), expected)


def test_opcheck() -> None:
    given = _inputs((2, 7, 3, 12, 12, 5))
    torch.library.opcheck(torch.ops.mv2v.prope.default, (*given, 8))
