"""Edits change what they name and nothing else, and what words leave open follows the choice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mv2v_engine.synthetic.colours import COLOUR_NAMES, colour_index
from mv2v_engine.synthetic.edit_worlds import make_edit_world
from mv2v_engine.synthetic.edits import TARGET, Edit, apply_edit
from mv2v_engine.synthetic.instructions import Instruction
from mv2v_engine.synthetic.worlds import NUM_WALLS, World

SEEDS = range(12)


def _world(seed: int) -> World:
    return make_edit_world(seed, num_frames=34).world


def _colours(edit: Edit, surface: int = TARGET) -> Tensor:
    textures = edit.world.textures
    return torch.stack([textures.colour_a_S3[surface], textures.colour_b_S3[surface]])


@pytest.mark.parametrize(
    ("kind", "target", "value", "surface"),
    [
        ("colour", "sphere", "green", TARGET),
        ("paint", "sphere", "", TARGET),
        ("paint", "back wall", "", 5),
        ("colour", "floor", "blue", 4),
        ("pattern", "sphere", "checked", TARGET),
    ],
)
def test_a_surface_changes_alone(kind: str, target: str, value: str, surface: int) -> None:
    world = _world(1)
    edit = apply_edit(world, Instruction(kind=kind, target=target, value=value), 7)  # type: ignore[arg-type]
    assert (edit.changed, edit.added, edit.removed) == ((surface,), (), ())
    others = torch.arange(NUM_WALLS + len(world.kind_N)) != surface
    for name, value_before in vars(world.textures).items():
        after = getattr(edit.world.textures, name)
        assert torch.equal(after[others], value_before[others])
    assert not torch.equal(_colours(edit, surface), _colours(Edit(world), surface))
    assert torch.equal(edit.world.centre_N3, world.centre_N3)


def test_a_named_colour_is_that_colour_and_a_new_one_is_new() -> None:
    for seed in SEEDS:
        world = _world(seed)
        red = apply_edit(world, Instruction(kind="colour", target="sphere", value="red"), seed)
        assert colour_index(_colours(red)).tolist() == [COLOUR_NAMES.index("red")] * 2
        new = apply_edit(world, Instruction(kind="paint", target="floor"), seed)
        change = _colours(new, 4).mean(0) - _colours(Edit(world), 4).mean(0)
        assert float(change.abs().mean()) >= 0.2


def test_the_choice_is_seeded_and_open() -> None:
    world = _world(3)
    for kind, value in (("colour", "blue"), ("paint", ""), ("pattern", "striped"), ("hat", "")):
        instruction = Instruction(kind=kind, target="sphere", value=value)  # type: ignore[arg-type]
        edits = [apply_edit(world, instruction, choice) for choice in (5, 5, *range(20, 30))]
        surface = NUM_WALLS + len(world.kind_N) if kind == "hat" else TARGET
        colours = torch.stack([_colours(edit, surface) for edit in edits])
        assert torch.equal(colours[0], colours[1])
        assert float(colours[2:].std(0).mean()) > 0.05, kind


def test_patterns_have_two_tones() -> None:
    for seed in SEEDS:
        world = _world(seed)
        for value in ("striped", "checked"):
            edit = apply_edit(
                world, Instruction(kind="pattern", target="box", value=value), seed + 50
            )
            own, other = _colours(edit)
            assert torch.equal(own, world.textures.colour_a_S3[TARGET])
            assert float((own - other).abs().mean()) >= 0.3


def test_a_hat_sits_on_its_wearer_and_goes_with_it() -> None:
    for seed in SEEDS:
        world = _world(seed)
        edit = apply_edit(world, Instruction(kind="hat", target="box"), seed)
        assert edit.added[0] == NUM_WALLS + len(world.kind_N) and not edit.changed
        hat = torch.tensor(edit.added) - NUM_WALLS
        after, half = edit.world, edit.world.half_size_N3
        top = float(world.centre_N3[0, 1] - world.half_size_N3[0, 1])
        bottom = float((after.centre_N3[hat, 1] + half[hat, 1]).max())
        # y points down; on balls a hat sits a little lower
        assert top - 0.01 <= bottom <= top + 0.4
        for name in ("swing_N3", "rate_N", "phase_N", "spin_N", "yaw_N"):
            worn, wearer = getattr(after, name)[hat], getattr(world, name)[:1]
            assert torch.equal(worn, wearer.expand_as(worn))
        assert torch.equal(
            after.centre_N3[hat][:, [0, 2]], world.centre_N3[[0] * len(hat)][:, [0, 2]]
        )
        assert float(after.centre_N3[hat, 1].max()) < top + 0.2


def test_a_removed_object_is_out_of_the_room() -> None:
    world = _world(2)
    edit = apply_edit(world, Instruction(kind="remove", target="box"), 0)
    assert edit.removed == (TARGET,)
    assert float(edit.world.centre_N3[0, 1]) > float(world.room_max_3[1]) + 100
    assert torch.equal(edit.world.centre_N3[1:], world.centre_N3[1:])
