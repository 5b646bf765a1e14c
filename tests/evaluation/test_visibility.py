"""Visibility by exact depth: what two cameras of one world both see."""

from __future__ import annotations

import torch

from mv2v_engine.camera.trajectories import CameraTrajectory, named_trajectory
from mv2v_engine.evaluation.images import masked_psnr
from mv2v_engine.evaluation.visibility import seen_by
from mv2v_engine.synthetic.render import Rendering, render
from mv2v_engine.synthetic.worlds import make_world

SIZE = (48, 80)


def _film(spec: str, seed: int = 5) -> tuple[CameraTrajectory, Rendering]:
    camera = named_trajectory(spec, 3, SIZE)
    return camera, render(make_world(seed), camera)


def test_a_camera_sees_all_of_itself() -> None:
    camera, film = _film("arc:20")
    assert seen_by(camera, film.depth, camera, film.depth).all()


def test_a_pan_hides_a_strip_of_known_width() -> None:
    camera, film = _film("pan:20")
    still, source = _film("static")
    seen = seen_by(camera, film.depth, still, source.depth)
    assert seen[0].all()
    # a pure rotation: the columns whose ray leaves the still camera's image are known exactly
    focal = float(camera.intrinsics[0, 0])
    column = torch.arange(SIZE[1]) + 0.5 - SIZE[1] / 2
    angle = torch.atan(column / focal) + torch.deg2rad(torch.tensor(20.0))
    outside = focal * angle.tan() >= SIZE[1] / 2
    middle = SIZE[0] // 2
    assert not seen[2][middle, outside].any()
    assert seen[2][middle, ~outside].float().mean() > 0.9


def test_what_is_seen_has_the_same_colour() -> None:
    camera, film = _film("translate:0.6,0,0")
    still, source = _film("static")
    seen = seen_by(camera, film.depth, still, source.depth)
    assert 0.3 < seen[2].float().mean() < 0.98
    # where nothing new is revealed the picture is one the source has; elsewhere it is not
    points = _reproject(camera, film, still)
    colour = source.frames[2][points[..., 1], points[..., 0]]
    error = (colour.float() - film.frames[2].float()).abs().mean(-1)
    assert error[seen[2]].mean() < 12
    assert error[~seen[2]].mean() > 2 * error[seen[2]].mean()


def _reproject(camera: CameraTrajectory, film: Rendering, other: CameraTrajectory) -> torch.Tensor:
    """Pixel (x, y) in `other` of the last frame's points, for a camera that does not turn."""
    y, x = torch.meshgrid(torch.arange(SIZE[0]) + 0.5, torch.arange(SIZE[1]) + 0.5, indexing="ij")
    k, depth = camera.intrinsics, film.depth[2]
    point = torch.stack([(x - k[0, 2]) / k[0, 0] * depth, (y - k[1, 2]) / k[1, 1] * depth, depth])
    moved = point + camera.poses[2, :, 3][:, None, None] - other.poses[2, :, 3][:, None, None]
    column = (moved[0] / moved[2] * k[0, 0] + k[0, 2]).floor().long().clamp(0, SIZE[1] - 1)
    row = (moved[1] / moved[2] * k[1, 1] + k[1, 2]).floor().long().clamp(0, SIZE[0] - 1)
    return torch.stack([column, row], -1)


def test_masked_psnr_is_exact_on_a_known_error() -> None:
    truth = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    wrong = truth.clone()
    wrong[1] = 51
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[1] = True
    assert abs(masked_psnr(wrong, truth, mask) - 13.9794) < 1e-3
    assert abs(masked_psnr(wrong, truth) - 16.9897) < 1e-3
