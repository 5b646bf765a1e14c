"""Pose arithmetic, and what is refused as a pose."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mv2v_engine.camera.poses import (
    compose,
    default_intrinsics,
    identity_poses,
    invert,
    pose_vectors,
    relative_to,
    rotation_pitch,
    rotation_yaw,
    validate_poses,
)
from mv2v_engine.errors import CameraError


def random_poses(num_frames: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(
        torch.randn(num_frames, 3, 3, generator=generator, dtype=torch.float64)
    )
    rotation = rotation * torch.linalg.det(rotation).sign()[:, None, None]
    translation = torch.randn(num_frames, 3, 1, generator=generator, dtype=torch.float64)
    return torch.cat([rotation, translation], dim=-1)


def as_4x4(poses: Tensor) -> Tensor:
    last = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=poses.dtype).expand(len(poses), 1, 4)
    return torch.cat([poses, last], dim=1)


def test_arithmetic_is_that_of_4x4_matrices() -> None:
    a, b = random_poses(5, 0), random_poses(5, 1)
    torch.testing.assert_close(as_4x4(invert(a)), torch.linalg.inv(as_4x4(a)))
    torch.testing.assert_close(as_4x4(compose(a, b)), as_4x4(a) @ as_4x4(b))
    expected = torch.linalg.inv(as_4x4(b))[0] @ as_4x4(a)
    torch.testing.assert_close(as_4x4(relative_to(a, b[0])), expected)


def test_relative_to_own_first_frame_begins_at_identity() -> None:
    poses = relative_to(random_poses(4), random_poses(4)[0])
    torch.testing.assert_close(poses[:1], identity_poses(1).double())


def test_relative_to_ignores_the_choice_of_world() -> None:
    poses, world = random_poses(4), random_poses(1, 7)
    moved = compose(world, poses)
    torch.testing.assert_close(relative_to(moved, moved[0]), relative_to(poses, poses[0]))


def test_positive_yaw_looks_right_and_positive_pitch_looks_up() -> None:
    degrees = torch.tensor([0.0, 30.0])
    # the third column is where the camera looks: x right, y down, z forward
    right, up = rotation_yaw(degrees)[1, :, 2], rotation_pitch(degrees)[1, :, 2]
    sine, cosine = math.sin(math.radians(30)), math.cos(math.radians(30))
    torch.testing.assert_close(right, torch.tensor([sine, 0.0, cosine]))
    torch.testing.assert_close(up, torch.tensor([0.0, -sine, cosine]))


def test_default_lens_is_that_of_the_training_set() -> None:
    intrinsics = default_intrinsics(480, 832)
    assert intrinsics[0, 0].item() == pytest.approx(840.4, abs=0.05)
    assert intrinsics[1, 1] == intrinsics[0, 0]
    assert intrinsics[:2, 2].tolist() == [416.0, 240.0]
    torch.testing.assert_close(default_intrinsics(240, 416)[:2], intrinsics[:2] / 2)


def test_pose_vectors_are_rows_of_every_fourth_frame() -> None:
    poses = random_poses(17)
    vectors = pose_vectors(poses)
    assert vectors.shape == (5, 12)
    assert torch.equal(vectors[2], poses[8].reshape(12))


def test_valid_poses_pass_in_both_shapes() -> None:
    poses = random_poses(3)
    assert validate_poses(poses).dtype == torch.float32
    assert torch.equal(validate_poses(as_4x4(poses)), poses.float())


def spoilt(frame: int, row: int, column: int, value: float) -> Tensor:
    poses = random_poses(4)
    poses[frame, row, column] = value
    return poses


@pytest.mark.parametrize(
    ("poses", "message"),
    [
        (spoilt(2, 0, 3, math.nan), r"NaN or infinity at frame 2"),
        (spoilt(1, 1, 1, math.inf), r"NaN or infinity at frame 1"),
        (spoilt(3, 0, 0, 2.0), r"rotation of frame 3 is not orthonormal"),
        (random_poses(4) * 1.01, r"not orthonormal"),
        (
            random_poses(4) * torch.tensor([-1.0, 1, 1, 1], dtype=torch.float64),
            r"determinant -1.*convert to OpenCV",
        ),
        (as_4x4(random_poses(4)).transpose(1, 2), r"last row.*transpose the matrices"),
        (torch.zeros(4, 3, 3), r"\[frames, 3, 4\].*got \[4, 3, 3\]"),
        (torch.zeros(0, 3, 4), r"got \[0, 3, 4\]"),
        (torch.eye(3, 4), r"got \[3, 4\]"),
    ],
    ids=["nan", "inf", "one-bad", "scaled", "mirrored", "transposed", "3x3", "none", "single"],
)
def test_unusable_poses_are_refused(poses: Tensor, message: str) -> None:
    with pytest.raises(CameraError, match=message):
        validate_poses(poses)
