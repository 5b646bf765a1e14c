"""Worlds to edit: the target has a name of its own, and cameras lose it and find it again."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from mv2v_engine.synthetic.edit_worlds import (
    Look,
    edit_camera,
    make_edit_world,
    target_in_view,
)
from mv2v_engine.synthetic.instructions import object_phrases
from mv2v_engine.synthetic.worlds import BOX, SPHERE

FRAMES, SIZE = 85, (96, 160)


@pytest.mark.parametrize("seed", range(30))
def test_the_target_is_named_alone(seed: int) -> None:
    made = make_edit_world(seed, num_frames=FRAMES)
    phrases, (target, *others) = made.target_phrases, made.looks
    assert phrases and set(phrases) <= set(object_phrases())
    for phrase in phrases:
        assert phrase in target.phrases()
        assert not any(phrase in other.phrases() for other in others)
    assert [look.kind for look in made.looks] == made.world.kind_N.tolist()
    bottom = made.world.centre_N3[:, 1] + made.world.half_size_N3[:, 1]
    torch.testing.assert_close(bottom, made.world.room_max_3[1].expand_as(bottom))


def test_a_seed_is_a_world_and_a_camera() -> None:
    first, again, other = (make_edit_world(seed, num_frames=FRAMES) for seed in (4, 4, 5))
    assert first.looks == again.looks
    assert torch.equal(first.world.centre_N3, again.world.centre_N3)
    assert not torch.equal(first.world.room_min_3, other.world.room_min_3)
    cameras = [edit_camera(first, 4, num_frames=FRAMES, size=SIZE) for _ in range(2)]
    assert torch.equal(cameras[0].poses, cameras[1].poses)


def test_a_given_target_keeps_its_plain_noun() -> None:
    look = Look(kind=BOX, colour="red", tall=True)
    for seed in range(10):
        made = make_edit_world(seed, num_frames=FRAMES, target=look, moving=seed % 2 == 0)
        assert made.looks[0] == look and "box" in made.target_phrases
        assert bool(made.world.swing_N3[0].any()) == (seed % 2 == 0)
    assert Look(kind=SPHERE, colour="red", tall=False).phrases() == (
        "sphere",
        "ball",
        "red sphere",
        "red ball",
    )


def test_cameras_lose_the_target_and_find_it() -> None:
    kinds: Counter[str] = Counter()
    for seed in range(24):
        made = make_edit_world(seed, num_frames=FRAMES)
        camera = edit_camera(made, seed, num_frames=FRAMES, size=SIZE)
        inside = target_in_view(made.world, camera)
        kinds[camera.name] += 1
        if camera.name == "look away":
            seen = inside.nonzero()[:, 0]
            longest_gap = int((seen[1:] - seen[:-1]).max()) - 1
            assert bool(inside[0]) and longest_gap >= 8
        elif camera.name != "dolly":
            assert float(inside.float().mean()) > 0.5
        if camera.name == "static":
            assert bool(made.world.swing_N3[0].any())
        # inside the room, whose walls are 3.5 metres or more to the sides
        assert bool((camera.poses[:, 0, 3].abs() < 3.3).all())
    assert 6 <= kinds["look away"] <= 18 and len(kinds) >= 3
