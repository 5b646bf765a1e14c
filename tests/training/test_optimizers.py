"""Muon is torch's, on filters too, at any precision of its products."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mv2v_engine.testing import relative_error
from mv2v_engine.training import optimizers
from mv2v_engine.training.optimizers import Muon

SHAPES = [(6, 4, 3, 3, 3), (40, 4), (4, 6, 1, 1), (5, 4, 3, 3), (40, 4)]


def _filters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def _gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filters_move_as_torchs_muon_moves_their_matrices(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "compute_dtype", lambda _: dtype)
    filters, start = _filters(), _filters()
    matrices = [nn.Parameter(f.detach().clone().flatten(1)) for f in filters]
    ours = Muon(filters, lr=1e-2, weight_decay=0.1)
    theirs = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        for filter_, matrix, gradient in zip(filters, matrices, _gradients(step), strict=True):
            filter_.grad, matrix.grad = gradient, gradient.flatten(1)
        ours.step()
        theirs.step()
    for filter_, matrix, first in zip(filters, matrices, start, strict=True):
        moved = (filter_ - first).detach()
        expected = (matrix.view_as(first) - first).detach()
        # theirs rounds to bfloat16 at every product
        assert relative_error(moved, expected) < 0.02
        assert moved.abs().max() > 0


def test_what_has_no_gradient_stays_as_it_is() -> None:
    filters, start = _filters(), _filters()
    optimizer = Muon(filters, lr=1e-2, weight_decay=0.1)
    filters[0].grad = _gradients(0)[0]
    optimizer.step()
    optimizer.zero_grad()
    assert not torch.equal(filters[0], start[0]) and filters[0].grad is None
    assert all(torch.equal(now, then) for now, then in zip(filters[1:], start[1:], strict=True))
