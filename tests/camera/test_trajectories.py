"""The ten presets end where ReCamMaster's do; moves mean what they say; bad ones are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine.camera.poses import default_intrinsics, identity_poses, pose_vectors
from mv2v_engine.camera.trajectories import (
    PRESETS,
    SUBJECT_DISTANCE,
    CameraTrajectory,
    named_poses,
    named_trajectory,
)
from mv2v_engine.errors import CameraError

# BASE_MODELS 2.5: position (metres) and direction of view (yaw right, pitch up, degrees) at the
# last of 81 frames
END_POSES = {
    "pan_right": ((0, 0, 0), (19.88, 0)),
    "pan_left": ((0, 0, 0), (-19.88, 0)),
    "tilt_up": ((0, 0, 0), (0, 9.94)),
    "tilt_down": ((0, 0, 0), (0, -9.94)),
    "zoom_in": ((0, 0, 1.988), (0, 0)),
    "zoom_out": ((0, 0, -1.988), (0, 0)),
    "translate_up": ((0, -0.994, 0), (0, -13.95)),
    "translate_down": ((0, 0.994, 0), (0, 13.95)),
    "arc_left": ((-1.988, 0, 0.533), (29.82, 0)),
    "arc_right": ((1.988, 0, 0.533), (-29.82, 0)),
}


def view_angles(pose: Tensor) -> tuple[float, float]:
    """Yaw to the right and pitch upwards of the direction of view, in degrees."""
    x, y, z = pose[:, 2].tolist()
    return math.degrees(math.atan2(x, z)), math.degrees(math.asin(-y))


def test_there_are_ten_presets() -> None:
    assert set(PRESETS) == set(END_POSES)


@pytest.mark.parametrize("name", END_POSES)
def test_preset_ends_where_recammaster_does(name: str) -> None:
    position, angles = END_POSES[name]
    poses = named_poses(name, 81)
    assert poses.shape == (81, 3, 4)
    torch.testing.assert_close(poses[:1], identity_poses(1))
    assert poses[-1, :, 3].tolist() == pytest.approx(position, abs=0.005)
    assert view_angles(poses[-1]) == pytest.approx(angles, abs=0.01)
    # upright: the camera's x axis stays level
    assert poses[:, 1, 0].abs().max() < 1e-6


@pytest.mark.parametrize("name", END_POSES)
def test_preset_moves_at_constant_speed(name: str) -> None:
    poses = named_poses(name, 81)
    end, middle = view_angles(poses[-1]), view_angles(poses[40])
    assert middle == pytest.approx([angle / 2 for angle in end], abs=0.01)
    steps = poses[1:, :, 3] - poses[:-1, :, 3]
    torch.testing.assert_close(steps.norm(dim=1), steps[0].norm().expand(80), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("name", ["arc:-29.82", "arc:29.82", "translate_up", "translate_down"])
def test_rotating_moves_face_the_subject(name: str) -> None:
    pose = named_poses(name, 17)[-1]
    to_subject = torch.tensor([0.0, 0.0, SUBJECT_DISTANCE]) - pose[:, 3]
    torch.testing.assert_close(pose[:, 2], to_subject / to_subject.norm(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("spec", "position", "angles"),
    [
        ("pan:30", (0, 0, 0), (30, 0)),
        ("tilt:-10", (0, 0, 0), (0, -10)),
        ("zoom:1.5", (0, 0, 1.5), (0, 0)),
        ("translate:1,-2,0.5", (1, -2, 0.5), (0, 0)),
        ("arc:-90,3", (-3, 0, 3), (90, 0)),
        ("arc:90", (4, 0, 4), (-90, 0)),
        ("crane:4", (0, -4, 0), (0, -45)),
        ("static", (0, 0, 0), (0, 0)),
    ],
)
def test_moves(spec: str, position: tuple[float, ...], angles: tuple[float, float]) -> None:
    pose = named_poses(spec, 9)[-1]
    assert pose[:, 3].tolist() == pytest.approx(position, abs=1e-5)
    assert view_angles(pose) == pytest.approx(angles, abs=1e-3)


def test_one_frame_stays_at_the_start() -> None:
    for name in PRESETS:
        torch.testing.assert_close(named_poses(name, 1), identity_poses(1))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pan_rigth", r"unknown camera 'pan_rigth'; nearest: pan_right"),
        ("orbit", r"unknown camera 'orbit'; nearest: .*Presets: pan_right.*moves: pan:DEGREES"),
        ("pan", r"got 0 amounts; write pan:DEGREES"),
        ("pan:1,2", r"got 2 amounts; write pan:DEGREES"),
        ("pan:fast", r"amounts must be finite numbers; write pan:DEGREES"),
        ("tilt:-3601", r"tilt:-3601': -3601 degrees are too many; a move may have -3600 to 3600"),
        ("arc:1e30", r"1e\+30 degrees are too many"),
        ("arc:10,1e30", r"1e\+30 metres are too many; a move may have -1e\+07 to 1e\+07 metres"),
        ("zoom:1e38", r"1e\+38 metres are too many"),
        ("crane:-1e8", r"-1e\+08 metres are too many"),
        ("translate:0,0,1e8", r"1e\+08 metres are too many"),
        ("translate:1,2", r"write translate:X,Y,Z"),
        ("zoom:nan", r"write zoom:METRES"),
        ("static:1", r"write static"),
        ("", r"unknown camera ''"),
        ("pan 30", "nearest: pan"),
        ("pan:1e400", "amounts must be finite numbers"),
        ("pan:1_0", "amounts must be finite numbers"),
        ("pan:\uff11", "amounts must be finite numbers"),
        ("translate:1", "got 1 amount; write translate:X,Y,Z in metres"),
        ("pan:30+", r"camera 'pan:30\+': amounts must be finite numbers"),
        ("pan:30++tilt:10", "amounts must be finite"),
        ("pan:30+tilt:fast", "camera 'tilt:fast': amounts must be finite numbers"),
        ("pan:30+tlit:10", "unknown camera 'tlit:10'; nearest:"),
        ("+pan:30", "unknown camera ''"),
        ("pan:30-tilt:10", "amounts must be finite"),
        ("+".join(["pan:1"] * 17), "adds up 17 moves; at most 16"),
        ("+".join(["zoom:1e7"] * 2), r"lie 2e\+07 metres from the origin"),
    ],
    ids=ascii,
)
def test_unusable_specs_say_what_to_write(spec: str, message: str) -> None:
    with pytest.raises(CameraError, match=message):
        named_trajectory(spec, 9, (48, 64))


def test_resizing_scales_the_lens_and_keeps_the_path() -> None:
    trajectory = named_trajectory("arc_left", 5, (480, 832))
    half = trajectory.resized((240, 416))
    torch.testing.assert_close(half.intrinsics, default_intrinsics(240, 416))
    assert torch.equal(half.poses, trajectory.poses)
    assert (half.size, half.name, half.num_frames) == ((240, 416), "arc_left", 5)


def test_resizing_scales_per_frame_intrinsics() -> None:
    intrinsics = default_intrinsics(10, 20) * torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    intrinsics[:, 2, 2] = 1
    wide = CameraTrajectory(identity_poses(3), intrinsics, (10, 20)).resized((10, 40))
    torch.testing.assert_close(wide.intrinsics[:, 0], intrinsics[:, 0] * 2)
    torch.testing.assert_close(wide.intrinsics[:, 1:], intrinsics[:, 1:])


def test_vectors_are_poses_and_shares_of_the_image() -> None:
    """Every fourth frame, the same at every size; a lens that zooms differs from frame to frame."""
    camera = named_trajectory("arc_left", 9, (48, 64))
    vectors = camera.vectors()
    assert torch.equal(vectors[:, :12], pose_vectors(camera.poses))
    focal = 24 / 23.76
    expected = torch.tensor([focal, focal * 64 / 48, 0.0, 0.0]).expand(3, 4)
    torch.testing.assert_close(vectors[:, 12:], expected)
    torch.testing.assert_close(camera.resized((480, 640)).vectors(), vectors)
    assert torch.equal(camera.vectors(12), vectors[:, :12])
    lens = camera.intrinsics.repeat(9, 1, 1)
    lens[:, 0, 0] += torch.arange(9)
    lens[:, 1, 2] += 12
    moved = CameraTrajectory(camera.poses, lens, (48, 64)).vectors()[:, 12:] - expected
    shift = torch.stack([torch.tensor([4.0 * i / 64, 0, 0, 0.25]) for i in range(3)])
    torch.testing.assert_close(moved, shift)


def skewed(pixels: float) -> Tensor:
    intrinsics = default_intrinsics(10, 10)
    intrinsics[0, 1] = pixels
    return intrinsics


@pytest.mark.parametrize(
    ("intrinsics", "size", "message"),
    [
        (torch.eye(4), (4, 4), r"shape \[3, 3\] or \[2, 3, 3\], got \[4, 4\]"),
        (torch.eye(3).repeat(3, 1, 1), (4, 4), r"got \[3, 3, 3\]"),
        (torch.eye(3) * math.nan, (4, 4), r"finite with positive focal"),
        (torch.diag(torch.tensor([-1.0, 1, 1])), (4, 4), r"positive focal"),
        (torch.eye(3), (0, 4), r"two positive integers"),
        (skewed(2.0), (10, 10), r"frame 0 are no pinhole's: got a skew of 2 pixels"),
        (torch.stack([skewed(0.0), skewed(2.0)]), (10, 10), r"frame 1 are no pinhole's: got a sk"),
        ([[9, 0, 5], [2, 9, 5], [0, 0, 1]], (10, 10), r"no pinhole's: got other entries in \[\["),
        (skewed(0.0).T, (10, 10), r"no pinhole's: .*expected \[\[fx, 0, .*; transpose the matrix"),
    ],
)
def test_unusable_intrinsics_are_refused(
    intrinsics: Any, size: tuple[int, int], message: str
) -> None:
    with pytest.raises(CameraError, match=message):
        CameraTrajectory(identity_poses(2), intrinsics, size)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("pan:30+tilt:10", ("pan:30", "tilt:10")),
        ("tilt:10 + pan:+30", ("pan:30", "tilt:10")),
        ("tilt:1e+1+zoom:2+pan:30+arc:-40", ("arc:-40", "zoom:2", "pan:30", "tilt:10")),
        ("pan:10+pan:20", ("pan:30",)),
        ("zoom:1+static+zoom:0.5", ("zoom:1.5",)),
        ("tilt_up+arc_left", ("arc_left", "tilt_up")),
        ("pan_left+crane:1", ("crane:1", "pan_left")),
    ],
)
def test_moves_add_up_in_one_order(spec: str, parts: tuple[str, ...]) -> None:
    """Each is made in the axes of the one before it, at every frame."""
    expected = torch.eye(4).repeat(9, 1, 1)
    for part in parts:
        poses = torch.cat([named_poses(part, 9), torch.eye(4)[None, 3:].expand(9, 1, 4)], dim=1)
        expected = expected @ poses
    torch.testing.assert_close(named_poses(spec, 9), expected[:, :3], rtol=0, atol=1e-6)
    trajectory = named_trajectory(spec, 9, (48, 64))
    assert trajectory.name == spec and trajectory.notes == ()


def test_pan_and_tilt_keep_the_horizon_level() -> None:
    for spec in ("pan:30+tilt:10", "tilt:10+pan:30"):
        # the camera's right stays level: it has no share of down
        assert named_poses(spec, 9)[:, 1, 0].abs().max() < 1e-6
