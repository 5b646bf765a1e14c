"""Videos side by side on one picture: a row each, with its label, and evenly spaced frames.

T frames.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mv2v_engine.errors import VideoError
from mv2v_engine.files import replacing

if TYPE_CHECKING:
    from PIL.Image import Image

_CELL_WIDTH = 320  # pixels of a frame on the sheet, about
_GAP = 4
_STRIP = 26  # height of a row's label
_FONT_SIZE = 17
_PAPER, _INK, _FAINT = (255, 255, 255), (20, 20, 20), (120, 120, 120)


def spaced_frames(num_frames: int, count: int) -> list[int]:
    """`count` frame numbers from the first to the last, evenly spaced; fewer if there are fewer."""
    count = min(count, num_frames)
    return [round(i * (num_frames - 1) / max(count - 1, 1)) for i in range(count)]


@dataclass(frozen=True, eq=False)
class Strip:
    """A row of a sheet: pictures of one size, and which of the video's frames they are."""

    label: str
    pictures: tuple[Image, ...]
    frames: tuple[int, ...]


def make_strip(
    label: str, frames: Tensor, *, columns: int = 5, numbers: Sequence[int] | None = None
) -> Strip:
    """What a sheet shows of a video.

    Args:
        frames: uint8 [T, height, width, 3].
        columns: frames shown.
        numbers: of the frames in the video that they are cut from; None: they are all of it.

    Raises:
        VideoError: other frames than these.
    """
    from PIL import Image

    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != torch.uint8 or not len(frames):
        raise VideoError(
            "a contact sheet needs rows of uint8 frames [T, height, width, 3], got "
            f"{frames.dtype} {list(frames.shape)}"
        )
    height, width = frames.shape[1:3]
    # whole factors keep the pixels of a small video as they are
    factor = _CELL_WIDTH / width if width > _CELL_WIDTH else _CELL_WIDTH // width
    cell = (round(width * factor), round(height * factor))
    filter_ = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    indices = spaced_frames(len(frames), columns)
    pictures = tuple(
        Image.fromarray(np.ascontiguousarray(frames[index].numpy())).resize(cell, filter_)
        for index in indices
    )
    numbers = range(len(frames)) if numbers is None else numbers
    return Strip(label, pictures, tuple(numbers[index] for index in indices))


def save_contact_sheet(
    path: Path | str, rows: Sequence[Strip], *, named: Collection[int] = (0,)
) -> None:
    """Write a PNG, whole or not at all.

    Args:
        rows: all of one size.
        named: rows whose frames have their numbers, from 1, above them.

    Raises:
        VideoError: no rows, or rows of different sizes.
        StorageError: the place cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont

    sizes = {row.pictures[0].size for row in rows}
    if len(sizes) != 1:
        got = ", ".join(f"{width}x{height}" for width, height in sorted(sizes))
        raise VideoError(f"a contact sheet needs rows of one size, got {got or 'no rows'}")
    cell = sizes.pop()
    columns = max(len(row.pictures) for row in rows)
    sheet_width = columns * (cell[0] + _GAP) + _GAP
    sheet = Image.new("RGB", (sheet_width, len(rows) * (_STRIP + cell[1] + _GAP)), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    small = ImageFont.load_default(_FONT_SIZE - 4)
    for row, strip in enumerate(rows):
        top = row * (_STRIP + cell[1] + _GAP)
        draw.text((_GAP, top + _STRIP / 2), strip.label, _INK, font, anchor="lm")
        for column, picture in enumerate(strip.pictures):
            left = _GAP + column * (cell[0] + _GAP)
            sheet.paste(picture, (left, top + _STRIP))
            if row in named and column:
                place = (left + cell[0], top + _STRIP / 2)
                name = f"frame {strip.frames[column] + 1}"
                draw.text(place, name, _FAINT, small, anchor="rm")
    with replacing(Path(path)) as temporary:
        sheet.save(temporary, format="PNG")
