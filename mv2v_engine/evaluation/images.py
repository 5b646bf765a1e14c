"""Measures of images: against the truth, against each other, and over time.

Frames are [T, height, width, 3] in 0..255, uint8 or float; a mask [T, height, width] says which
pixels count. T frames.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WINDOW = 7  # pixels; the neighbourhood of a local measure


def masked_psnr(prediction: Tensor, truth: Tensor, mask: Tensor | None = None) -> float:
    """PSNR in dB of uint8 frames [T, height, width, 3], over a mask [T, height, width] if given."""
    error = (prediction.float() - truth.float()).pow(2).mean(-1)
    value = error.mean() if mask is None else error[mask].mean()
    return float(10 * torch.log10(255**2 / value.clamp_min(1e-3)))


def masked_l1(first: Tensor, second: Tensor, mask: Tensor) -> float:
    """Mean absolute difference of the masked pixels, as a share of full scale (0..1)."""
    return float((first.float() - second.float()).abs()[mask].mean() / 255)


def gradient_energy(frames: Tensor, mask: Tensor | None = None) -> float:
    """Sum of the squared steps from a pixel to the next one, to the right and down, of full scale 1
    and averaged over colours.

    mask: [T, height, width], both pixels of a step lie in it.
    """
    total = 0.0
    for axis in (1, 2):
        steps = (frames.float() / 255).diff(dim=axis).pow(2).mean(-1)
        if mask is not None:
            length = mask.shape[axis] - 1
            steps = steps[mask.narrow(axis, 0, length) & mask.narrow(axis, 1, length)]
        total += float(steps.sum(dtype=torch.float64))
    return total


def flicker(frames: Tensor) -> float:
    """VBench's temporal flickering, (255 - mean |change|) / 255: 1 is a still picture."""
    return float(1 - (frames[1:].float() - frames[:-1].float()).abs().mean() / 255)


def structural_similarity(prediction: Tensor, truth: Tensor) -> float:
    """Mean SSIM (Wang et al. 2004) of the colour channels over 7x7 windows; 1 is identical."""
    a, b = (_channels(frames) / 255 for frames in (prediction, truth))
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    variance_a = _window_mean(a * a) - mean_a**2
    variance_b = _window_mean(b * b) - mean_b**2
    covariance = _window_mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similar = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similar = similar / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))
    return float(similar.mean())


def feature_distance(first: Tensor, second: Tensor, mask: Tensor) -> float:
    """Mean 1 - cosine of the masked pixels' features, 0 (alike) to 2 (opposite).

    A pixel's feature is the vector of colours, from mid-grey, of the masked pixels in the 7x7
    window around it: what is drawn there, with little regard to contrast. It needs no network.
    """
    weight = mask[:, None].float()
    a, b = ((_channels(frames) / 255 - 0.5) * weight for frames in (first, second))
    dot, norm_a, norm_b = (
        _window_mean(product.sum(1, keepdim=True), padding=_WINDOW // 2)
        for product in (a * b, a * a, b * b)
    )
    # two windows of pure mid-grey are alike
    cosine = (dot + 1e-8) / ((norm_a + 1e-8) * (norm_b + 1e-8)).sqrt()
    return float(1 - cosine[:, 0][mask].mean())


def _channels(frames: Tensor) -> Tensor:
    return frames.permute(0, 3, 1, 2).float()


def box_mean(image: Tensor, width: int, *, padding: int = 0) -> Tensor:
    """Mean over `width` x `width` windows of [N, C, height, width]; pixels outside are zero."""
    pool = torch.nn.functional.avg_pool2d
    # one axis after the other: 2 * width terms a pixel instead of width squared
    down = pool(image, (width, 1), stride=1, padding=(padding, 0))
    return pool(down, (1, width), stride=1, padding=(0, padding))


def _window_mean(image: Tensor, *, padding: int = 0) -> Tensor:
    return box_mean(image, _WINDOW, padding=padding)
