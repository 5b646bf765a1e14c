"""Editing pairs: what is outside the masks is the same picture, what is inside is the edit."""

from __future__ import annotations

import pytest
import torch

from mv2v_engine.synthetic.edit_clips import (
    EditClip,
    grown,
    make_cut_clip,
    make_edit_clip,
    other_choice,
)
from mv2v_engine.synthetic.instructions import KINDS, EditKind, Instruction
from mv2v_engine.synthetic.render import render, render_changes
from mv2v_engine.synthetic.worlds import NUM_WALLS

SIZE, FRAMES = (48, 80), 6


def _clip(kind: EditKind, seed: int = 3) -> EditClip:
    return make_edit_clip(seed, num_frames=FRAMES, size=SIZE, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_outside_the_mask_nothing_changes(kind: EditKind) -> None:
    clip = _clip(kind)
    assert clip.source.frames.shape == clip.edited.frames.shape == (FRAMES, *SIZE, 3)
    assert clip.instruction.kind == kind and clip.prompt == clip.instruction.prompt
    outside = ~grown(clip.mask, 1)
    assert torch.equal(clip.source.frames[outside], clip.edited.frames[outside])
    assert torch.equal(clip.source.depth[~clip.mask], clip.edited.depth[~clip.mask])
    change = (clip.source.frames.float() - clip.edited.frames.float()).abs().mean(-1)
    assert float((change[clip.mask] > 12).float().mean()) > 0.5
    assert bool(clip.source_mask.any()) == (kind != "hat")
    assert bool(clip.edited_mask.any()) == (kind != "remove")


@pytest.mark.parametrize("kind", KINDS)
def test_the_edited_clip_is_the_edited_world(kind: EditKind) -> None:
    clip = _clip(kind)
    whole = render(clip.edit.world, clip.camera)
    assert torch.equal(whole.surface, clip.edited.surface)
    assert torch.equal(whole.depth, clip.edited.depth)
    # slivers thinner than a pixel, of which no centre is met, may keep the source's colour
    differs = (whole.frames != clip.edited.frames).any(-1)
    assert float(differs.float().mean()) < 2e-3


def test_changes_outside_of_where_are_not_filmed() -> None:
    clip = _clip("paint")
    nowhere = torch.zeros_like(clip.mask)
    same = render_changes(clip.edit.world, clip.camera, clip.source, nowhere)
    assert torch.equal(same.frames, clip.source.frames)
    half = nowhere.clone()
    half[:, :, :40] = True
    left = render_changes(clip.edit.world, clip.camera, clip.source, half)
    assert torch.equal(left.frames[:, :, 40:], clip.source.frames[:, :, 40:])
    everywhere = render_changes(clip.edit.world, clip.camera, clip.source, ~nowhere)
    assert torch.equal(everywhere.frames, render(clip.edit.world, clip.camera).frames)


def test_a_seed_is_a_pair() -> None:
    first, again, other = (make_edit_clip(seed, num_frames=3, size=SIZE) for seed in (8, 8, 9))
    assert first.instruction == again.instruction
    assert torch.equal(first.edited.frames, again.edited.frames)
    assert not torch.equal(first.source.frames, other.source.frames)


def test_another_choice_is_another_edit_of_the_same_source() -> None:
    clip = _clip("colour")
    other = other_choice(clip, 1)
    assert torch.equal(other.source.frames, clip.source.frames)
    assert other.instruction == clip.instruction
    assert torch.equal(other.mask, clip.mask)
    assert not torch.equal(other.edited.frames, clip.edited.frames)
    assert torch.equal(other_choice(clip, 0).edited.frames, clip.edited.frames)


def test_instructions_are_of_every_kind_and_fit_the_world() -> None:
    instructions: list[Instruction] = []
    for seed in range(40):
        clip = make_edit_clip(seed, num_frames=1, size=(6, 10))
        instructions.append(clip.instruction)
        if clip.instruction.target not in ("back wall", "floor"):
            assert clip.instruction.target in clip.edit_world.target_phrases
            assert clip.edit.changed in ((), (NUM_WALLS,))
            assert clip.instruction.value != clip.edit_world.looks[0].colour
    assert {instruction.kind for instruction in instructions} == set(KINDS)
    assert {instruction.phrasing for instruction in instructions} == {0, 1, 2, 3}


def test_shots_share_a_prompt_and_nothing_else() -> None:
    shots = make_cut_clip(2, (4, 3), size=SIZE, kind="hat")
    assert [shot.num_frames for shot in shots] == [4, 3]
    assert shots[0].instruction == shots[1].instruction
    for shot in shots:
        assert shot.instruction.target in shot.edit_world.target_phrases
    before, after = shots[0].source.frames[-1].float(), shots[1].source.frames[0].float()
    inside = (shots[0].source.frames[1:].float() - shots[0].source.frames[:-1].float()).abs()
    assert float((before - after).abs().mean()) > 2.5 * float(inside.mean())
