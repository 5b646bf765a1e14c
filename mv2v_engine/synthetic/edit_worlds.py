"""Worlds to edit: a room with a few objects of clear names, and long camera paths through it.

Object 0 is the target: it stands in the first view, and at least one phrase names it alone. Rooms
are `make_world`'s. Rates of motion are per window of the clip, so that long clips are no slower.

N objects, S surfaces (6 walls, then the N objects), T frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mv2v_engine.camera.poses import default_intrinsics, rotation_pitch, rotation_yaw
from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.synthetic.colours import COLOUR_NAMES, draw_shade
from mv2v_engine.synthetic.instructions import OBJECT_NOUNS
from mv2v_engine.synthetic.render import frame_time, object_poses
from mv2v_engine.synthetic.worlds import NUM_WALLS, SPHERE, Grade, Textures, World, make_world

WINDOW = 17  # frames that rates of motion refer to

_APART = 13.0  # degrees between objects as the first camera sees them
_TRIES = 40
_CAMERAS_FROM = 1 << 42  # apart from the seeds of worlds


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What words can tell of an object: its shape, its colour's name, whether it is tall."""

    kind: int
    colour: str
    tall: bool

    def phrases(self) -> tuple[str, ...]:
        """Noun phrases that are true of it."""
        nouns = OBJECT_NOUNS[self.kind]
        tall = tuple(f"tall {noun}" for noun in nouns if self.tall)
        return (*nouns, *tall, *(f"{self.colour} {noun}" for noun in nouns))


@dataclass(frozen=True, eq=False)
class EditWorld:
    """A world, and what words can tell of its objects."""

    world: World
    looks: tuple[Look, ...]

    @property
    def target_phrases(self) -> tuple[str, ...]:
        """Noun phrases that are true of the target and of nothing else here."""
        others = {phrase for look in self.looks[1:] for phrase in look.phrases()}
        return tuple(phrase for phrase in self.looks[0].phrases() if phrase not in others)


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(1, generator=generator))


def _chance(generator: torch.Generator, probability: float) -> bool:
    return float(torch.rand(1, generator=generator)) < probability


def _pick(generator: torch.Generator, count: int) -> int:
    return int(torch.randint(count, (1,), generator=generator))


def _draw_look(generator: torch.Generator) -> Look:
    kind = _pick(generator, len(OBJECT_NOUNS))
    colour = COLOUR_NAMES[_pick(generator, len(COLOUR_NAMES))]
    return Look(kind=kind, colour=colour, tall=kind != SPHERE and _chance(generator, 0.5))


def _draw_looks(generator: torch.Generator, target: Look | None) -> tuple[Look, ...]:
    """A target with a name of its own, and two to four others."""
    looks = [_draw_look(generator) if target is None else target]
    count = 3 + _pick(generator, 3)
    while len(looks) < count:
        look = _draw_look(generator)
        taken = {phrase for other in (*looks[1:], look) for phrase in other.phrases()}
        is_rival = target is not None and look.kind == target.kind
        if not is_rival and set(looks[0].phrases()) - taken:
            looks.append(look)
    return tuple(looks)


def _half_size(look: Look, generator: torch.Generator) -> list[float]:
    if look.kind == SPHERE:
        return [_uniform(generator, 0.42, 0.6)] * 3
    height = _uniform(generator, 0.48, 0.56) if look.tall else _uniform(generator, 0.3, 0.4)
    width = _uniform(generator, 0.3, 0.36) if look.tall else _uniform(generator, 0.4, 0.56)
    return [width, height, width]


def _places(generator: torch.Generator, count: int) -> list[tuple[float, float]]:
    """(x, z) on the floor: the target ahead, the others apart from each other in angle."""
    angles, places = [_uniform(generator, -10, 10)], []
    for _ in range(_TRIES):
        angle = _uniform(generator, -48, 48)
        if len(angles) < count and all(abs(angle - other) > _APART for other in angles):
            angles.append(angle)
    for index, angle in enumerate(angles):
        depth = _uniform(generator, 3.3, 4.2) if index == 0 else _uniform(generator, 3.4, 5.0)
        # no nearer to a side wall than the narrowest room allows
        places.append((max(-2.7, min(2.7, depth * math.tan(math.radians(angle)))), depth))
    return places


def _object_textures(looks: tuple[Look, ...], generator: torch.Generator) -> Textures:
    """One colour's shades in soft waves: an object keeps its colour's name all over."""
    num = len(looks)
    colour_a = torch.stack([draw_shade(look.colour, generator) for look in looks])
    direction = torch.nn.functional.normalize(torch.randn(num, 3, 3, generator=generator), dim=-1)
    length = 0.35 + 0.85 * torch.rand(num, 3, generator=generator)
    weight = torch.rand(num, generator=generator)
    darker = 0.8 + 0.15 * torch.rand(num, 1, generator=generator)
    return Textures(
        colour_a_S3=colour_a,
        colour_b_S3=colour_a * darker,
        waves_S33=direction * (2 * torch.pi / length)[..., None],
        phases_S3=2 * torch.pi * torch.rand(num, 3, generator=generator),
        weights_S2=torch.stack([weight, 1 - weight], dim=-1),
        sharpness_S=1 + 2 * torch.rand(num, generator=generator),
    )


def make_edit_world(
    seed: int,
    *,
    num_frames: int,
    moving: bool | None = None,
    target: Look | None = None,
    grade: Grade = "textured",
) -> EditWorld:
    """The world of a seed, for a clip of `num_frames`.

    moving: whether the target moves; None draws it. target: what the target must be, and the
    plain noun then names it; None draws that too. grade: of the room; since the things in it are
    this module's own, a furnished one is as plain as a plain one.
    """
    generator = torch.Generator().manual_seed(seed)
    room = make_world(seed, grade)
    looks = _draw_looks(generator, target)
    places = _places(generator, len(looks))
    looks = looks[: len(places)]
    num, windows = len(looks), num_frames / WINDOW
    half = torch.tensor([_half_size(look, generator) for look in looks])
    # nearer than in `make_world`, so that what stands on it is in view whole
    floor = _uniform(generator, 0.9, 1.1)
    centre = torch.tensor([[x, 0.0, z] for x, z in places])
    centre[:, 1] = floor - half[:, 1]
    moves = torch.rand(num, generator=generator) < 0.4
    if moving is not None:
        moves[0] = moving
    reach = 0.6 + 0.8 * torch.rand(num, generator=generator)
    side = torch.where(torch.rand(num, generator=generator) < 0.5, -1.0, 1.0)
    swing = torch.stack([reach * side, 0 * reach, 0.3 * reach], dim=-1) * moves[:, None]
    objects = _object_textures(looks, generator)
    world = replace(
        room,
        room_max_3=torch.stack([room.room_max_3[0], torch.tensor(floor), room.room_max_3[2]]),
        kind_N=torch.tensor([look.kind for look in looks]),
        centre_N3=centre,
        half_size_N3=half,
        yaw_N=torch.pi * torch.rand(num, generator=generator),
        swing_N3=swing,
        rate_N=(0.15 + 0.15 * torch.rand(num, generator=generator)) * windows,
        phase_N=torch.zeros(num),
        spin_N=(torch.rand(num, generator=generator) - 0.5) * windows * moves,
        textures=room.textures.of(slice(NUM_WALLS)).followed_by(objects),
    )
    return EditWorld(world, looks)


def _path(kind: str, num_frames: int, generator: torch.Generator) -> Tensor:
    """Poses [T, 3, 4] of a smooth path that returns again and again to where it began."""
    time = torch.arange(num_frames) / WINDOW
    side = 1.0 if _chance(generator, 0.5) else -1.0
    swing = side * (2 * torch.pi * time / _uniform(generator, 5.5, 7.5)).sin()
    slow = (2 * torch.pi * time / _uniform(generator, 5.0, 9.0)).sin()
    yaw, position = 1.5 * slow, torch.zeros(num_frames, 3)
    if kind == "look away":
        yaw = yaw + _uniform(generator, 34, 42) * swing
    elif kind == "orbit":
        angle = _uniform(generator, 20, 34) * swing
        radians = torch.deg2rad(angle)
        yaw = yaw - angle
        position = torch.stack([radians.sin(), 0 * radians, 1 - radians.cos()], dim=-1) * 3.8
    elif kind == "dolly":
        amounts = torch.tensor([_uniform(generator, 0.5, 1.2), -0.15, _uniform(generator, 0, 0.6)])
        position = torch.stack([swing, slow, swing.abs()], dim=-1) * amounts
    pitch = _uniform(generator, -1.5, 1.5) + slow
    rotation = rotation_yaw(yaw) @ rotation_pitch(pitch)
    return torch.cat([rotation, position[..., None]], dim=-1)


def target_in_view(world: World, trajectory: CameraTrajectory) -> Tensor:
    """bool [T]: the frames whose image holds the target's centre; what may hide it is ignored."""
    height, width = trajectory.size
    inside = []
    for frame in range(trajectory.num_frames):
        centre, _ = object_poses(world, frame_time(trajectory, frame))
        pose = trajectory.poses[frame]
        pixel = trajectory.intrinsics @ (pose[:, :3].T @ (centre[0] - pose[:, 3]))
        x, y = (pixel[:2] / pixel[2].clamp_min(1e-6)).tolist()
        inside.append(bool(pixel[2] > 0) and 0 <= x < width and 0 <= y < height)
    return torch.tensor(inside)


def _returns(inside: Tensor) -> bool:
    """Whether the target is seen at first, then gone for half a window, then seen again."""
    flags = "".join("x" if seen else "." for seen in inside.tolist())
    gone = flags.find("." * (WINDOW // 2))
    return gone > WINDOW // 2 and "x" * (WINDOW // 4) in flags[gone:]


def loop_camera(*, num_frames: int, size: tuple[int, int], degrees: float) -> CameraTrajectory:
    """A camera that turns away from the target and back, so that its frames can be repeated: the
    frame behind the last one would be the first."""
    time = torch.arange(num_frames) / num_frames
    rotation = rotation_yaw(degrees * (1 - (2 * torch.pi * time).cos()) / 2)
    poses = torch.cat([rotation, torch.zeros(num_frames, 3, 1)], dim=-1)
    return CameraTrajectory(poses, default_intrinsics(*size), size, "loop")


PATHS = ("look away", "orbit", "dolly", "static")


def edit_camera(
    edit_world: EditWorld, seed: int, *, num_frames: int, size: tuple[int, int]
) -> CameraTrajectory:
    """The camera of a clip, named by its path.

    On half of the clips it looks away from the target and back ("look away"); on the others the
    target is in half of the frames or more. A still camera films moving targets only.
    """
    generator = torch.Generator().manual_seed(_CAMERAS_FROM + seed)
    is_still = not bool(edit_world.world.swing_N3[0].any())
    intrinsics = default_intrinsics(*size)
    kind = "look away" if _chance(generator, 0.5) else PATHS[1 + _pick(generator, 3 - is_still)]
    for _ in range(_TRIES):
        poses = _path(kind, num_frames, generator)
        camera = CameraTrajectory(poses, intrinsics, size, kind)
        inside = target_in_view(edit_world.world, camera)
        if kind == "look away" and num_frames > 3 * WINDOW:
            if _returns(inside):
                return camera
        elif bool(inside[0]) and float(inside.float().mean()) > 0.5:
            return camera
    return CameraTrajectory(_path("dolly", num_frames, generator), intrinsics, size, "dolly")
