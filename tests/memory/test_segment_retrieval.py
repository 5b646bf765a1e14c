"""Segments by the look of their sources: cosine order, the last one first, shots kept apart."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.errors import RequestError
from mv2v_engine.memory.segment_retrieval import (
    SegmentKey,
    latent_descriptor,
    rank_segments,
    segment_scores,
)
from mv2v_engine.synthetic.render import render
from mv2v_engine.synthetic.worlds import make_world


def _clip(seed: int, camera: str) -> Tensor:
    return render(make_world(seed), named_trajectory(camera, 9, (48, 80))).frames


def at(degrees: float) -> Tensor:
    """A descriptor of this angle to the one at 0, of a length that must not matter."""
    turned = math.radians(degrees)
    return (1 + abs(degrees)) * torch.tensor([math.cos(turned), math.sin(turned), 0.0])


def key(number: int, degrees: float, shot: int = 0) -> SegmentKey:
    return SegmentKey(f"s/{number}", number, at(degrees), shot)


def test_scores_are_cosines() -> None:
    scores = segment_scores(at(0), [key(1, 60), key(2, 180), key(3, 0)])
    torch.testing.assert_close(scores, torch.tensor([0.5, -1, 1], dtype=torch.float64))


def test_the_last_segment_leads_and_the_others_follow_by_likeness() -> None:
    keys = [key(1, 10), key(2, 50), key(3, 5), key(4, 90)]
    found = rank_segments(at(0), keys, top_k=3)
    assert found.turns == (4, 3, 1) and found.ids == ("s/4", "s/3", "s/1")
    assert found.tokenizers == (4, 4, 4) and found.num_candidates == 4
    assert found.scores == pytest.approx([0, math.cos(math.radians(5)), math.cos(math.radians(10))])
    assert rank_segments(at(0), keys, top_k=3, recent_first=False).turns == (3, 1, 2)


def test_of_equal_likeness_the_most_recent_comes_first() -> None:
    keys = [key(number, 0) for number in (1, 2, 3, 4)]
    assert rank_segments(at(0), keys, top_k=4).turns == (4, 3, 2, 1)


def test_tokens_go_by_rank() -> None:
    keys = [key(number, number) for number in range(1, 7)]
    assert rank_segments(at(0), keys, top_k=5).tokenizers == (4, 4, 4, 8, 8)
    uniform = rank_segments(at(0), keys, top_k=5, tokenizers="uniform")
    assert uniform.tokenizers == (2,) * 5


def test_other_shots_stay_out_unless_they_look_alike() -> None:
    keys = [key(1, 0, shot=0), key(2, 40, shot=0), key(3, 70, shot=1)]
    assert rank_segments(at(0), keys, top_k=3, shot=1).turns == (3,)
    alike = rank_segments(at(0), keys, top_k=3, shot=1, cross_shot_similarity=0.9)
    assert alike.turns == (3, 1)  # the last one of its own shot still leads
    first = rank_segments(at(0), keys, top_k=3, shot=2)
    assert not first and first.reason == "this is the first segment of its shot"
    again = rank_segments(at(0), keys, top_k=3, shot=2, cross_shot_similarity=0.9)
    assert again.turns == (1,)


@given(st.lists(st.tuples(st.integers(-179, 180), st.integers(0, 2)), max_size=12))
def test_no_other_shots_segment_is_ever_taken(rows: list[tuple[int, int]]) -> None:
    keys = [key(number, degrees, shot) for number, (degrees, shot) in enumerate(rows, 1)]
    found = rank_segments(at(0), keys, top_k=4, shot=1)
    shots = {entry.id: entry.shot for entry in keys}
    assert all(shots[id] == 1 for id in found.ids)
    assert len(found) == min(4, sum(shot == 1 for _, shot in rows))


def test_nothing_to_remember() -> None:
    assert rank_segments(at(0), [], top_k=3).reason == "no segment has been edited yet"
    assert rank_segments(at(0), [key(1, 0)], top_k=0).reason is not None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.ones(4), r"of one length, got \[3\] and \[4\]"),
        (torch.zeros(3), "zero or not finite"),
        (torch.tensor([1, math.nan, 0]), "zero or not finite"),
    ],
)
def test_descriptors_that_cannot_be_compared(wrong: Tensor, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        segment_scores(at(0), [SegmentKey("s/1", 1, wrong)])
    with pytest.raises(RequestError, match="top_k must not be negative, got -1"):
        rank_segments(at(0), [], top_k=-1)


def test_two_views_of_a_world_are_more_alike_than_two_worlds() -> None:
    means = [
        F.avg_pool2d(c.permute(3, 0, 1, 2).float() - 128, 8)
        for c in (_clip(1, "static"), _clip(1, "tilt_up"), _clip(2, "static"))
    ]
    one, other_view, other_world = (latent_descriptor(m) for m in means)
    alike = F.cosine_similarity(one, other_view, dim=0)
    assert alike > F.cosine_similarity(one, other_world, dim=0)


def test_latents_of_any_length_and_size_compare() -> None:
    assert latent_descriptor(torch.randn(16, 5, 12, 20)).shape == (256,)
    assert latent_descriptor(torch.randn(16, 1, 3, 5)).shape == (256,)
    constant = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 2, 8, 8)
    assert torch.equal(latent_descriptor(constant), torch.arange(3.0).repeat_interleave(16))
    with pytest.raises(RequestError, match=r"\[C, F, H, W\], got \[1, 2, 3\]"):
        latent_descriptor(torch.zeros(1, 2, 3))
