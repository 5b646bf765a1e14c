"""Pixels are followed to their surfaces: points lie on them, and own colours know no light."""

from __future__ import annotations

import pytest
import torch

from mv2v_engine.synthetic.edit_clips import EditClip, make_edit_clip, surface_mask
from mv2v_engine.synthetic.surfaces import SurfacePoints, surface_points
from mv2v_engine.synthetic.worlds import CYLINDER, NUM_WALLS, SPHERE


@pytest.fixture(scope="module")
def followed() -> tuple[EditClip, SurfacePoints]:
    clip = make_edit_clip(11, num_frames=17, size=(48, 80), kind="remove")
    return clip, surface_points(clip.edit_world.world, clip.camera, clip.source)


def test_points_lie_on_their_surfaces(followed: tuple[EditClip, SurfacePoints]) -> None:
    clip, points = followed
    world = clip.edit_world.world
    bounds = torch.cat([world.room_min_3, world.room_max_3])
    on_wall = points.surface < NUM_WALLS
    surface = points.surface[on_wall]
    coordinate = points.point[on_wall].gather(1, (surface % 3)[:, None])[:, 0]
    torch.testing.assert_close(coordinate, bounds[surface], atol=2e-3, rtol=0)
    for index, kind in enumerate(world.kind_N.tolist()):
        mine = points.point[points.surface == NUM_WALLS + index]
        if not len(mine):
            continue
        scaled = mine / world.half_size_N3[index]
        if kind == SPHERE:
            reach = scaled.norm(dim=-1)
        elif kind == CYLINDER:
            reach = torch.maximum(scaled[:, [0, 2]].norm(dim=-1), scaled[:, 1].abs())
        else:
            reach = scaled.abs().amax(-1)
        torch.testing.assert_close(reach, torch.ones_like(reach), atol=5e-3, rtol=0)


def test_own_colours_lie_between_the_textures_two(
    followed: tuple[EditClip, SurfacePoints],
) -> None:
    clip, points = followed
    textures = clip.edit_world.world.textures
    albedo = points.albedo(clip.source.frames)
    for surface in points.surface.unique().tolist():
        colours = albedo[(points.surface == surface) & points.whole]
        ends = torch.stack([textures.colour_a_S3[surface], textures.colour_b_S3[surface]])
        # half a grey level of rounding, under the faintest light
        assert bool((colours >= ends.amin(0) - 0.004).all())
        assert bool((colours <= ends.amax(0) + 0.004).all())
    assert float(points.shade.min()) > 0.5 and float(points.shade.max()) < 1.06


def test_borders_are_not_whole(followed: tuple[EditClip, SurfacePoints]) -> None:
    clip, points = followed
    target = surface_mask(clip.source, (NUM_WALLS,))
    alone = target & points.whole
    assert 0 < int(alone.sum()) < int(target.sum())
    frame, row, column = (part[0] for part in alone.nonzero().split(1, dim=1))
    around = clip.source.surface[frame, row - 1 : row + 2, column - 1 : column + 2]
    assert bool((around == NUM_WALLS).all())
