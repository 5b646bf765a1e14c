"""Seeded worlds: a room with coloured, partly moving objects in and out of view.

The world frame is the source camera's first frame: OpenCV axes, metres. Objects live between
and beside the camera and the far wall, so that every preset move uncovers some the source
never sees. Everything is a batch over surfaces, which keeps the ray caster vectorised.

Worlds come in grades. "textured": patterns of two colours on everything. "plain": colours that vary
slowly, larger things, and one of them just outside of every edge of the first view, so that
whatever the move, it uncovers a thing whose colour the source does not tell. "furnished": plain,
and partitions from floor to ceiling that hide what stands behind them.

N objects, S surfaces (6 walls, then the N objects).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor

from mv2v_engine.errors import RequestError

Grade = Literal["plain", "furnished", "textured"]

SPHERE, BOX, CYLINDER = 0, 1, 2
NUM_WALLS = 6

# worlds from this seed on are never trained on
HELD_OUT = 1_000_000


@dataclass(frozen=True, eq=False)
class Textures:
    """Solid textures: two colours mixed by a soft sum and product of three plane waves."""

    colour_a_S3: Tensor
    colour_b_S3: Tensor
    waves_S33: Tensor  # radians per metre, one row per wave
    phases_S3: Tensor
    weights_S2: Tensor  # of the waves' mean and of their product
    sharpness_S: Tensor


@dataclass(frozen=True, eq=False)
class World:
    """One scene. Motion is a sinusoid along `swing` with period of one clip times `rate`."""

    seed: int
    room_min_3: Tensor
    room_max_3: Tensor
    kind_N: Tensor
    centre_N3: Tensor
    half_size_N3: Tensor
    yaw_N: Tensor  # radians
    swing_N3: Tensor  # metres, zero for a still object
    rate_N: Tensor
    phase_N: Tensor
    spin_N: Tensor  # radians over the clip
    textures: Textures
    light_3: Tensor

    def to(self, device: torch.device | str) -> World:
        """The same world with its tensors on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved["textures"] = Textures(
            **{f.name: getattr(self.textures, f.name).to(device) for f in fields(Textures)}
        )
        for name, value in moved.items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device)
        return World(**moved)


def _uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _colours(generator: torch.Generator, count: int, *, vivid: bool) -> Tensor:
    """Random colours [count, 3] in 0..1; vivid ones have one strong and one weak channel."""
    colours = _uniform(generator, 0.25, 0.85, count, 3)
    if vivid:
        order = torch.rand(count, 3, generator=generator).argsort(1)
        colours = torch.tensor([0.12, 0.45, 0.9])[order] + _uniform(generator, -0.1, 0.1, count, 3)
    return colours.clamp(0.05, 0.95)


def _textures(generator: torch.Generator, num_objects: int) -> Textures:
    num = NUM_WALLS + num_objects
    is_object = torch.arange(num) >= NUM_WALLS
    colour_a = torch.cat(
        [_colours(generator, NUM_WALLS, vivid=False), _colours(generator, num_objects, vivid=True)]
    )
    contrast = torch.where(is_object, 0.65, 0.4)[:, None]
    colour_b = (colour_a + contrast * (_uniform(generator, -1, 1, num, 3))).clamp(0.05, 0.95)
    direction = torch.nn.functional.normalize(torch.randn(num, 3, 3, generator=generator), dim=-1)
    # wave lengths of 0.9 to 3.5 metres on walls, 0.35 to 1.2 on objects: resolvable at 96x160
    length = torch.where(
        is_object[:, None],
        _uniform(generator, 0.35, 1.2, num, 3),
        _uniform(generator, 0.9, 3.5, num, 3),
    )
    weight = torch.rand(num, generator=generator)
    return Textures(
        colour_a_S3=colour_a,
        colour_b_S3=colour_b,
        waves_S33=direction * (2 * torch.pi / length)[..., None],
        phases_S3=_uniform(generator, 0, 2 * torch.pi, num, 3),
        weights_S2=torch.stack([weight, 1 - weight], dim=-1),
        sharpness_S=_uniform(generator, 1.0, 3.0, num),
    )


def make_world(seed: int, grade: Grade = "textured") -> World:
    """The world of a seed: the same on every machine.

    Raises:
        RequestError: the grade is none of those above.
    """
    if grade not in get_args(Grade):
        raise RequestError(f"a world's grade is one of {get_args(Grade)}, got {grade!r}")
    generator = torch.Generator().manual_seed(seed)
    return _textured(seed, generator) if grade == "textured" else _plain(seed, grade, generator)


def _textured(seed: int, generator: torch.Generator) -> World:
    # floor at 1.2-2 m below the camera, ceiling 1.8-3.2 m above it
    room_min = torch.stack(
        [
            _uniform(generator, -6.5, -3.5, 1)[0],
            _uniform(generator, -3.2, -1.8, 1)[0],
            _uniform(generator, -6.0, -4.0, 1)[0],
        ]
    )
    room_max = torch.stack(
        [
            _uniform(generator, 3.5, 6.5, 1)[0],
            _uniform(generator, 1.2, 2.0, 1)[0],
            _uniform(generator, 5.5, 8.5, 1)[0],
        ]
    )
    num_objects = int(torch.randint(6, 11, (1,), generator=generator))
    half_size = _uniform(generator, 0.3, 0.8, num_objects, 3)
    kind = torch.randint(0, 3, (num_objects,), generator=generator)
    half_size = torch.where(
        (kind == SPHERE)[:, None], half_size[:, :1].expand(-1, 3), half_size
    )  # one radius
    round_xz = half_size.clone()
    round_xz[:, 2] = round_xz[:, 0]
    half_size = torch.where((kind == CYLINDER)[:, None], round_xz, half_size)
    margin = half_size.amax(1, keepdim=True) + 0.2
    # in front of the camera for half of the objects, anywhere in the room's front half for the rest
    z = _uniform(generator, 2.8, 5.6, num_objects)
    in_view = torch.arange(num_objects) % 2 == 0
    spread = torch.where(in_view, 0.5, 1.6) * z
    x = _uniform(generator, -1, 1, num_objects) * spread
    y = torch.where(
        torch.rand(num_objects, generator=generator) < 0.65,
        room_max[1] - half_size[:, 1],  # standing on the floor
        _uniform(generator, -1.2, 0.6, num_objects),
    )
    centre = torch.stack([x, y, z], dim=-1)
    low, high = room_min + margin, room_max - margin
    low[:, 1], high[:, 1] = room_min[1] + half_size[:, 1], room_max[1] - half_size[:, 1]
    centre = torch.minimum(torch.maximum(centre, low), high)
    moves = (torch.rand(num_objects, generator=generator) < 0.35)[:, None]
    swing = _uniform(generator, -0.7, 0.7, num_objects, 3) * torch.tensor([1.0, 0.25, 0.6])
    light = torch.nn.functional.normalize(
        torch.stack([_uniform(generator, -1, 1, 1)[0], torch.tensor(-1.2), torch.tensor(-0.8)]),
        dim=0,
    )
    return World(
        seed=seed,
        room_min_3=room_min,
        room_max_3=room_max,
        kind_N=kind,
        centre_N3=centre,
        half_size_N3=half_size,
        yaw_N=_uniform(generator, 0, torch.pi, num_objects),
        swing_N3=swing * moves,
        rate_N=_uniform(generator, 0.4, 1.0, num_objects),
        phase_N=_uniform(generator, 0, 2 * torch.pi, num_objects),
        spin_N=_uniform(generator, -1.2, 1.2, num_objects) * moves[:, 0],
        textures=_textures(generator, num_objects),
        light_3=light,
    )


# Degrees from the optical axis at which a thing stands just outside of the first view, whose edges
# are at 26 degrees to the sides and 17 up and down, and how far beyond it may stand.
_BESIDE, _ABOVE, _FURTHER = 29.0, 18.0, 9.0


def _plain_textures(generator: torch.Generator, num_objects: int) -> Textures:
    """Walls of one muted and things of one vivid colour each, drifting slowly to a near one."""
    textures = _textures(generator, num_objects)
    near = torch.lerp(textures.colour_a_S3, textures.colour_b_S3, 0.15)
    return Textures(
        colour_a_S3=textures.colour_a_S3,
        colour_b_S3=near,
        waves_S33=textures.waves_S33 / 2,
        phases_S3=textures.phases_S3,
        weights_S2=textures.weights_S2,
        sharpness_S=textures.sharpness_S,
    )


def _plain(seed: int, grade: Grade, generator: torch.Generator) -> World:
    def between(low: float, high: float, *shape: int) -> Tensor:
        return _uniform(generator, low, high, *shape)

    room_min = torch.stack([between(-6.0, -4.0, 1)[0], between(-3.0, -2.2, 1)[0], torch.tensor(-5.0)])
    room_max = torch.stack(
        [between(4.0, 6.0, 1)[0], between(1.2, 1.8, 1)[0], between(5.5, 7.5, 1)[0]]
    )
    # angles from the axis: two or three in view, one beyond either side, one above, one below
    in_view = 2 + int(torch.randint(0, 2, (1,), generator=generator))
    seen = torch.linspace(-16.0, 16.0, in_view) + between(-5.0, 5.0, in_view)
    left, right = -_BESIDE - between(0, _FURTHER, 1), _BESIDE + between(0, _FURTHER, 1)
    yaw = torch.cat([seen, left, right, between(-18, 18, 2)])
    beyond = _ABOVE + between(0, _FURTHER / 2, 2)
    pitch = torch.cat([between(-2, 8, in_view + 2), torch.stack([-beyond[0], beyond[1]])])
    num = len(yaw)
    kind = torch.randint(0, 3, (num,), generator=generator)
    half_size = between(0.4, 0.8, num, 3)
    half_size[kind == SPHERE] = half_size[kind == SPHERE][:, :1]
    half_size[:, 2] = torch.where(kind == CYLINDER, half_size[:, 0], half_size[:, 2])
    z = between(3.2, 5.0, num)
    centre = torch.stack([z * torch.deg2rad(yaw).tan(), z * torch.deg2rad(pitch).tan(), z], dim=-1)
    # most of those beside the axis stand on the floor
    stands = (torch.rand(num, generator=generator) < 0.7) & (torch.arange(num) < in_view + 2)
    centre[:, 1] = torch.where(stands, room_max[1] - half_size[:, 1], centre[:, 1])
    moves = (torch.rand(num, generator=generator) < 0.25)[:, None]
    swing = between(-0.6, 0.6, num, 3) * torch.tensor([1.0, 0.2, 0.5])
    margin = half_size.amax(1, keepdim=True) + 0.1
    low, high = room_min + margin, room_max - margin
    low[:, 1], high[:, 1] = room_min[1] + half_size[:, 1], room_max[1] - half_size[:, 1]
    centre = torch.minimum(torch.maximum(centre, low), high)
    world = World(
        seed=seed,
        room_min_3=room_min,
        room_max_3=room_max,
        kind_N=kind,
        centre_N3=centre,
        half_size_N3=half_size,
        yaw_N=between(0, torch.pi, num),
        swing_N3=swing * moves,
        rate_N=between(0.4, 1.0, num),
        phase_N=between(0, 2 * torch.pi, num),
        spin_N=between(-1.0, 1.0, num) * moves[:, 0],
        textures=_plain_textures(generator, num),
        light_3=torch.nn.functional.normalize(
            torch.stack([between(-1, 1, 1)[0], torch.tensor(-1.2), torch.tensor(-0.8)]), dim=0
        ),
    )
    return world if grade == "plain" else _furnished(world, generator)


def _furnished(world: World, generator: torch.Generator) -> World:
    """Put up one or two partitions: boxes from floor to ceiling, from a side wall inwards, each
    with or without a doorway, and a thing behind each."""
    low, high = world.room_min_3, world.room_max_3
    middle, half_height = (low[1] + high[1]) / 2, (high[1] - low[1]) / 2
    sides = torch.tensor([-1.0, 1.0])[torch.randperm(2, generator=generator)]
    count = 1 + int(torch.randint(0, 2, (1,), generator=generator))
    centres, halves, kinds = [], [], []
    for side in sides[:count].tolist():
        z = float(_uniform(generator, 2.6, 3.6, 1))
        wall = float(high[0] if side > 0 else -low[0])
        inner = z * float(_uniform(generator, 0.12, 0.34, 1))  # seen at 7 to 19 degrees
        spans = [(inner, wall)]
        if float(torch.rand(1, generator=generator)) < 0.5:
            door = inner + float(_uniform(generator, 0.5, 1.0, 1))
            spans = [(inner, door), (door + float(_uniform(generator, 0.7, 1.1, 1)), wall)]
        for near, far in spans:
            if far - near < 0.2:
                continue
            centres.append(torch.stack([torch.tensor(side * (near + far) / 2), middle, torch.tensor(z)]))
            halves.append(torch.stack([torch.tensor((far - near) / 2), half_height, torch.tensor(0.08)]))
            kinds.append(BOX)
        size = float(_uniform(generator, 0.4, 0.6, 1))
        behind = z + 0.3 + size + float(_uniform(generator, 0.0, 0.6, 1))
        x = side * (inner + float(_uniform(generator, 0.3, 1.2, 1)))
        centres.append(torch.stack([torch.tensor(x), high[1] - size, torch.tensor(behind)]))
        halves.append(torch.tensor([size, size, size]))
        kinds.append(int(torch.randint(0, 3, (1,), generator=generator)))
    count = len(kinds)
    textures = _plain_textures(generator, count)
    muted = torch.tensor([kind == BOX and half[2] < 0.1 for kind, half in zip(kinds, halves, strict=True)])
    walls = _plain_textures(generator, count)
    parts = {}
    for field in fields(Textures):
        own = getattr(textures, field.name)[NUM_WALLS:]
        if field.name.startswith("colour"):
            plain = getattr(walls, field.name)[torch.arange(count) % NUM_WALLS]
            own = torch.where(muted[:, None], plain, own)
        parts[field.name] = torch.cat([getattr(world.textures, field.name), own])
    # things that stood where a partition or what is behind it stands now would be cut by it: they
    # keep still at least, and a partition hides what is within it
    zeros = torch.zeros(count)
    return World(
        seed=world.seed,
        room_min_3=low,
        room_max_3=high,
        kind_N=torch.cat([world.kind_N, torch.tensor(kinds)]),
        centre_N3=torch.cat([world.centre_N3, torch.stack(centres)]),
        half_size_N3=torch.cat([world.half_size_N3, torch.stack(halves)]),
        yaw_N=torch.cat([world.yaw_N, zeros]),
        swing_N3=torch.cat([world.swing_N3, torch.zeros(count, 3)]),
        rate_N=torch.cat([world.rate_N, torch.ones(count)]),
        phase_N=torch.cat([world.phase_N, zeros]),
        spin_N=torch.cat([world.spin_N, zeros]),
        textures=Textures(**parts),
        light_3=world.light_3,
    )
