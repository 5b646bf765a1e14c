"""Visibility by exact depth: what two cameras of one world both see, and where."""

from __future__ import annotations

import torch

from mv2v_engine.camera.trajectories import CameraTrajectory, named_trajectory
from mv2v_engine.evaluation.visibility import project
from mv2v_engine.synthetic.render import Rendering, render
from mv2v_engine.synthetic.worlds import NUM_WALLS, make_world

SIZE = (48, 80)


def _film(spec: str, seed: int = 5) -> tuple[CameraTrajectory, Rendering]:
    camera = named_trajectory(spec, 3, SIZE)
    return camera, render(make_world(seed), camera)


def test_a_camera_sees_all_of_itself() -> None:
    camera, film = _film("arc:20")
    projection = project(camera, film.depth, camera, film.depth)
    assert projection.seen.all() and not projection.unseen.any()


def test_a_pan_hides_a_strip_of_known_width() -> None:
    camera, film = _film("pan:20")
    still, source = _film("static")
    projection = project(camera, film.depth, still, source.depth)
    seen, unseen = projection.seen, projection.unseen
    assert seen[0].all() and not unseen[0].any()
    # a pure rotation: the columns whose ray leaves the still camera's image are known exactly
    focal = float(camera.intrinsics[0, 0])
    column = torch.arange(SIZE[1]) + 0.5 - SIZE[1] / 2
    angle = torch.atan(column / focal) + torch.deg2rad(torch.tensor(20.0))
    outside = focal * angle.tan() >= SIZE[1] / 2
    middle = SIZE[0] // 2
    assert not seen[2][middle, outside].any()
    assert seen[2][middle, ~outside].float().mean() > 0.9
    # a turn hides nothing but the strip, of which the border's own pixel is not sure
    assert not unseen[2][middle, ~outside].any()
    assert unseen[2][middle, outside].sum() >= outside.sum() - 2


def test_a_plane_shifts_by_the_disparity() -> None:
    still = named_trajectory("static", 3, SIZE)
    aside = named_trajectory("translate:0.6,0,0", 3, SIZE)
    plane = torch.full((3, *SIZE), 3.0)
    projection = project(aside, plane, still, plane)
    x = torch.arange(SIZE[1]) + 0.5
    for frame, moved in enumerate((0.0, 0.3, 0.6)):
        shift = float(still.intrinsics[0, 0]) * moved / 3.0
        torch.testing.assert_close(
            projection.position[frame, 20, :, 0], x + shift, atol=1e-4, rtol=0
        )
        assert torch.equal(projection.seen[frame, 20], x + shift < SIZE[1])
    # a picture that rises by one a column rises by the shift: bilinear sampling is exact on it
    ramp = torch.arange(SIZE[1]).float()[None, None, :, None].expand(3, *SIZE, 3)
    sampled = projection.sample(ramp)[2, 20, :, 0]
    seen = projection.seen[2, 20] & (projection.position[2, 20, :, 0] < SIZE[1] - 0.5)
    torch.testing.assert_close(sampled[seen], (x - 0.5 + shift)[seen], atol=1e-3, rtol=0)


def test_what_lies_behind_a_nearer_plane_is_hidden() -> None:
    still = named_trajectory("static", 3, SIZE)
    wall, screen = torch.full((3, *SIZE), 3.0), torch.full((3, *SIZE), 3.0)
    screen[:, :, :40] = 1.0
    projection = project(still, wall, still, screen)
    seen, unseen = projection.seen, projection.unseen
    assert not seen[:, :, :40].any() and seen[:, :, 40:].all()
    # of the hidden half only the column at the screen's edge may be the wall's
    assert unseen[:, :, :39].all() and not unseen[:, :, 39:].any()


def test_what_is_seen_has_the_same_colour() -> None:
    camera, film = _film("translate:0.6,0,0")
    still, source = _film("static")
    projection = project(camera, film.depth, still, source.depth)
    seen = projection.seen
    assert 0.3 < seen[2].float().mean() < 0.98
    # where nothing new is revealed the picture is one the source has; elsewhere it is not
    error = (projection.sample(source.frames) - film.frames.float()).abs().mean(-1)
    assert error[2][seen[2]].mean() < 6
    assert error[2][~seen[2]].mean() > 4 * error[2][seen[2]].mean()


def test_what_moves_is_followed_at_its_own_time() -> None:
    world = make_world(9)
    moving = (world.swing_N3.abs().sum(1) > 0.4).nonzero()[:, 0] + NUM_WALLS
    camera, film = _film("translate:0.3,0,0", seed=9)
    still, source = _film("static", seed=9)
    projection = project(camera, film.depth, still, source.depth)
    of_mover = projection.seen & torch.isin(film.surface, moving)
    assert of_mover[1:].sum() > 50

    def error(frames: torch.Tensor) -> float:
        difference = projection.sample(frames) - film.frames.float()
        return float(difference.abs().mean(-1)[1:][of_mover[1:]].mean())

    # the same warp of frames of another time shows something else where the object was
    assert error(source.frames) < 8
    assert error(source.frames.roll(1, 0)) > 2 * error(source.frames)
