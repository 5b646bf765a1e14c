"""Videos side by side on one picture: a row each, with its label, and evenly spaced frames.

T frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mv2v_engine.errors import VideoError
from mv2v_engine.files import replacing

_CELL_WIDTH = 320  # pixels of a frame on the sheet, about
_GAP = 4
_STRIP = 26  # height of a row's label
_FONT_SIZE = 17
_PAPER, _INK, _FAINT = (255, 255, 255), (20, 20, 20), (120, 120, 120)


def spaced_frames(num_frames: int, count: int) -> list[int]:
    """`count` frame numbers from the first to the last, evenly spaced; fewer if there are fewer."""
    count = min(count, num_frames)
    return [round(i * (num_frames - 1) / max(count - 1, 1)) for i in range(count)]


def save_contact_sheet(
    path: Path | str, rows: Sequence[tuple[str, Tensor]], *, columns: int = 5
) -> None:
    """Write a PNG, whole or not at all.

    Args:
        rows: (label, frames uint8 [T, height, width, 3]); all of one size.
        columns: frames shown of each row.

    Raises:
        VideoError: no rows, or frames that are not such tensors of one size.
        StorageError: the place cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont

    sizes = {tuple(frames.shape[1:]) for _, frames in rows}
    is_video = all(f.ndim == 4 and f.shape[3] == 3 and f.dtype == torch.uint8 for _, f in rows)
    if len(sizes) != 1 or not is_video:
        got = ", ".join(f"{frames.dtype} {list(frames.shape)}" for _, frames in rows)
        raise VideoError(
            "a contact sheet needs rows of uint8 frames [T, height, width, 3] of one size, got "
            f"{got or 'no rows'}"
        )
    height, width, _ = sizes.pop()
    # whole factors keep the pixels of a small video as they are
    factor = _CELL_WIDTH / width if width > _CELL_WIDTH else _CELL_WIDTH // width
    cell = (round(width * factor), round(height * factor))
    columns = min(columns, max(len(frames) for _, frames in rows))
    sheet_width = columns * (cell[0] + _GAP) + _GAP
    sheet = Image.new("RGB", (sheet_width, len(rows) * (_STRIP + cell[1] + _GAP)), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    small = ImageFont.load_default(_FONT_SIZE - 4)
    filter_ = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    for row, (label, frames) in enumerate(rows):
        top = row * (_STRIP + cell[1] + _GAP)
        draw.text((_GAP, top + _STRIP / 2), label, _INK, font, anchor="lm")
        for column, index in enumerate(spaced_frames(len(frames), columns)):
            left = _GAP + column * (cell[0] + _GAP)
            picture = Image.fromarray(np.ascontiguousarray(frames[index].numpy()))
            sheet.paste(picture.resize(cell, filter_), (left, top + _STRIP))
            if row == 0 and column:
                place = (left + cell[0], top + _STRIP / 2)
                draw.text(place, f"frame {index + 1}", _FAINT, small, anchor="rm")
    with replacing(Path(path)) as temporary:
        sheet.save(temporary, format="PNG")
