"""Camera error without an estimator of poses: the pose that explains the pixels best (METHOD 15).

In a known world a frame of a turn is aligned photometrically with the true frame at the requested
pose: direct alignment with exact depth, inverse compositional (Baker and Matthews 2004),
Levenberg-Marquardt, from blurred to sharp, over pixels whose content the source fixes and which
lie away from silhouettes. What is left between the pose found and the one asked is the error.

N frames, P pixels of the sampling lattice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.evaluation.consistency import View
from mv2v_engine.evaluation.images import box_mean
from mv2v_engine.evaluation.visibility import camera_points, image_positions

_STRIDES = (8, 4)  # pixels between the samples of a level, and the width of its blur
_ITERATIONS = 8
_HUBER = 0.1  # share of full scale; larger differences are content, not camera
# pixels around a silhouette, behind which another camera sees something else: the fewer, the more
# pixels of a shift that are taken for a turn; the more, the less there is to align
_MARGIN = 4
_SILHOUETTE = 1.25  # ratio of depths within the margin
_FEWEST_PIXELS = 0.05  # share of a frame; fewer do not fix six numbers


@dataclass(frozen=True, slots=True)
class PoseError:
    """Means over frames of the best pose against the requested one.

    pixels: how far the pose moves the image, at most its diagonal, the one number that does not
    mix up small turns with small shifts. degrees: of rotation. metres: of translation.
    """

    pixels: float
    degrees: float
    metres: float


def camera_error(frames: Tensor, view: View, *, every: int = 4) -> PoseError | None:
    """How far the camera of a turn's frames [T, height, width, 3] is from the view's.

    every: frames between those that are aligned; the first, where all cameras still agree, is
    left out. None where the source fixes too little of the picture.
    """
    chosen = torch.arange(every, len(frames), every)
    usable = view.seen[chosen] & _is_smooth(view.truth.depth[chosen])
    enough = usable.float().mean((1, 2)) >= _FEWEST_PIXELS
    chosen, mask = chosen[enough], usable[enough]
    if not len(chosen):
        return None
    camera, k = view.camera, view.camera.intrinsics
    lens = k if k.ndim == 2 else k[chosen]
    camera = CameraTrajectory(camera.poses[chosen], lens, camera.size, camera.name)
    points = camera_points(camera, view.truth.depth[chosen])
    poses = _align(_image(frames[chosen]), _image(view.truth.frames[chosen]), points, mask, camera)
    moved = image_positions(_transform(_inverse(poses), points), camera)
    shift = (moved - image_positions(points, camera)).norm(dim=-1)
    shift = shift.clamp_max(math.hypot(*camera.size))  # found nowhere: no number says how far off
    pixels = torch.stack([values[kept].mean() for values, kept in zip(shift, mask, strict=True)])
    trace = poses[:, :3, :3].diagonal(dim1=1, dim2=2).sum(1)
    angle = torch.rad2deg(((trace - 1) / 2).clamp(-1, 1).acos())
    metres = poses[:, :3, 3].norm(dim=1)
    return PoseError(float(pixels.mean()), float(angle.mean()), float(metres.mean()))


def _image(frames: Tensor) -> Tensor:
    """Frames as float64 [N, 3, height, width] in 0..1."""
    return frames.permute(0, 3, 1, 2).double() / 255


def _align(
    image: Tensor, template: Tensor, points: Tensor, mask: Tensor, camera: CameraTrajectory
) -> Tensor:
    """Poses [N, 4, 4] relative to the template's, at which `image` was taken."""
    poses = torch.eye(4, dtype=torch.float64).repeat(len(image), 1, 1)
    for stride in _STRIDES:
        level = _Level(image, template, points.double(), mask, camera, stride)
        poses = level.refine(poses)
    return poses


class _Level:
    """One resolution: both images blurred, compared at every `stride`-th pixel."""

    def __init__(
        self,
        image: Tensor,
        template: Tensor,
        points: Tensor,
        mask: Tensor,
        camera: CameraTrajectory,
        stride: int,
    ) -> None:
        self.camera, self.size = camera, torch.tensor(camera.size[::-1], dtype=torch.float64)
        self.image = _blur(image, stride)
        blurred = _blur(template, stride)
        lattice = (..., slice(stride // 2, None, stride), slice(stride // 2, None, stride))
        self.mask_NP = mask[lattice].flatten(1).double()
        self.points = points[:, lattice[1], lattice[2]]
        self.template_N3P = blurred[lattice].flatten(2)
        gradient = [
            (torch.roll(blurred, -1, axis) - torch.roll(blurred, 1, axis))[lattice].flatten(2) / 2
            for axis in (3, 2)
        ]
        self.jacobian = self._jacobian(torch.stack(gradient, -1))

    def _jacobian(self, gradient_N3P2: Tensor) -> Tensor:
        """Change of the template [N, 3, P, 6] with a twist (v, w) of its points, X' = w x X + v."""
        x, y, z = self.points.flatten(1, 2).unbind(-1)
        k = self.camera.intrinsics.double().expand(len(x), 3, 3)
        fx, fy = k[:, 0, 0, None], k[:, 1, 1, None]
        zero = torch.zeros_like(x)
        of_x = [fx / z, zero, -fx * x / z**2, -fx * x * y / z**2, fx * (1 + x**2 / z**2)]
        of_y = [zero, fy / z, -fy * y / z**2, -fy * (1 + y**2 / z**2), fy * x * y / z**2]
        projection_NP26 = torch.stack(
            [
                torch.stack([*of_x, -fx * y / z], -1),
                torch.stack([*of_y, fy * x / z], -1),
            ],
            dim=2,
        )
        return torch.einsum("ncpi,npij->ncpj", gradient_N3P2, projection_NP26)

    def refine(self, poses: Tensor) -> Tensor:
        """Damped steps from `poses`; each frame keeps a step only if it lowers its cost."""
        damping = torch.full((len(poses),), 1e-3, dtype=torch.float64)
        residual, weight, cost = self._compare(poses)
        for _ in range(_ITERATIONS):
            weighted = self.jacobian * weight[..., None]
            normal = torch.einsum("ncpi,ncpj->nij", weighted, self.jacobian)
            right = torch.einsum("ncpi,ncp->ni", weighted, residual)
            diagonal = normal.diagonal(dim1=1, dim2=2)
            # the floor keeps a direction that no pixel tells of where it is
            damped = normal + torch.diag_embed(damping[:, None] * diagonal + 1e-9)
            twist = torch.linalg.solve(damped, right)
            proposed = _exponential(twist) @ poses
            new_residual, new_weight, new_cost = self._compare(proposed)
            better = new_cost < cost
            poses = torch.where(better[:, None, None], proposed, poses)
            residual = torch.where(better[:, None, None], new_residual, residual)
            weight = torch.where(better[:, None, None], new_weight, weight)
            cost = torch.where(better, new_cost, cost)
            damping = torch.where(better, damping / 3, damping * 10).clamp(1e-9, 1e6)
        return poses

    def _compare(self, poses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Residual and weight [N, 3, P], and mean Huber cost [N], infinite off the picture."""
        moved = _transform(_inverse(poses), self.points)
        position = image_positions(moved, self.camera)
        inside = ((position >= 0) & (position < self.size)).all(-1) & (moved[..., 2] > 1e-3)
        sampled = torch.nn.functional.grid_sample(
            self.image, 2 * position / self.size - 1, padding_mode="border", align_corners=False
        )
        residual = sampled.flatten(2) - self.template_N3P
        used = self.mask_NP * inside.flatten(1)
        size = residual.abs()
        weight = used[:, None] * (_HUBER / size.clamp_min(_HUBER))
        huber = torch.where(size < _HUBER, size**2 / 2, _HUBER * (size - _HUBER / 2))
        count = used.sum(1)
        cost = (huber.sum(1) * used).sum(1) / count.clamp_min(1)
        # a camera that looks elsewhere has few pixels left to be wrong about
        lost = count < 0.5 * self.mask_NP.sum(1)
        return residual, weight, torch.where(lost, torch.inf, cost)


def _blur(image: Tensor, width: int) -> Tensor:
    """Box blur over 2 * width - 1 pixels, the border replicated."""
    padded = torch.nn.functional.pad(image, (width - 1,) * 4, mode="replicate")
    return box_mean(padded, 2 * width - 1)


def _is_smooth(depth: Tensor) -> Tensor:
    """Bool [N, height, width]: no silhouette within the margin."""
    nearness = 1 / depth[:, None]
    window = 2 * _MARGIN - 1
    nearest, farthest = (
        sign * torch.nn.functional.max_pool2d(sign * nearness, window, 1, padding=_MARGIN - 1)
        for sign in (1, -1)
    )
    return (nearest <= _SILHOUETTE * farthest)[:, 0]


def _exponential(twist_N6: Tensor) -> Tensor:
    """Rigid motions [N, 4, 4] of twists (v, w)."""
    v, (a, b, c) = twist_N6[:, :3], twist_N6[:, 3:].unbind(1)
    zero = torch.zeros_like(a)
    generator = torch.zeros(len(twist_N6), 4, 4, dtype=twist_N6.dtype)
    generator[:, :3, :3] = torch.stack([zero, -c, b, c, zero, -a, -b, a, zero], -1).view(-1, 3, 3)
    generator[:, :3, 3] = v
    motions: Tensor = torch.linalg.matrix_exp(generator)
    return motions


def _inverse(poses_N44: Tensor) -> Tensor:
    inverse: Tensor = torch.linalg.inv(poses_N44)
    return inverse


def _transform(poses_N44: Tensor, points: Tensor) -> Tensor:
    """Points [N, height, width, 3] moved by one rigid motion a frame."""
    pose = poses_N44[:, None, None]
    moved: Tensor = (pose[..., :3, :3] @ points.to(pose.dtype)[..., None])[..., 0]
    return moved + pose[..., :3, 3]
