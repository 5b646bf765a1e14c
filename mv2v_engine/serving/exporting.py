"""A session as a zip: videos, pictures, one sheet of all pictures, and what is known of it."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mv2v_engine.camera.trajectories import moves_of
from mv2v_engine.serving.store.folders import result_path
from mv2v_engine.serving.store.records import SessionRecord, TurnFile, TurnRecord

# fields of a session that are nobody's business outside the service
_INNER = ("owner", "files", "identity")
# of a move that is more than 0 and less, and its unit
_DIRECTIONS = {
    "arc": ("right", "left", "°"),
    "pan": ("right", "left", "°"),
    "tilt": ("up", "down", "°"),
    "zoom": ("in", "out", " m"),
    "slide": ("right", "left", " m"),
    "lift": ("up", "down", " m"),
    "crane": ("up", "down", " m"),
}
_OWN_CAMERA = "The source's own camera"
_COLUMNS, _MARGIN, _CAPTION = 4, 12, 20  # the sheet's columns; pixels
_CELL = (320, 240)  # pixels that a picture has at most


def write_export(
    path: Path,
    folder: Path,
    session: SessionRecord,
    turns: Sequence[TurnRecord],
    whole: Sequence[Sequence[TurnFile]],
) -> None:
    """Videos and thumbnails as they are, for they are compressed, and what is known of them.

    whole: the files of each turn that are as recorded.

    Raises:
        OSError: the place cannot be written; nothing is left there.
    """
    about: dict[str, Any] = {k: v for k, v in asdict(session).items() if k not in _INNER}
    about |= {"num_references": session.num_references, "has_mask": session.has_mask}
    pictures = []
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
            about["turns"] = []
            for turn, results in zip(turns, whole, strict=True):
                files = []
                for which in results:
                    result = result_path(folder, turn.number, which)
                    if result.exists():
                        file.write(result, result.name)
                        files.append(result.name)
                        if which == "thumbnail":
                            pictures.append((_caption(turn), result))
                about["turns"].append(_about(turn) | {"files": files})
            sheet = contact_sheet(pictures)
            if sheet is not None:
                file.writestr("contact_sheet.jpg", sheet)
            file.writestr("session.json", json.dumps(about, indent=2))
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _about(turn: TurnRecord) -> dict[str, Any]:
    names = ("number", "name", "notes", "is_favourite", "request", "report", "damage", "forgotten")
    return {name: getattr(turn, name) for name in names}


def _caption(turn: TurnRecord) -> str:
    words = turn.name or request_words(turn.request)
    return f"{turn.number}  {words}" + ("  *" if turn.is_favourite else "")


def request_words(request: dict[str, Any]) -> str:
    """What the page calls a turn's request, as "Arc left 40°"."""
    camera = request.get("camera")
    if camera is None:
        return str(request.get("prompt") or "")
    if not isinstance(camera, str):
        return str(camera.get("name", "Camera path"))
    return ", ".join(map(_move_words, moves_of(camera)))


def _move_words(move: str) -> str:
    kind, _, amounts = move.partition(":")
    if kind == "static":
        return _OWN_CAMERA
    if kind == "translate":
        x, y, z = map(float, amounts.split(","))
        along = {"slide": x, "lift": -y, "zoom": z}  # y points down
        words = [_axis_words(axis, amount) for axis, amount in along.items() if amount]
        return ", ".join(words) or _OWN_CAMERA
    if kind in _DIRECTIONS and amounts and "," not in amounts:
        return _axis_words(kind, float(amounts))
    return f"{kind.replace('_', ' ').capitalize()} {amounts}".rstrip()


def _axis_words(axis: str, amount: float) -> str:
    *directions, unit = _DIRECTIONS[axis]
    return f"{axis.capitalize()} {directions[amount < 0]} {abs(amount):g}{unit}"


def contact_sheet(pictures: Sequence[tuple[str, Path]]) -> bytes | None:
    """A JPEG of all pictures, each over its caption; None if there is none that can be read."""
    from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

    cells = []
    for words, path in pictures:
        try:
            with Image.open(path) as opened:
                picture = opened.convert("RGB")
        except UnidentifiedImageError:
            continue
        picture.thumbnail(_CELL)
        cells.append((words, picture))
    if not cells:
        return None
    width = max(picture.width for _, picture in cells)
    height = max(picture.height for _, picture in cells) + _CAPTION
    columns = min(_COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    size = (columns * (width + _MARGIN) + _MARGIN, rows * (height + _MARGIN) + _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for place, (words, picture) in enumerate(cells):
        left = _MARGIN + place % columns * (width + _MARGIN)
        top = _MARGIN + place // columns * (height + _MARGIN)
        sheet.paste(picture, (left, top))
        while draw.textlength(words, font) > width:
            words = words[:-2].rstrip("\N{HORIZONTAL ELLIPSIS}") + "\N{HORIZONTAL ELLIPSIS}"
        draw.text((left, top + height - _CAPTION + 2), words, "black", font)
    encoded = io.BytesIO()
    sheet.save(encoded, "JPEG", quality=88)
    return encoded.getvalue()
