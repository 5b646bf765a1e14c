"""Muon for matrices and convolution filters, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class FilterMuon(torch.optim.Muon):
    """torch's Muon on convolution filters too, each as a matrix [out, in * kernel].

    The matrices share their filters' storage, so the module must be on its device already.
    """

    def __init__(self, filters: list[nn.Parameter], **options: Any) -> None:
        self._filters = filters
        matrices = [nn.Parameter(f.detach().view(len(f), -1)) for f in filters]
        super().__init__(matrices, adjust_lr_fn="match_rms_adamw", **options)

    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """One update; a filter without a gradient stays as it is."""
        for matrix, source in zip(self.param_groups[0]["params"], self._filters, strict=True):
            matrix.grad = None if source.grad is None else source.grad.reshape(matrix.shape)
        loss: float | None = super().step(closure)  # type: ignore[no-untyped-call]
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of the filters, and of the matrices that show them."""
        super().zero_grad(set_to_none)
        for source in self._filters:
            if set_to_none:
                source.grad = None
            elif source.grad is not None:
                source.grad.zero_()
