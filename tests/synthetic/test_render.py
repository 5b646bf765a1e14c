"""The ray caster against analytic distances, and two cameras of one world against each other.

T frames, P points.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mv2v_engine.camera.trajectories import CameraTrajectory, named_trajectory
from mv2v_engine.synthetic.render import object_poses, pixel_directions, render
from mv2v_engine.synthetic.worlds import BOX, CYLINDER, NUM_WALLS, SPHERE, World, make_world

SIZE = (48, 80)


def with_object(kind: int, half_size: tuple[float, float, float], *, yaw: float = 0.0) -> World:
    """The room of seed 0 with one still object on the optical axis, 3 m ahead."""
    world = make_world(0)
    only = torch.zeros(1)
    surfaces = {name: value[: NUM_WALLS + 1] for name, value in vars(world.textures).items()}
    return replace(
        world,
        kind_N=torch.tensor([kind]),
        centre_N3=torch.tensor([[0.0, 0.0, 3.0]]),
        half_size_N3=torch.tensor([half_size]),
        yaw_N=torch.tensor([yaw]),
        swing_N3=torch.zeros(1, 3),
        rate_N=only,
        phase_N=only,
        spin_N=only,
        textures=replace(world.textures, **surfaces),
    )


def still(world: World) -> World:
    return replace(world, swing_N3=0 * world.swing_N3, spin_N=0 * world.spin_N)


def one_ray(poses: Tensor | None = None) -> CameraTrajectory:
    """One pixel that looks along the optical axis."""
    intrinsics = torch.tensor([[10.0, 0.0, 0.5], [0.0, 10.0, 0.5], [0.0, 0.0, 1.0]])
    return CameraTrajectory(torch.eye(3, 4)[None] if poses is None else poses, intrinsics, (1, 1))


def world_points(trajectory: CameraTrajectory, frame: int, depth: Tensor) -> Tensor:
    """Points [P, 3] that a frame's depth [height, width] shows."""
    pose = trajectory.poses[frame]
    local = (pixel_directions(trajectory, frame) * depth[..., None]).flatten(0, 1)
    return local @ pose[:, :3].T + pose[:, 3]


def test_frames_depth_and_surface_have_the_cameras_shape() -> None:
    got = render(make_world(1), named_trajectory("pan:10", 3, SIZE))
    assert (got.frames.shape, got.frames.dtype) == ((3, 48, 80, 3), torch.uint8)
    assert got.depth.shape == got.surface.shape == (3, 48, 80)
    assert bool(got.depth.isfinite().all())
    assert float(got.depth.min()) > 0
    assert float(got.frames.float().std()) > 10  # a picture, not one colour


def test_the_same_seed_gives_the_same_pixels() -> None:
    trajectory = named_trajectory("arc:20", 2, SIZE)
    first, second = (render(make_world(3), trajectory) for _ in range(2))
    assert torch.equal(first.frames, second.frames)
    assert torch.equal(first.depth, second.depth)
    other = render(make_world(4), trajectory)
    assert not torch.equal(first.frames, other.frames)


@pytest.mark.parametrize(
    ("degrees", "axis", "high"), [(0, 2, True), (90, 0, True), (-90, 0, False)]
)
def test_depth_along_the_axis_is_the_distance_to_the_wall(
    degrees: float, axis: int, high: bool
) -> None:
    world = make_world(2)
    empty = replace(world, centre_N3=world.centre_N3 + 1000.0, swing_N3=0 * world.swing_N3)
    poses = named_trajectory(f"pan:{degrees}", 2, SIZE).poses[1:]
    got = render(empty, one_ray(poses), samples=1)
    wall = world.room_max_3[axis] if high else -world.room_min_3[axis]
    assert float(got.depth) == pytest.approx(float(wall), rel=1e-5)
    assert int(got.surface) == axis + 3 * high


def test_every_pixel_lies_on_a_wall_of_an_empty_room() -> None:
    world = make_world(2)
    empty = replace(world, centre_N3=world.centre_N3 + 1000.0, swing_N3=0 * world.swing_N3)
    trajectory = named_trajectory("arc:40", 2, SIZE)
    got = render(empty, trajectory, samples=1)
    bounds = torch.cat([world.room_min_3, world.room_max_3])
    for frame in range(2):
        points = world_points(trajectory, frame, got.depth[frame])
        surface = got.surface[frame].flatten()
        coordinate = points.gather(1, (surface % 3)[:, None])[:, 0]
        torch.testing.assert_close(coordinate, bounds[surface], atol=1e-3, rtol=0)
        assert bool((points >= world.room_min_3 - 1e-3).all())
        assert bool((points <= world.room_max_3 + 1e-3).all())


@pytest.mark.parametrize(
    ("kind", "half_size", "yaw", "distance"),
    [
        (SPHERE, (0.5, 0.5, 0.5), 0.0, 2.5),
        (BOX, (0.4, 0.3, 0.7), 0.0, 2.3),
        (BOX, (0.4, 0.3, 0.7), math.pi / 2, 2.6),
        (BOX, (0.5, 0.5, 0.5), math.pi / 4, 3 - 0.5 * math.sqrt(2)),
        (CYLINDER, (0.6, 0.3, 0.6), 0.3, 2.4),
    ],
)
def test_depth_of_an_object_ahead(
    kind: int, half_size: tuple[float, float, float], yaw: float, distance: float
) -> None:
    got = render(with_object(kind, half_size, yaw=yaw), one_ray(), samples=1)
    assert int(got.surface) == NUM_WALLS
    assert float(got.depth) == pytest.approx(distance, abs=1e-4)


def test_every_pixel_of_a_sphere_lies_on_it() -> None:
    trajectory = named_trajectory("static", 1, SIZE)
    got = render(with_object(SPHERE, (0.5, 0.5, 0.5)), trajectory)
    on_sphere = (got.surface[0] == NUM_WALLS).flatten()
    points = world_points(trajectory, 0, got.depth[0])[on_sphere]
    radius = (points - torch.tensor([0.0, 0.0, 3.0])).norm(dim=-1)
    assert int(on_sphere.sum()) > 100
    torch.testing.assert_close(radius, torch.full_like(radius, 0.5), atol=1e-3, rtol=0)


@pytest.mark.parametrize("camera", ["pan:12", "crane:0.8", "arc:-20"])
def test_two_cameras_of_a_still_world_agree_on_what_both_see(camera: str) -> None:
    world = still(make_world(7))
    first, second = named_trajectory("static", 2, (96, 160)), named_trajectory(camera, 2, (96, 160))
    a, b = render(world, first), render(world, second)
    points = world_points(first, 1, a.depth[1])
    pose, k = second.poses[1], second.intrinsics
    local = (points - pose[:, 3]) @ pose[:, :3]
    pixel = local @ k.T
    column, row = (pixel[:, :2] / pixel[:, 2:]).unbind(1)
    inside = (local[:, 2] > 0) & (column >= 0) & (column < 160) & (row >= 0) & (row < 96)
    column, row = column[inside].long(), row[inside].long()
    seen = b.surface[1][row, column]
    depth_error = (b.depth[1][row, column] - local[inside, 2]).abs() / local[inside, 2]
    # hidden in the second view, or on a border between surfaces: not the same point
    same = (seen == a.surface[1].flatten()[inside]) & (depth_error < 0.03)
    before = a.frames[1].flatten(0, 1)[inside][same].float()
    after = b.frames[1][row, column][same].float()
    assert int(same.sum()) > 0.6 * int(inside.sum()) > 3000
    difference = (before - after).abs().mean(-1)
    assert float(difference.mean()) < 4  # of 255; half a pixel of texture
    # without the cameras' geometry the same pixels differ by far more
    unwarped = (before - a.frames[1][row, column][same].float()).abs().mean()
    assert float(unwarped) > 3 * float(difference.mean())


def test_objects_move_in_time_as_seen_by_a_still_camera() -> None:
    world = with_object(BOX, (0.4, 0.4, 0.4))
    moving = replace(world, swing_N3=torch.tensor([[0.6, 0.0, 0.0]]), rate_N=torch.ones(1))
    trajectory = named_trajectory("static", 5, SIZE)
    got = render(moving, trajectory, samples=1)
    columns = [
        float((surface == NUM_WALLS).nonzero()[:, 1].float().mean()) for surface in got.surface
    ]
    # a sine of one period: centre, right, centre, left, centre
    focal = float(trajectory.intrinsics[0, 0])
    assert columns[1] - columns[0] == pytest.approx(0.6 * focal / 2.6, abs=4)
    assert columns[3] - columns[0] == pytest.approx(-0.6 * focal / 2.6, abs=4)
    assert columns[4] == pytest.approx(columns[0], abs=1)
    frozen = render(world, trajectory, samples=1)
    assert torch.equal(frozen.frames[0], frozen.frames[4])
    assert not torch.equal(got.frames[0], got.frames[1])


def test_objects_start_where_the_world_puts_them() -> None:
    world = make_world(9)
    centre, yaw = object_poses(world, 0.0)
    torch.testing.assert_close(centre, world.centre_N3)
    torch.testing.assert_close(yaw, world.yaw_N)


def test_samples_soften_borders_between_surfaces_only() -> None:
    world, trajectory = make_world(5), named_trajectory("static", 1, SIZE)
    sharp, soft = render(world, trajectory, samples=1), render(world, trajectory, samples=3)
    assert torch.equal(sharp.depth, soft.depth)
    changed = (sharp.frames != soft.frames).any(-1)[0]
    surface = sharp.surface[0]
    border = torch.zeros_like(changed)
    border[1:] |= surface[1:] != surface[:-1]
    border[:-1] |= surface[1:] != surface[:-1]
    border[:, 1:] |= surface[:, 1:] != surface[:, :-1]
    border[:, :-1] |= surface[:, 1:] != surface[:, :-1]
    assert bool(changed.any())
    assert not bool((changed & ~border).any())
