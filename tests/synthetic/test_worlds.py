"""Worlds: reproducible, inside their rooms, and different from one another."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from mv2v_engine.synthetic.worlds import CYLINDER, NUM_WALLS, SPHERE, Textures, World, make_world


def equal(first: World, second: World) -> bool:
    pairs = [(getattr(first, f.name), getattr(second, f.name)) for f in fields(World)]
    pairs += [
        (getattr(first.textures, f.name), getattr(second.textures, f.name))
        for f in fields(Textures)
    ]
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))


def test_a_seed_is_a_world() -> None:
    state = torch.random.get_rng_state()
    first = make_world(5)
    torch.rand(3)  # the global generator plays no part
    assert equal(first, make_world(5))
    assert not equal(first, make_world(6))
    torch.random.set_rng_state(state)


@pytest.mark.parametrize("seed", range(12))
def test_the_camera_and_the_objects_are_inside_the_room(seed: int) -> None:
    world = make_world(seed)
    assert bool((world.room_min_3 < -1).all())
    assert bool((world.room_max_3 > 1).all())
    assert 6 <= len(world.kind_N) <= 10
    assert bool((world.centre_N3 - world.half_size_N3 >= world.room_min_3 - 1e-4).all())
    assert bool((world.centre_N3 + world.half_size_N3 <= world.room_max_3 + 1e-4).all())


@pytest.mark.parametrize("seed", range(12))
def test_shapes_are_what_they_are_called(seed: int) -> None:
    world = make_world(seed)
    half = world.half_size_N3
    spheres, cylinders = half[world.kind_N == SPHERE], half[world.kind_N == CYLINDER]
    assert torch.equal(spheres, spheres[:, :1].expand(-1, 3))
    assert torch.equal(cylinders[:, 0], cylinders[:, 2])
    assert len(world.textures.colour_a_S3) == NUM_WALLS + len(world.kind_N)
    for colour in (world.textures.colour_a_S3, world.textures.colour_b_S3):
        assert bool(((colour >= 0) & (colour <= 1)).all())


def test_some_objects_move_and_some_stand_still() -> None:
    moving = torch.cat([make_world(seed).swing_N3.abs().sum(1) > 0 for seed in range(40)])
    assert 0.2 < float(moving.float().mean()) < 0.5


def test_a_still_object_does_not_turn_either() -> None:
    for seed in range(20):
        world = make_world(seed)
        still = world.swing_N3.abs().sum(1) == 0
        assert bool((world.spin_N[still] == 0).all())
