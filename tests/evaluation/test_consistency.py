"""Cross-turn consistency on true views, repainted where it should and should not count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.evaluation.consistency import Overlap, View, consistency, film, overlap
from mv2v_engine.synthetic.worlds import make_world

SIZE = (48, 80)


def _views(*specs: str) -> list[View]:
    world = make_world(5)
    source = film(world, named_trajectory("static", 3, SIZE))
    return [film(world, named_trajectory(spec, 3, SIZE), source) for spec in specs]


@pytest.fixture(scope="module")
def pair() -> tuple[View, View, Overlap]:
    earlier, later = _views("pan:18", "arc:-25")
    return earlier, later, overlap(later, earlier)


def _repainted(frames: Tensor, mask: Tensor, shift: int) -> Tensor:
    painted = frames.float()
    painted[mask] += shift
    return painted


def test_the_source_sees_all_of_itself() -> None:
    source = film(make_world(5), named_trajectory("static", 3, SIZE))
    assert source.seen.all()
    assert not overlap(source, source).is_measurable


def test_the_mask_is_invented_and_shared(pair: tuple[View, View, Overlap]) -> None:
    _, later, shared = pair
    assert shared.is_measurable
    assert not (shared.mask & later.seen).any()
    # the first frames are the source's own, and both cameras turn to the same side
    assert not shared.mask[0].any()
    assert shared.mask[2].sum() > 0.5 * (~later.seen[2]).sum()


def test_cameras_to_opposite_sides_share_no_invention() -> None:
    right, left = _views("pan:18", "pan:-18")
    assert not overlap(right, left).is_measurable


def test_true_views_agree_and_a_repainted_one_does_not(pair: tuple[View, View, Overlap]) -> None:
    earlier, later, shared = pair
    floor, floor_features = consistency(later.truth.frames, earlier.truth.frames, shared)
    assert floor < 0.03 and floor_features < 0.1
    everywhere = torch.ones_like(earlier.seen)
    # a grey that all colours can be moved from by 51 without leaving the scale
    grey = torch.full_like(later.truth.frames, 100)
    moved, _ = consistency(grey, _repainted(grey, everywhere, 51), shared)
    assert moved == pytest.approx(0.2, abs=1e-5)
    inverted = 255 - earlier.truth.frames.float()
    error, features = consistency(later.truth.frames, inverted, shared)
    assert error > 5 * floor and features > 1


def test_what_the_source_shows_does_not_count(pair: tuple[View, View, Overlap]) -> None:
    earlier, later, shared = pair
    plain = consistency(later.truth.frames, earlier.truth.frames, shared)
    elsewhere = _repainted(later.truth.frames, ~shared.mask, 60)
    assert consistency(elsewhere, earlier.truth.frames, shared) == pytest.approx(plain)
