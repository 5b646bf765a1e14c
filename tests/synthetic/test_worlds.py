"""Worlds: reproducible, inside their rooms, and different from one another."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.errors import RequestError
from mv2v_engine.synthetic.render import render
from mv2v_engine.synthetic.worlds import (
    BOX,
    CYLINDER,
    NUM_WALLS,
    SPHERE,
    Textures,
    World,
    make_world,
)


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


@pytest.mark.parametrize("seed", range(6))
def test_every_move_uncovers_a_thing_of_a_plain_world_that_the_source_does_not_show(
    seed: int,
) -> None:
    world = make_world(seed, "plain")

    def shown(move: str) -> set[int]:
        last = named_trajectory(move, 17, (48, 80)).poses[-1:]
        camera = named_trajectory("static", 1, (48, 80))
        seen = render(world, replace(camera, poses=last), samples=1).surface
        return {int(index) for index in seen.unique() if index >= NUM_WALLS}

    first = shown("static")
    for move in ("pan:30", "pan:-30", "tilt:15", "tilt:-15"):
        assert shown(move) - first, move


@pytest.mark.parametrize("seed", range(6))
def test_colours_of_a_plain_world_vary_slowly(seed: int) -> None:
    plain, textured = (make_world(seed, grade).textures for grade in ("plain", "textured"))

    def contrast(textures: Textures) -> float:
        return float((textures.colour_a_S3 - textures.colour_b_S3).abs().mean())

    assert contrast(plain) < 0.3 * contrast(textured)
    # the waves are as many radians a metre as in the textured grade, halved
    wave_numbers = plain.waves_S33[:NUM_WALLS].norm(dim=-1)
    assert bool((wave_numbers < 2 * torch.pi / 0.9 / 2 + 1e-3).all())


@pytest.mark.parametrize("seed", range(6))
def test_a_furnished_world_is_a_plain_one_behind_partitions(seed: int) -> None:
    plain, furnished = (make_world(seed, grade) for grade in ("plain", "furnished"))
    count = len(plain.kind_N)
    assert torch.equal(furnished.centre_N3[:count], plain.centre_N3)
    added = furnished.half_size_N3[count:]
    is_partition = (furnished.kind_N[count:] == BOX) & (added[:, 2] < 0.1)
    assert 1 <= int(is_partition.sum()) <= 4
    assert not bool(is_partition.all())  # and things stand behind them
    height = furnished.room_max_3[1] - furnished.room_min_3[1]
    assert torch.allclose(2 * added[is_partition, 1], height)
    still = named_trajectory("static", 1, (48, 80))
    hidden = render(plain, still, samples=1).surface != render(furnished, still, samples=1).surface
    assert 0.02 < float(hidden.float().mean()) < 0.9


def test_an_unknown_grade_is_refused() -> None:
    with pytest.raises(RequestError, match=r"'plain', 'furnished', 'textured'.*got 'bare'"):
        make_world(0, "bare")  # type: ignore[arg-type]
