"""Muon on filters is Muon on the matrices they flatten to."""

from __future__ import annotations

import torch
from torch import nn

from mv2v_engine.training.optimizers import FilterMuon

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}


def _filters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 4, 3, 3, 3), (4, 6, 1, 1), (5, 4, 3, 3)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def _gradients(step: int, filters: list[nn.Parameter]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(f.shape, generator=generator) for f in filters]


def test_filters_move_as_their_matrices_do() -> None:
    filters, start = _filters(), _filters()
    matrices = [nn.Parameter(f.detach().clone().flatten(1)) for f in filters]
    ours = FilterMuon(filters, **OPTIONS)
    theirs = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **OPTIONS)
    for step in range(3):
        for filter_, matrix, gradient in zip(
            filters, matrices, _gradients(step, filters), strict=True
        ):
            filter_.grad, matrix.grad = gradient, gradient.flatten(1)
        ours.step()
        theirs.step()
        ours.zero_grad()
    for filter_, matrix, first in zip(filters, matrices, start, strict=True):
        assert torch.equal(filter_.flatten(1), matrix)
        assert not torch.equal(filter_, first) and filter_.grad is None


def test_a_filter_without_gradient_stays() -> None:
    filters = _filters()
    optimizer = FilterMuon(filters, **OPTIONS)
    filters[0].grad = torch.ones_like(filters[0])
    optimizer.step()
    assert torch.equal(filters[1], _filters()[1])
    assert not torch.equal(filters[0], _filters()[0])


def test_its_state_goes_on_where_it_stood() -> None:
    runs = []
    for interrupted in (False, True):
        filters = _filters()
        optimizer = FilterMuon(filters, **OPTIONS)
        for step in range(4):
            if interrupted and step == 2:
                state = optimizer.state_dict()
                optimizer = FilterMuon(filters, **OPTIONS)
                optimizer.load_state_dict(state)
            for filter_, gradient in zip(filters, _gradients(step, filters), strict=True):
                filter_.grad = gradient
            optimizer.step()
        runs.append(filters)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
