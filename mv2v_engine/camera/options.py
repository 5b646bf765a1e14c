"""What is asked for behind a camera file's name: `transforms.json?relative&scale=0.01`."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from mv2v_engine.camera.reading import Axes, Direction, Quaternion
from mv2v_engine.errors import CameraError, nearest_names

Order = Literal["name", "file"]
Lenses = Literal["file", "default"]
_MAX_SCALE = 1e9
_ALIASES = {
    "axes": {"blender": "opengl"},
    "direction": {"camera-to-world": "c2w", "world-to-camera": "w2c"},
}


@dataclass(frozen=True)
class CameraOptions:
    """What is done with the poses of a camera file, as it is written behind a question mark.

    axes: of the camera: "opencv" (x right, y down, z forward) or "opengl" (x right, y up, z
        backward); the format's if not given.
    direction: "c2w" (camera-to-world) or "w2c"; the format's if not given.
    order: of named frames, by their names or as the file has them.
    frames: "A:B", which of the poses are taken, as Python slices, in that order.
    scale: what the places are multiplied with to be metres.
    relative: whether poses are taken relative to the first.
    resample: whether there may be another number of poses than of frames.
    lens: the file's own, or the default one.
    quaternion: in which order TUM's text has them.
    unchecked: whether a path that looks wrong is taken.
    """

    axes: Axes | None = None
    direction: Direction | None = None
    order: Order = "name"
    frames: str | None = None
    scale: float = 1.0
    relative: bool = False
    resample: bool = False
    lens: Lenses = "file"
    quaternion: Quaternion = "xyzw"
    unchecked: bool = False

    @classmethod
    def parsed(cls, text: str, name: str) -> CameraOptions:
        """Options as `relative&scale=0.01`. name: of the file, for an error.

        Raises:
            CameraError: an unknown option, one given twice, or a value that it cannot have.
        """
        known = [field.name for field in fields(cls)]
        values: dict[str, Any] = {}
        for word in text.split("&") if text else ():
            option, equals, value = word.partition("=")
            if option not in known:
                raise CameraError(
                    f"{name} has no option {option[:40]!r}; nearest: "
                    f"{nearest_names(option[:40], known)}; options are {', '.join(known)}"
                )
            if option in values:
                raise CameraError(f"{name} has the option {option} twice; give it once")
            values[option] = _option(name, option, value if equals else None)
        return cls(**values)


def _option(name: str, option: str, value: str | None) -> Any:
    def mistaken(expected: str) -> CameraError:
        got = "nothing" if value is None else repr(value[:40])
        return CameraError(f"{name}: option {option} {expected}, got {got}")

    if option in ("relative", "resample", "unchecked"):
        if value is not None:
            raise mistaken("takes no value")
        return True
    if option == "scale":
        try:
            scale = float(value or "")
        except ValueError:
            scale = 0.0
        if not 1 / _MAX_SCALE <= scale <= _MAX_SCALE:
            raise mistaken("must be a positive number, such as scale=0.01 for centimetres")
        return scale
    if option == "frames":
        if not re.fullmatch(r"-?\d{0,9}:-?\d{0,9}(:[1-9]\d{0,8})?", value or "", re.ASCII):
            raise mistaken("must be FIRST:STOP or FIRST:STOP:STEP, such as frames=0:17")
        return value
    kinds: dict[str, Any] = {
        "axes": Axes,
        "direction": Direction,
        "order": Order,
        "lens": Lenses,
        "quaternion": Quaternion,
    }
    words = get_args(kinds[option])
    word = _ALIASES.get(option, {}).get(value or "", value)
    if word not in words:
        raise mistaken(f"must be {' or '.join(words)}")
    return word
