"""A scene's cameras: synchronised, from one first pose, of every family."""

from __future__ import annotations

import torch

from mv2v_engine.synthetic.cameras import scene_cameras


def test_ten_cameras_start_together() -> None:
    cameras = scene_cameras(3)
    assert len(cameras) == 10
    assert {camera.num_frames for camera in cameras} == {17}
    assert {camera.size for camera in cameras} == {(96, 160)}
    for camera in cameras:
        torch.testing.assert_close(camera.poses[0], torch.eye(3, 4))


def test_the_first_camera_stands_still_and_the_others_move() -> None:
    first, *others = scene_cameras(3)
    assert torch.equal(first.poses, torch.eye(3, 4).expand(17, 3, 4))
    for camera in others:
        assert not torch.allclose(camera.poses[-1], torch.eye(3, 4), atol=1e-2)
    assert {camera.name.split(":")[0] for camera in others} >= {"pan", "tilt", "zoom", "arc"}


def test_a_seed_decides_the_cameras() -> None:
    names = [[camera.name for camera in scene_cameras(seed)] for seed in (1, 1, 2)]
    assert names[0] == names[1] != names[2]


def test_scale_bounds_the_extent_of_a_move() -> None:
    for camera in scene_cameras(4, num_cameras=15, scale=(1.0, 1.0)):
        if camera.name.startswith("pan:"):
            assert abs(float(camera.name[4:])) == 19.88
    assert len(scene_cameras(4, num_cameras=15)) == 15


def test_more_arcs_are_more_of_the_moves() -> None:
    def arcs(times: int) -> int:
        cameras = (camera for seed in range(5) for camera in scene_cameras(seed, arcs=times))
        return sum(camera.name.startswith("arc:") for camera in cameras)

    assert arcs(4) > 2 * arcs(1) > 0
