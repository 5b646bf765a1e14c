"""Measures of images against the truth."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_psnr(prediction: Tensor, truth: Tensor, mask: Tensor | None = None) -> float:
    """PSNR in dB of uint8 frames [T, height, width, 3], over a mask [T, height, width] if given."""
    error = (prediction.float() - truth.float()).pow(2).mean(-1)
    value = error.mean() if mask is None else error[mask].mean()
    return float(10 * torch.log10(255**2 / value.clamp_min(1e-3)))
