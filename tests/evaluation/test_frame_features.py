"""DINO-F and CLIP-F by cosines that are known."""

from __future__ import annotations

import pytest
import torch

from mv2v_engine.evaluation.frame_features import frame_consistency


def test_the_score_is_the_mean_of_two_cosines() -> None:
    turned = torch.tensor([[2.0, 0.0], [0.6, 0.8], [0.0, 5.0]])
    # with the frame before: 0.6, 0.8; with the first: 0.6, 0
    assert frame_consistency(turned) == pytest.approx((0.6 + 0.8 + 0.6 + 0.0) / 4)


def test_a_still_clip_is_perfect_and_opposites_count_as_nothing() -> None:
    still = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)).expand(5, -1)
    assert frame_consistency(still) == pytest.approx(1, abs=1e-6)
    assert frame_consistency(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == 0
    assert frame_consistency(still[:1]) is None
