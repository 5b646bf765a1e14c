"""Cross-turn consistency: do two turns show the same where the source shows nothing (METHOD 15).

The earlier turn is warped into the later one through the true geometry, at equal times, and the
two are compared where both cameras see the point and the source's camera does not: there the
model had to invent, and only memory can make it invent the same twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.evaluation.images import feature_distance, masked_l1
from mv2v_engine.evaluation.visibility import Projection, project
from mv2v_engine.synthetic.render import Rendering, render
from mv2v_engine.synthetic.worlds import World

_FEWEST_PIXELS = 64  # in a whole video; fewer say nothing


@dataclass(frozen=True, eq=False)
class View:
    """A camera in a known world and what it truly films.

    seen, invented: bool [T, height, width], which of its pixels show what the source shows too,
    and which show what it never does; what is not sure is neither. unshown: of a wall or thing that
    the source shows nothing of, so that nothing tells its colour.
    """

    camera: CameraTrajectory
    truth: Rendering
    seen: Tensor
    invented: Tensor
    unshown: Tensor


@dataclass(frozen=True, eq=False)
class Overlap:
    """Where an earlier view holds what a later one has to invent.

    mask: bool [T, height, width] of the later view's pixels that the earlier camera sees and the
    source's does not.
    """

    projection: Projection
    mask: Tensor

    @property
    def is_measurable(self) -> bool:
        return int(self.mask.sum()) >= _FEWEST_PIXELS


def film(world: World, camera: CameraTrajectory, source: View | None = None) -> View:
    """Film a world; without `source` this is the source's own view."""
    truth = render(world, camera)
    if source is None:
        everywhere = torch.ones_like(truth.depth, dtype=torch.bool)
        return View(camera, truth, everywhere, ~everywhere, ~everywhere)
    projection = project(camera, truth.depth, source.camera, source.truth.depth)
    unshown = ~torch.isin(truth.surface, source.truth.surface.unique())
    return View(camera, truth, projection.seen, projection.unseen, unshown)


def overlap(later: View, earlier: View, *, of_unshown: bool = False) -> Overlap:
    """The geometry of a pair of turns: the same for every method that is measured on it.

    of_unshown: count only what the source shows nothing of.
    """
    projection = project(later.camera, later.truth.depth, earlier.camera, earlier.truth.depth)
    mask = projection.seen & later.invented
    return Overlap(projection, mask & later.unshown if of_unshown else mask)


def consistency(later: Tensor, earlier: Tensor, shared: Overlap) -> tuple[float, float]:
    """(L1 in 0..1, 1 - cosine of features) of two turns' frames over their overlap; 0 is best."""
    warped = shared.projection.sample(earlier)
    return masked_l1(warped, later, shared.mask), feature_distance(warped, later, shared.mask)
