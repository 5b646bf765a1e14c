"""Camera error: a video filmed from a known wrong pose is found to be there."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mv2v_engine.camera.poses import compose, rotation_yaw
from mv2v_engine.camera.trajectories import CameraTrajectory, named_trajectory
from mv2v_engine.evaluation.alignment import camera_error
from mv2v_engine.evaluation.consistency import View, film
from mv2v_engine.synthetic.render import render
from mv2v_engine.synthetic.worlds import World, make_world

SIZE = (96, 160)


def _view(spec: str, seed: int = 5) -> tuple[World, View]:
    world = make_world(seed)
    source = film(world, named_trajectory("static", 5, SIZE))
    return world, film(world, named_trajectory(spec, 5, SIZE), source)


def _moved(camera: CameraTrajectory, degrees: float, *shift: float) -> CameraTrajectory:
    turn = torch.cat([rotation_yaw(torch.tensor([degrees])), torch.tensor([[shift]]).mT], -1)
    return dataclasses.replace(camera, poses=compose(camera.poses, turn.expand(5, 3, 4)))


def test_the_requested_camera_has_no_error() -> None:
    _, view = _view("pan:10")
    error = camera_error(view.truth.frames, view, every=2)
    assert error is not None
    assert error.pixels == pytest.approx(0, abs=1e-4)
    assert (error.degrees, error.metres) == pytest.approx((0, 0), abs=1e-4)


@pytest.mark.parametrize(
    ("degrees", "shift"),
    [(2.0, (0.0, 0.0, 0.0)), (0.0, (0.15, 0.0, 0.0)), (-1.0, (0.1, 0.05, 0.2))],
)
def test_a_wrong_camera_is_found(degrees: float, shift: tuple[float, float, float]) -> None:
    world, view = _view("pan:10")
    frames = render(world, _moved(view.camera, degrees, *shift)).frames
    error = camera_error(frames, view, every=2)
    assert error is not None
    # near silhouettes a part of a shift passes for a turn
    assert error.degrees == pytest.approx(abs(degrees), abs=0.3)
    assert error.metres == pytest.approx(torch.tensor(shift).norm().item(), abs=0.025)
    assert error.pixels > 2


def test_ignoring_the_request_shows_as_the_whole_move() -> None:
    world, view = _view("pan:8")
    source = render(world, named_trajectory("static", 5, SIZE)).frames
    error = camera_error(source, view, every=4)
    assert error is not None and error.degrees == pytest.approx(8, abs=0.3)


def test_no_camera_without_anything_to_align_with() -> None:
    _, view = _view("pan:10")
    unseen = dataclasses.replace(view, seen=torch.zeros_like(view.seen))
    assert camera_error(view.truth.frames, unseen) is None
