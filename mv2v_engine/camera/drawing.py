"""Camera paths drawn from above: to the right is the source's right, up is forward.

T frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.errors import RequestError
from mv2v_engine.files import replacing

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

_SIDE, _MARGIN, _ROW = 720, 56, 24  # pixels: of the map, around it, of a line below it
_FINER = 3  # drawn so many times as large, then scaled down: smooth lines
_FRUSTA = 9  # the most that a path has
_PAPER, _GRID, _AXIS, _INK = (255, 255, 255), (232, 232, 232), (190, 190, 190), (40, 40, 40)
_SOURCE = (150, 150, 150)
_COLOURS = ((0, 92, 184), (200, 80, 0), (0, 130, 90), (150, 40, 130))
_LEAST = 1.0  # metres that a map shows
Point = tuple[float, float]


def save_drawing(path: Path | str, trajectories: Sequence[CameraTrajectory]) -> None:
    """Write a map of some paths as PNG, whole or not at all.

    The source's first frame is at the origin; a triangle is what a camera sees.

    Raises:
        RequestError: the file's name does not end in .png.
        StorageError: the place cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont

    path = Path(path)
    if path.suffix.lower() != ".png":
        raise RequestError(f"a drawing is a .png file, got {path.name!r}; choose such a name")
    view = _Map(trajectories)
    height = _SIDE + 2 * _MARGIN + _ROW * len(trajectories)
    size = ((_SIDE + 2 * _MARGIN) * _FINER, height * _FINER)
    image = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(14 * _FINER)
    for metres in view.lines(0):
        ends = [view.pixel((metres, view.low[1])), view.pixel((metres, view.high[1]))]
        draw.line(ends, _GRID if metres else _AXIS, _FINER)
        place = (ends[0][0], ends[0][1] + 8 * _FINER)
        draw.text(place, f"{metres:g}", _INK, font, anchor="mt")
    for metres in view.lines(1):
        ends = [view.pixel((view.low[0], metres)), view.pixel((view.high[0], metres))]
        draw.line(ends, _GRID if metres else _AXIS, _FINER)
        draw.text((ends[0][0] - 8 * _FINER, ends[0][1]), f"{metres:g}", _INK, font, anchor="rm")
    right, forward = view.pixel(view.high), view.pixel((view.low[0], view.high[1]))
    draw.text((right[0], size[1] - (height - _SIDE - _MARGIN - 28) * _FINER),
              "metres to the right", _INK, font, anchor="rt")  # fmt: skip
    draw.text((forward[0], forward[1] - 8 * _FINER), "metres forward", _INK, font, anchor="lb")
    source = torch.eye(3, 4, dtype=torch.float32, device="cpu")
    lens = trajectories[0].intrinsics.reshape(-1, 3, 3)[0]
    view.frustum(draw, source, lens, trajectories[0].size[1], _SOURCE)
    origin = view.pixel((0.0, 0.0))
    draw.text((origin[0], origin[1] + 6 * _FINER), "source", _SOURCE, font, anchor="mt")
    top = _SIDE + _MARGIN + 50
    for number, trajectory in enumerate(trajectories):
        colour = _COLOURS[number % len(_COLOURS)]
        view.path(draw, trajectory, colour)
        place = (_MARGIN * _FINER, (top + _ROW * number) * _FINER)
        draw.text(place, _caption(trajectory), colour, font, anchor="lm")
    smooth = image.resize((size[0] // _FINER, height), Image.Resampling.LANCZOS)
    with replacing(path) as temporary:
        smooth.save(temporary, format="PNG")


def _caption(trajectory: CameraTrajectory) -> str:
    low, high = (round(float(-end), 2) + 0.0 for end in trajectory.poses[:, 1, 3].aminmax()[::-1])
    name = trajectory.name if len(trajectory.name) <= 60 else f"{trajectory.name[:60]}..."
    rises = f"height {low:.2f} to {high:.2f} m"
    return f"{name}: {trajectory.num_frames} frames, {rises}; filled: the first"


class _Map:
    """Metres to pixels, for as much of the floor as some paths need.

    low, high: its corners, (right, forward) in metres.
    """

    def __init__(self, trajectories: Sequence[CameraTrajectory]) -> None:
        places = torch.cat([t.poses[:, ::2, 3] for t in trajectories]).double()
        places = torch.cat([places, torch.zeros_like(places[:1])])
        low, high = places.amin(0), places.amax(0)
        side = max(float((high - low).max()) * 1.35, _LEAST)
        centre = ((low + high) / 2).tolist()
        self.low = (centre[0] - side / 2, centre[1] - side / 2)
        self.high = (centre[0] + side / 2, centre[1] + side / 2)
        self._scale = _SIDE / side
        self._reach = side / 14  # a triangle's length

    def pixel(self, point: Point) -> Point:
        x = _MARGIN + (point[0] - self.low[0]) * self._scale
        y = _MARGIN + (self.high[1] - point[1]) * self._scale
        return x * _FINER, y * _FINER

    def lines(self, axis: int) -> list[float]:
        """Round numbers of metres along an axis, some eight of them."""
        low, high = self.low[axis], self.high[axis]
        step: float = 10.0 ** math.floor(math.log10((high - low) / 4))
        step *= next((f for f in (1, 2, 5) if (high - low) / (step * f) <= 9), 10)
        first = math.ceil(low / step)
        return [round(number * step, 10) for number in range(first, math.floor(high / step) + 1)]

    def path(
        self, draw: ImageDraw, trajectory: CameraTrajectory, colour: tuple[int, int, int]
    ) -> None:
        poses, count = trajectory.poses, trajectory.num_frames
        lenses = trajectory.intrinsics.expand(count, 3, 3)
        points = [self.pixel((float(x), float(z))) for x, z in poses[:, ::2, 3].tolist()]
        if count > 1:
            draw.line(points, colour, 2 * _FINER, joint="curve")
        shown = min(count, _FRUSTA)
        for index in range(shown):
            frame = round(index * (count - 1) / max(shown - 1, 1))
            self.frustum(
                draw, poses[frame], lenses[frame], trajectory.size[1], colour, is_full=not frame
            )

    def frustum(
        self,
        draw: ImageDraw,
        pose: Tensor,
        lens: Tensor,
        width: int,
        colour: tuple[int, int, int],
        *,
        is_full: bool = False,
    ) -> None:
        """What a camera [3, 4] sees across, as a triangle from its place."""
        edges = [(float(u - lens[0, 2]) / float(lens[0, 0]), 0.0, 1.0) for u in (0, width)]
        rays = pose.new_tensor(edges) @ pose[:, :3].T * self._reach
        x, z = float(pose[0, 3]), float(pose[2, 3])
        corners = [(x, z), *((x + float(r[0]), z + float(r[2])) for r in rays)]
        pixels = [self.pixel(corner) for corner in corners]
        pale = tuple(255 - (255 - part) // 3 for part in colour)
        draw.polygon(pixels, pale if is_full else None, colour, 2 * _FINER)
