"""Pose arithmetic. One convention everywhere: camera-to-world [R|t], OpenCV axes, metres.

OpenCV axes: x right, y down, z forward. A pose is the top three rows of the 4x4 matrix.

T frames, F latent frames.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mv2v_engine import arguments
from mv2v_engine.errors import CameraError

# ReCamMaster and MultiCamVideo: 24 mm lens on a 23.76 mm sensor, cropped to 832 pixels.
_REFERENCE_FOCAL = 24.0 / 23.76 * 832.0
_REFERENCE_WIDTH = 832.0
# a pose's largest distance from the origin along an axis: coordinates on the Earth's surface fit
MAX_METRES = 1e7


def default_intrinsics(height: int, width: int) -> Tensor:
    """Intrinsics [3, 3] in pixels of a 24 mm lens on a 23.76 mm sensor at this image size.

    840.4 px at 832x480 (METHOD 9), scaled with the width; the principal point is the centre.
    """
    focal = _REFERENCE_FOCAL * width / _REFERENCE_WIDTH
    rows = [[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]]
    return torch.tensor(rows, dtype=torch.float32, device="cpu")


def normalised_intrinsics(intrinsics: Tensor, size: tuple[int, int]) -> Tensor:
    """[..., 4] of pixels [..., 3, 3] of a (height, width), as shares of the image.

    fx / width, fy / height, cx / width - 1/2, cy / height - 1/2: the same at every size.
    """
    height, width = size
    fx, fy = intrinsics[..., 0, 0] / width, intrinsics[..., 1, 1] / height
    cx, cy = intrinsics[..., 0, 2] / width - 0.5, intrinsics[..., 1, 2] / height - 0.5
    return torch.stack([fx, fy, cx, cy], dim=-1)


def identity_poses(num_frames: int) -> Tensor:
    """A static camera at the origin: [T, 3, 4]."""
    return torch.eye(3, 4, dtype=torch.float32, device="cpu").repeat(num_frames, 1, 1)


def rotation_yaw(degrees: Tensor) -> Tensor:
    """Rotation matrices [T, 3, 3] about the y axis; positive looks right."""
    angle = torch.deg2rad(degrees)
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    rows = [angle.cos(), zero, angle.sin(), zero, one, zero, -angle.sin(), zero, angle.cos()]
    return torch.stack(rows, dim=-1).reshape(-1, 3, 3)


def rotation_pitch(degrees: Tensor) -> Tensor:
    """Rotation matrices [T, 3, 3] about the x axis; positive looks up (towards negative y)."""
    angle = torch.deg2rad(degrees)
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    rows = [one, zero, zero, zero, angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos()]
    return torch.stack(rows, dim=-1).reshape(-1, 3, 3)


def invert(poses: Tensor) -> Tensor:
    """Inverse of rigid poses [..., 3, 4]: camera-to-world to world-to-camera and back."""
    rotation = poses[..., :3].transpose(-1, -2)
    return torch.cat([rotation, -rotation @ poses[..., 3:]], dim=-1)


def compose(first: Tensor, second: Tensor) -> Tensor:
    """The pose `first @ second` of rigid poses [..., 3, 4]."""
    rotation = first[..., :3] @ second[..., :3]
    translation = first[..., :3] @ second[..., 3:] + first[..., 3:]
    return torch.cat([rotation, translation], dim=-1)


def relative_to(poses: Tensor, reference: Tensor) -> Tensor:
    """Poses [T, 3, 4] expressed in the frame of one reference pose [3, 4] (METHOD 5)."""
    return compose(invert(reference), poses)


def pose_vectors(poses: Tensor, *, stride: int = 4) -> Tensor:
    """Row-major 12-vectors [F, 12] of every `stride`-th pose: one per latent frame (METHOD 5)."""
    return poses[::stride].flatten(1)


def matrices(name: str, value: Any) -> Tensor:
    """Matrices that a caller gives as a tensor, an array or lists: float64 on the CPU, any shape.

    Raises:
        CameraError: they are no real numbers, or lists of different lengths.
    """
    try:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        if array.dtype.kind not in "fiu":
            raise TypeError(array.dtype)
        return torch.tensor(array.astype(np.float64), device="cpu")
    except (TypeError, ValueError, RuntimeError):
        expected = "matrices of real numbers: a tensor, an array or lists"
        raise arguments.mistaken(name, value, expected, kind=CameraError) from None


def require_finite_poses(poses: Tensor, *, name: str) -> None:
    """Refuse NaN and infinity in poses [T, ...].

    Raises:
        CameraError: naming the first frame that has them.
    """
    bad = (~poses.isfinite()).flatten(1).any(1).nonzero()
    if len(bad):
        raise CameraError(f"{name} hold NaN or infinity at frame {int(bad[0])}; all must be finite")


def require_rotations(rotations: Tensor, *, name: str) -> None:
    """Refuse finite matrices [T, 3, 3] that are not orthonormal with determinant +1.

    Raises:
        CameraError: naming the frame that is farthest from it, or the first that is mirrored.
    """
    rotations = rotations.double()
    gram = rotations @ rotations.transpose(1, 2)
    identity = torch.eye(3, dtype=gram.dtype, device=gram.device)
    error = (gram - identity).abs().flatten(1).amax(1)
    worst = int(error.argmax())
    if float(error[worst]) > 1e-3:
        squared = float(gram[worst].trace()) / 3
        is_scaled = float((gram[worst] - squared * identity).abs().max()) < 1e-3 * squared
        advice = f"; it is one times {math.sqrt(squared):.3g}, divide by that" if is_scaled else ""
        raise CameraError(
            f"{name}: the rotation of frame {worst} is not orthonormal "
            f"(R R^T differs from identity by {float(error[worst]):.3g}, at most 0.001 allowed)"
            f"{advice}"
        )
    mirrored = (torch.linalg.det(rotations) < 0).nonzero()
    if len(mirrored):
        raise CameraError(
            f"{name}: a rotation has determinant -1 (left-handed axes), that of frame "
            f"{int(mirrored[0])}; convert to OpenCV axes: x right, y down, z forward"
        )


def validate_poses(poses: Any, *, name: str = "poses") -> Tensor:
    """Return float32 poses [T, 3, 4] on the CPU, or say what is wrong with them.

    Accepts what `matrices` does, and [T, 4, 4] too; the last row must then be (0, 0, 0, 1).

    Raises:
        CameraError: wrong shape, NaN or infinity, a place beyond `MAX_METRES`, or a rotation that
            is not orthonormal with determinant +1.
    """
    poses = matrices(name, poses)
    if poses.ndim != 3 or poses.shape[1:] not in ((3, 4), (4, 4)) or not len(poses):
        raise CameraError(
            f"{name} must have shape [frames, 3, 4] (camera-to-world), got {list(poses.shape)}"
        )
    require_finite_poses(poses, name=name)
    farthest = float(poses[:, :3, 3].abs().max())
    if farthest > MAX_METRES:
        raise CameraError(
            f"{name} lie {farthest:g} metres from the origin along an axis, at most {MAX_METRES:g} "
            "are taken; are these metres?"
        )
    if poses.shape[1] == 4:
        last_row = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=poses.dtype, device=poses.device)
        if not torch.allclose(poses[:, 3], last_row.expand(len(poses), 4), atol=1e-4):
            raise CameraError(
                f"{name}: the last row of a 4x4 pose must be 0 0 0 1 "
                f"(column-vector convention), got {poses[0, 3].tolist()}; transpose the matrices?"
            )
        poses = poses[:, :3]
    require_rotations(poses[..., :3], name=name)
    checked: Tensor = poses.to(torch.float32)
    return checked


def quaternion_rotations(quaternions: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] of unit quaternions [..., 4] in the order w x y z."""
    w, x, y, z = quaternions.unbind(-1)
    rows = [
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    ]
    return torch.stack(rows, dim=-1).reshape(*quaternions.shape[:-1], 3, 3)


def rotation_quaternions(rotations: Tensor) -> Tensor:
    """Unit quaternions [T, 4], w x y z, of rotations [T, 3, 3]; of either sign.

    The largest eigenvector of a symmetric matrix (Bar-Itzhack 2000), which no angle upsets.
    """
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in rotations.unbind(-2))
    rows = [
        *(a + e + i, h - f, c - g, d - b),
        *(h - f, a - e - i, b + d, c + g),
        *(c - g, b + d, e - a - i, f + h),
        *(d - b, c + g, f + h, i - a - e),
    ]
    found: Tensor = torch.linalg.eigh(torch.stack(rows, dim=-1).unflatten(-1, (4, 4)))[1]
    return found[..., -1]


def rotation_degrees(rotations: Tensor) -> Tensor:
    """The angle of each of the rotations [..., 3, 3] in degrees, from 0 to 180."""
    skew = rotations - rotations.transpose(-1, -2)
    sine = skew[..., (2, 0, 1), (1, 2, 0)].norm(dim=-1) / 2
    cosine = (rotations.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2
    return torch.rad2deg(torch.atan2(sine, cosine))


def look_at_angle(offset: float, distance: float) -> float:
    """Degrees to turn so that a camera `offset` aside faces a point `distance` ahead."""
    return math.degrees(math.atan2(offset, distance))
