"""Edits with known answers: the truth is perfect, other choices and damage show where they should.

T frames.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from mv2v_engine.errors import VideoError
from mv2v_engine.evaluation.editing_measures import MEASURES, EditMeasurer
from mv2v_engine.evaluation.instruction_agreement import found_pattern
from mv2v_engine.evaluation.seams import seam_flicker
from mv2v_engine.evaluation.window_agreement import window_of_frame
from mv2v_engine.synthetic.edit_clips import EditClip, make_edit_clip, other_choice
from mv2v_engine.synthetic.instructions import EditKind, Instruction

SIZE, FRAMES, STARTS = (48, 80), 24, (0, 8, 16)
# a seed whose target stays in view, of each kind
SEEDS: dict[EditKind, int] = {"colour": 1, "paint": 1, "pattern": 1, "hat": 1, "remove": 1}
OPEN: tuple[EditKind, ...] = ("colour", "paint", "pattern", "hat")


@pytest.fixture(scope="module")
def clips() -> dict[EditKind, EditClip]:
    return {
        kind: make_edit_clip(seed, num_frames=FRAMES, size=SIZE, kind=kind)
        for kind, seed in SEEDS.items()
    }


def independent(clip: EditClip, others: list[Tensor]) -> Tensor:
    """What a perfect editor of single windows gives: every window a valid choice of its own."""
    choices = [clip.edited.frames, *others]
    ends = (*STARTS[1:], FRAMES)
    return torch.cat([choice[a:b] for choice, a, b in zip(choices, STARTS, ends, strict=True)])


@pytest.mark.parametrize("kind", SEEDS)
def test_the_truth_is_perfect_and_the_source_is_not(
    clips: dict[EditKind, EditClip], kind: EditKind
) -> None:
    clip = clips[kind]
    truth = EditMeasurer(clip, STARTS).measure(clip.edited.frames)
    assert set(truth) == set(MEASURES)
    assert truth["agreement"] is not None and truth["agreement"] > 0.98
    assert truth["background_psnr"] is not None and truth["background_psnr"] > 70
    assert truth["background_error"] is not None and truth["background_error"] < 0.01
    assert truth["seam_ratio"] == pytest.approx(1, abs=0.1)
    if kind == "remove":  # nothing is left to agree on
        assert truth["subject_error"] is None
    else:
        assert truth["subject_error"] is not None and truth["subject_error"] < 0.06
    source = EditMeasurer(clip, STARTS).measure(clip.source.frames)
    assert source["agreement"] is not None and source["agreement"] < 0.05


@pytest.mark.parametrize("kind", SEEDS)
def test_a_decoders_blur_and_noise_change_no_verdict(
    clips: dict[EditKind, EditClip], kind: EditKind
) -> None:
    clip, generator = clips[kind], torch.Generator().manual_seed(0)

    def damaged(frames: Tensor) -> Tensor:
        planes = frames.permute(0, 3, 1, 2).float()
        blurred = torch.nn.functional.avg_pool2d(planes, 3, 1, 1, count_include_pad=False)
        noisy = blurred + 5 * torch.randn(blurred.shape, generator=generator)
        return noisy.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    edited = EditMeasurer(clip, STARTS).measure(damaged(clip.edited.frames))["agreement"]
    source = EditMeasurer(clip, STARTS).measure(damaged(clip.source.frames))["agreement"]
    assert edited is not None and edited > 0.85
    assert source is not None and source < 0.25


@pytest.mark.parametrize("kind", OPEN)
def test_independent_choices_follow_the_words_and_disagree(
    clips: dict[EditKind, EditClip], kind: EditKind
) -> None:
    clip = clips[kind]
    truth = EditMeasurer(clip, STARTS).measure(clip.edited.frames)
    others = [other_choice(clip, alternative).edited.frames for alternative in (1, 2)]
    other = EditMeasurer(clip, STARTS).measure(independent(clip, others))
    assert other["agreement"] is not None and other["agreement"] > 0.95
    assert other["background_psnr"] == pytest.approx(truth["background_psnr"], abs=0.01)
    assert other["background_error"] == pytest.approx(truth["background_error"], abs=1e-4)
    assert other["subject_error"] is not None and truth["subject_error"] is not None
    assert other["subject_error"] > max(3 * truth["subject_error"], 0.05)
    assert other["seam_ratio"] is not None and other["seam_ratio"] > 1.5
    # one other choice throughout is as good as the true one
    constant = EditMeasurer(clip, STARTS).measure(others[0])
    assert constant["subject_error"] is not None
    assert constant["subject_error"] < 0.5 * other["subject_error"]


def test_the_wrong_colour_agrees_with_itself_alone(clips: dict[EditKind, EditClip]) -> None:
    clip = clips["colour"]
    asked = clip.instruction.value
    wrong = "green" if asked != "green" else "red"
    other = Instruction(kind="colour", target=clip.instruction.target, value=wrong)
    misread = dataclasses.replace(clip, instruction=other)
    measures = EditMeasurer(misread, STARTS).measure(clip.edited.frames)
    assert measures["agreement"] == pytest.approx(0, abs=0.02)
    assert measures["subject_error"] is not None and measures["subject_error"] < 0.01


def test_damage_to_the_background_is_background_damage(clips: dict[EditKind, EditClip]) -> None:
    clip = clips["paint"]
    truth = EditMeasurer(clip, STARTS).measure(clip.edited.frames)
    frames = clip.edited.frames.clone()
    middle = frames[8:16]
    middle[~clip.mask[8:16]] = (middle[~clip.mask[8:16]].float() * 0.8).to(torch.uint8)
    got = EditMeasurer(clip, STARTS).measure(frames)
    for name in ("background_psnr", "background_error", "subject_error"):
        assert truth[name] is not None and got[name] is not None
    assert got["background_psnr"] < 30  # type: ignore[operator]
    assert got["background_error"] > truth["background_error"] + 0.02  # type: ignore[operator]
    assert got["subject_error"] == pytest.approx(truth["subject_error"], abs=1e-6)
    assert got["agreement"] == truth["agreement"]


def test_a_frozen_frame_is_still_and_far_from_the_truth(clips: dict[EditKind, EditClip]) -> None:
    clip = clips["remove"]
    frozen = clip.edited.frames[:1].expand_as(clip.edited.frames)
    got = EditMeasurer(clip, STARTS).measure(frozen)
    assert got["flicker"] == 1 and got["inner_flicker"] == 0
    assert got["background_psnr"] is not None and got["background_psnr"] < 35


def test_half_the_contrast_has_a_quarter_of_the_gradient_energy(
    clips: dict[EditKind, EditClip],
) -> None:
    clip = clips["hat"]
    measurer = EditMeasurer(clip, STARTS)
    faint = (clip.edited.frames.float() / 2).round().to(torch.uint8)
    energy = [measurer.measure(frames)["energy"] for frames in (clip.edited.frames, faint)]
    assert energy[0] is not None and energy[0] > 0
    assert energy[1] == pytest.approx(energy[0] / 4, rel=0.02)


def test_a_seam_shows_at_seams_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(60, 180, (24, 8, 8, 3), generator=generator, dtype=torch.uint8)
    smooth = seam_flicker(source, source, STARTS)
    assert smooth is not None and smooth.ratio == 1
    stepped = source.clone()
    stepped[8:16] += 20
    got = seam_flicker(stepped, source, STARTS)
    assert got is not None
    assert got.seam_residual == pytest.approx(20 / 255) and got.beside_residual == 0
    assert got.seam == pytest.approx(smooth.seam, abs=0.03)
    # a flicker of every frame is no seam
    everywhere = source + (torch.arange(24) % 2 * 20).to(torch.uint8)[:, None, None, None]
    even = seam_flicker(everywhere, source, STARTS)
    assert even is not None and even.ratio == pytest.approx(1)
    assert seam_flicker(source, source, (0,)) is None
    with pytest.raises(VideoError, match="got frames"):
        seam_flicker(source[1:], source, STARTS)


def test_windows_of_frames() -> None:
    assert window_of_frame(6, (0, 2, 5)).tolist() == [0, 0, 1, 1, 1, 2]
    with pytest.raises(ValueError, match="must start at 0 and ascend"):
        window_of_frame(6, (1, 2))
    with pytest.raises(ValueError, match="last window starts at 6 of 6"):
        window_of_frame(6, (0, 6))


def test_patterns_are_told_apart_from_points_and_colours() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(3000, 3, generator=generator) - 0.5
    points[:, 2] = 0.5  # a face
    red, white = torch.tensor([0.8, 0.1, 0.1]), torch.tensor([0.9, 0.9, 0.9])

    def toned(first: Tensor) -> Tensor:
        return torch.where(first[:, None], red, white)

    x, y, _ = (20 * points).sin().unbind(-1)
    assert found_pattern(
        toned((20 * (points[:, 0] + points[:, 1]) / 2**0.5).sin() > 0), points
    ) == ("striped")
    assert found_pattern(toned(y > 0), points) == "striped"
    assert found_pattern(toned(x * y > 0), points) == "checked"
    assert found_pattern(red.expand(3000, 3), points) == ""
    assert found_pattern(red + 0.05 * torch.rand(3000, 3, generator=generator), points) == ""


def test_frames_of_another_clip(clips: dict[EditKind, EditClip]) -> None:
    clip = clips["hat"]
    with pytest.raises(VideoError, match=r"an edit of this clip is uint8 \[24, 48, 80, 3\]"):
        EditMeasurer(clip, (0,)).measure(clip.edited.frames[:8])
    with pytest.raises(VideoError, match=r"got torch.float32"):
        EditMeasurer(clip, STARTS).measure(clip.edited.frames.float())
