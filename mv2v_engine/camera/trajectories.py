"""Camera trajectories: the ten presets of ReCamMaster and the parametrised moves behind them.

A move is written `name` for a preset, or `kind:amount` for a move of one's own:
`pan:30` (degrees, right positive), `tilt:-10` (degrees, up positive), `zoom:1.5` (metres,
forward positive), `translate:x,y,z` (metres), `arc:-45` or `arc:-45,3` (degrees about a point
`radius` metres ahead, left negative), `static`. Moves and presets add up: `pan:30+tilt:10`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mv2v_engine import arguments
from mv2v_engine.camera.poses import (
    MAX_METRES,
    compose,
    default_intrinsics,
    identity_poses,
    look_at_angle,
    matrices,
    normalised_intrinsics,
    pose_vectors,
    rotation_pitch,
    rotation_yaw,
    validate_poses,
)
from mv2v_engine.errors import CameraError, nearest_names

_SKEW = 1e-3  # share of the focal length below which a skew is taken for none
# the most of one move: ten turns of a camera, and as far as a pose may lie
MOST = {"degrees": 3600.0, "metres": MAX_METRES}
MAX_MOVES = 16  # the most moves that one camera adds up
SUBJECT_DISTANCE = 4.0  # metres; the point that ReCamMaster's arcs and translations face


@dataclass(frozen=True, eq=False)
class CameraTrajectory:
    """A camera's path through a video.

    Tensors, arrays and lists are taken; the fields are float32 tensors on the CPU.

    Args:
        poses: [T, 3, 4] or [T, 4, 4], camera-to-world, OpenCV axes, metres.
        intrinsics: of a pinhole, pixels of `size`, [3, 3] or, where the lens zooms, one per frame
            [T, 3, 3].
        size: (height, width) of the image that the intrinsics refer to.
        name: how a report calls it.
        notes: what was changed of it when it was read, in words.

    Raises:
        CameraError, RequestError: an argument is no such thing.
    """

    poses: Tensor
    intrinsics: Tensor
    size: tuple[int, int]
    name: str = "custom"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        poses = validate_poses(self.poses)
        intrinsics = matrices("intrinsics", self.intrinsics).to(torch.float32)
        require_pinhole(intrinsics, len(poses))
        arguments.text("name", self.name)
        notes = tuple(
            arguments.text("notes", words)
            for words in arguments.sequence("notes", self.notes, str, "sentences")
        )
        size = checked_size(self.size)
        object.__setattr__(self, "poses", poses)
        object.__setattr__(self, "intrinsics", intrinsics)
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "notes", notes)

    __repr__ = arguments.short_repr

    @property
    def num_frames(self) -> int:
        return len(self.poses)

    def vectors(self, dim: int = 16, *, stride: int = 4) -> Tensor:
        """The camera of every latent frame, the first `dim` of its 16 numbers (METHOD 5): [F, dim].

        They are row-major [R|t] of every `stride`-th frame, then its `normalised_intrinsics`. Of
        more than 16 numbers they are the 16 of each of a latent frame's frames; the first latent
        frame has the first frame as often as the others have frames.
        """
        lens = normalised_intrinsics(self.intrinsics, self.size).expand(self.num_frames, 4)
        if dim > 16:
            each = torch.cat([pose_vectors(self.poses, stride=1), lens], -1)
            return torch.cat([each[:1].expand(dim // 16 - 1, -1), each]).reshape(-1, dim)
        return torch.cat([pose_vectors(self.poses, stride=stride), lens[::stride]], -1)[:, :dim]

    def resized(self, size: tuple[int, int]) -> CameraTrajectory:
        """The same path seen at another image size: intrinsics scale, poses stay."""
        size = checked_size(size)
        factors = [size[1] / self.size[1], size[0] / self.size[0], 1.0]
        return replace(self, intrinsics=self.intrinsics * _floats(factors)[:, None], size=size)


def covering_intrinsics(
    intrinsics: Tensor, size: tuple[float, float], covered: tuple[int, int]
) -> Tensor:
    """Intrinsics [..., 3, 3] of images whose middle, scaled, covers another (height, width).

    Sources are cropped so, and the frames that models were trained on: square pixels stay square.
    """
    scale = max(covered[0] / size[0], covered[1] / size[1])
    moved = [(covered[1] - size[1] * scale) / 2, (covered[0] - size[0] * scale) / 2]
    rows = [[scale, 0.0, moved[0]], [0.0, scale, moved[1]], [0.0, 0.0, 1.0]]
    return torch.tensor(rows, dtype=intrinsics.dtype, device=intrinsics.device) @ intrinsics


def require_pinhole(intrinsics: Tensor, num_frames: int) -> None:
    """Refuse what is not [[fx, 0, cx], [0, fy, cy], [0, 0, 1]], or one of these a frame.

    Raises:
        CameraError: naming the first frame that has others, and what it has.
    """
    shape = tuple(intrinsics.shape)
    if shape not in ((3, 3), (num_frames, 3, 3)):
        raise CameraError(
            f"intrinsics must have shape [3, 3] or [{num_frames}, 3, 3], got {list(shape)}"
        )
    focal = intrinsics.diagonal(dim1=-2, dim2=-1)[..., :2]
    if not bool(intrinsics.isfinite().all()) or bool((focal <= 0).any()):
        raise CameraError("intrinsics must be finite with positive focal lengths")
    for frame, k in enumerate(intrinsics.reshape(-1, 3, 3)):
        beside = torch.stack([k[0, 1], k[1, 0]]) / k[0, 0]
        last = k[2] - k.new_tensor([0.0, 0.0, 1.0])
        if float(beside.abs().max()) > _SKEW or float(last.abs().max()) > _SKEW:
            what = f"a skew of {float(k[0, 1]):g} pixels" if k[0, 1] else "other entries"
            advice = "rectify the frames, and give what their lens is then"
            if float(last.abs().max()) > _SKEW:
                what, advice = f"a last row of {k[2].tolist()}", "transpose the matrix?"
            raise CameraError(
                f"the intrinsics of frame {frame} are no pinhole's: got {what} in {k.tolist()}, "
                f"expected [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]; {advice}"
            )


def checked_size(size: Any) -> tuple[int, int]:
    """An image's (height, width).

    Raises:
        CameraError: it is not two positive integers.
    """
    try:
        height, width = (arguments.integer("size", side) for side in size)
        if min(height, width) < 1:
            raise ValueError
    except (TypeError, ValueError):
        raise arguments.mistaken(
            "size", size, "(height, width), two positive integers", kind=CameraError
        ) from None
    return height, width


def _floats(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")


def _progress(num_frames: int) -> Tensor:
    """Fraction of the move done at each frame: constant speed, as the presets (BASE_MODELS 2.5)."""
    # one frame is the move's beginning
    return torch.linspace(0.0, 1.0, num_frames, dtype=torch.float32, device="cpu")


def _join(rotation: Tensor, translation: Tensor) -> Tensor:
    return torch.cat([rotation, translation[..., None]], dim=-1)


def pan(num_frames: int, degrees: float) -> Tensor:
    """Turn in place about the vertical axis; positive looks right. Poses [T, 3, 4]."""
    rotation = rotation_yaw(_progress(num_frames) * degrees)
    return _join(rotation, _floats([0.0] * 3).expand(num_frames, 3))


def tilt(num_frames: int, degrees: float) -> Tensor:
    """Turn in place about the horizontal axis; positive looks up. Poses [T, 3, 4]."""
    rotation = rotation_pitch(_progress(num_frames) * degrees)
    return _join(rotation, _floats([0.0] * 3).expand(num_frames, 3))


def translate(num_frames: int, x: float, y: float, z: float) -> Tensor:
    """Move without turning, metres along the first camera's axes. Poses [T, 3, 4]."""
    offset = _progress(num_frames)[:, None] * _floats([x, y, z])
    return _join(identity_poses(num_frames)[..., :3], offset)


def crane(num_frames: int, rise: float, *, distance: float = SUBJECT_DISTANCE) -> Tensor:
    """Rise (metres, negative sinks) while tilting to face the subject. Poses [T, 3, 4]."""
    progress = _progress(num_frames)
    offset = torch.stack([0 * progress, -rise * progress, 0 * progress], dim=-1)
    return _join(rotation_pitch(-look_at_angle(rise, distance) * progress), offset)


def arc(num_frames: int, degrees: float, *, radius: float = SUBJECT_DISTANCE) -> Tensor:
    """Orbit a point `radius` metres ahead; positive moves right and looks left. [T, 3, 4]."""
    angle = _progress(num_frames) * degrees
    radians = torch.deg2rad(angle)
    offset = torch.stack([radians.sin(), 0 * radians, 1 - radians.cos()], dim=-1) * radius
    return _join(rotation_yaw(-angle), offset)


def _chord(num_frames: int, degrees: float, x: float, z: float) -> Tensor:
    """The shipped arcs: a constant turn while moving along the chord, not along the circle."""
    rotation = rotation_yaw(_progress(num_frames) * degrees)
    return _join(rotation, _progress(num_frames)[:, None] * _floats([x, 0.0, z]))


# End poses as computed from ReCamMaster's shipped extrinsics (BASE_MODELS 2.5).
PRESETS: dict[str, Callable[[int], Tensor]] = {
    "pan_right": lambda t: pan(t, 19.88),
    "pan_left": lambda t: pan(t, -19.88),
    "tilt_up": lambda t: tilt(t, 9.94),
    "tilt_down": lambda t: tilt(t, -9.94),
    "zoom_in": lambda t: translate(t, 0.0, 0.0, 1.988),
    "zoom_out": lambda t: translate(t, 0.0, 0.0, -1.988),
    "translate_up": lambda t: crane(t, 0.994),
    "translate_down": lambda t: crane(t, -0.994),
    "arc_left": lambda t: _chord(t, 29.82, -1.988, 0.533),
    "arc_right": lambda t: _chord(t, -29.82, 1.988, 0.533),
}

# each name's move, how many amounts it takes, their units, and how it is written
_MOVES: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[str, ...], str]] = {
    "pan": (pan, (1,), ("degrees",), "pan:DEGREES"),
    "tilt": (tilt, (1,), ("degrees",), "tilt:DEGREES"),
    "zoom": (lambda t, z: translate(t, 0.0, 0.0, z), (1,), ("metres",), "zoom:METRES"),
    "translate": (translate, (3,), ("metres",) * 3, "translate:X,Y,Z in metres"),
    "crane": (crane, (1,), ("metres",), "crane:METRES"),
    "arc": (
        lambda t, degrees, radius=SUBJECT_DISTANCE: arc(t, degrees, radius=radius),
        (1, 2),
        ("degrees", "metres"),
        "arc:DEGREES or arc:DEGREES,RADIUS",
    ),
    "static": (identity_poses, (0,), (), "static"),
}


# in which moves are made that are added up
_ORDER = ("arc", "translate", "crane", "zoom", "pan", "tilt", "static")
# a sign before a number adds nothing up
_PLUS = re.compile(r" *\+ *(?=[A-Za-z_])")
_AMOUNT = re.compile(r" *[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)? *")


def _move_poses(spec: str, num_frames: int) -> Tensor:
    """Poses [T, 3, 4] of one preset or move; raises as `named_poses`."""
    if spec in PRESETS:
        return PRESETS[spec](num_frames)
    kind, _, text = spec.partition(":")
    if kind not in _MOVES:
        near = nearest_names(spec, [*PRESETS, *_MOVES])
        raise CameraError(
            f"unknown camera {spec!r}; nearest: {near}. Presets: {', '.join(PRESETS)}; "
            f"moves: {', '.join(usage for *_, usage in _MOVES.values())}, which add up as in "
            "pan:30+tilt:10; or poses as JSON"
        )
    move, counts, units, usage = _MOVES[kind]
    parts = text.split(",") if text else []
    # float itself takes more, such as "1_0" and digits of other scripts
    amounts = [float(part) for part in parts if _AMOUNT.fullmatch(part)]
    if len(amounts) < len(parts) or not all(math.isfinite(amount) for amount in amounts):
        raise CameraError(f"camera {spec!r}: amounts must be finite numbers; write {usage}")
    if len(amounts) not in counts:
        got = "1 amount" if len(amounts) == 1 else f"{len(amounts)} amounts"
        raise CameraError(f"camera {spec!r}: got {got}; write {usage}")
    for amount, unit in zip(amounts, units, strict=False):
        if abs(amount) > MOST[unit]:
            raise CameraError(
                f"camera {spec!r}: {amount:g} {unit} are too many; a move may have "
                f"{-MOST[unit]:g} to {MOST[unit]:g} {unit}"
            )
    return move(num_frames, *amounts)


def moves_of(spec: str) -> list[str]:
    """The moves that a camera's name adds up."""
    return _PLUS.split(spec)


def is_move(spec: str) -> bool:
    """Whether a camera's name begins as a preset or a move does."""
    name = re.split(r"[:+]", spec, maxsplit=1)[0].strip()
    return name in PRESETS or name in _MOVES


def named_poses(spec: str, num_frames: int) -> Tensor:
    """Poses [T, 3, 4] of presets and `kind:amount` moves (see the module docstring).

    Several are made at once, in one order however they are written: first those that move the
    camera, then pan, then tilt, so that the horizon stays level.

    Raises:
        CameraError: unknown name (nearest ones offered), wrong number of amounts, not numbers,
            more than `MOST`, or more than `MAX_MOVES`.
    """
    parts = moves_of(spec)
    if len(parts) > MAX_MOVES:
        raise CameraError(f"a camera adds up {len(parts)} moves; at most {MAX_MOVES} are taken")
    # sorted is stable: moves of one kind stay as they are written
    parts.sort(key=_place_in_order)
    poses = _move_poses(parts[0], num_frames)
    for part in parts[1:]:
        poses = compose(poses, _move_poses(part, num_frames))
    return poses


def _place_in_order(move: str) -> int:
    kind = re.split(r"[:_]", move, maxsplit=1)[0]
    return _ORDER.index(kind) if kind in _ORDER else 0


def named_trajectory(spec: str, num_frames: int, size: tuple[int, int]) -> CameraTrajectory:
    """Presets and `kind:amount` moves as a trajectory with the default 24 mm intrinsics."""
    return CameraTrajectory(named_poses(spec, num_frames), default_intrinsics(*size), size, spec)
