"""Image measures against values that can be worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mv2v_engine.evaluation.images import (
    feature_distance,
    flicker,
    gradient_energy,
    masked_l1,
    masked_psnr,
    structural_similarity,
)


def noise(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (2, 16, 20, 3), generator=generator, dtype=torch.uint8)


def left_half() -> Tensor:
    mask = torch.zeros(2, 16, 20, dtype=torch.bool)
    mask[..., :10] = True
    return mask


def test_psnr_is_exact_on_a_known_error() -> None:
    truth = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    wrong = truth.clone()
    wrong[1] = 51
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[1] = True
    assert abs(masked_psnr(wrong, truth, mask) - 13.9794) < 1e-3
    assert abs(masked_psnr(wrong, truth) - 16.9897) < 1e-3


def test_l1_counts_masked_pixels_alone() -> None:
    truth = torch.full((2, 16, 20, 3), 100, dtype=torch.uint8)
    wrong = truth.clone()
    wrong[..., :10, :] = 151
    wrong[..., 10:, :] = 0
    assert masked_l1(wrong, truth, left_half()) == pytest.approx(0.2)
    assert masked_l1(truth, wrong, left_half()) == pytest.approx(0.2)


def test_flicker_of_a_step() -> None:
    still = noise()[:1].expand(3, -1, -1, -1)
    assert flicker(still) == 1.0
    steps = torch.tensor([0, 51, 51], dtype=torch.uint8)[:, None, None, None].expand(3, 4, 4, 3)
    assert flicker(steps) == pytest.approx(1 - 0.1)


def test_gradient_energy_of_an_edge() -> None:
    frames = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    frames[:, :, 2:] = 51
    # 4 of each frame's 24 steps, those across the edge, are a fifth of the scale
    assert gradient_energy(frames) == pytest.approx(0.2**2 * 8)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 0, 1:] = True
    # both pixels of a step lie within
    assert gradient_energy(frames, mask) == pytest.approx(0.2**2)
    mask[0, 0, 1] = False
    assert gradient_energy(frames, mask) == 0


def test_ssim_of_flat_pictures_is_the_luminance_term() -> None:
    a, b = (torch.full((1, 9, 9, 3), value, dtype=torch.uint8) for value in (51, 102))
    c1 = 0.01**2
    expected = (2 * 0.2 * 0.4 + c1) / (0.2**2 + 0.4**2 + c1)
    assert structural_similarity(a, b) == pytest.approx(expected, abs=1e-4)
    assert structural_similarity(noise(), noise()) == pytest.approx(1.0, abs=1e-4)
    assert structural_similarity(noise(), noise(1)) < 0.1


def test_features_see_what_is_drawn_not_its_contrast() -> None:
    frames, mask = noise().float(), torch.ones(2, 16, 20, dtype=torch.bool)
    assert feature_distance(frames, frames, mask) == pytest.approx(0, abs=1e-5)
    faint = 127.5 + 0.5 * (frames - 127.5)
    assert feature_distance(frames, faint, mask) == pytest.approx(0, abs=1e-5)
    assert feature_distance(frames, 255 - frames, mask) == pytest.approx(2, abs=1e-5)
    assert feature_distance(frames, noise(1).float(), mask) > 0.5


def test_features_do_not_look_outside_the_mask() -> None:
    frames, other = noise().float(), noise().float()
    other[..., 10:, :] = noise(1)[..., 10:, :].float()
    assert feature_distance(frames, other, left_half()) == pytest.approx(0, abs=1e-5)
    assert feature_distance(frames, other, ~left_half()) > 0.5
