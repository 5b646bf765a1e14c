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

import math
from dataclasses import dataclass, replace
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
    weights_S2: Tensor  # weight of the waves' mean, and of their product
    sharpness_S: Tensor

    def to(self, device: torch.device | str) -> Textures:
        """The same on `device`."""
        return Textures(**{name: value.to(device) for name, value in vars(self).items()})

    def followed_by(self, others: Textures) -> Textures:
        """Those of these surfaces, then those of others."""
        more = vars(others)
        return Textures(**{n: torch.cat([value, more[n]]) for n, value in vars(self).items()})

    def of(self, surfaces: Tensor | slice) -> Textures:
        """Those of some surfaces."""
        return Textures(**{name: value[surfaces] for name, value in vars(self).items()})


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
        moved = {name: v.to(device) for name, v in vars(self).items() if name != "seed"}
        return World(self.seed, **moved)


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
    corners = ((-6.5, -3.5), (-3.2, -1.8), (-6, -4)), ((3.5, 6.5), (1.2, 2), (5.5, 8.5))
    room_min, room_max = (
        torch.cat([_uniform(generator, *bounds, 1) for bounds in corner]) for corner in corners
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


# Degrees from the optical axis to the edges of the first view, and how far beyond them things begin
# that the source does not show.
_SIDE_EDGE, _TOP_EDGE, _GAP = 26.5, 17.0, 5.0
_THICKNESS = 0.08  # half of a partition's, metres


def _plain_textures(generator: torch.Generator, num_objects: int) -> Textures:
    """Walls of one muted and things of one vivid colour each, drifting slowly to a near one."""
    textures = _textures(generator, num_objects)
    near = torch.lerp(textures.colour_a_S3, textures.colour_b_S3, 0.15)
    return replace(textures, colour_b_S3=near, waves_S33=textures.waves_S33 / 2)


def _plain(seed: int, grade: Grade, generator: torch.Generator) -> World:
    def between(low: float, high: float, *shape: int) -> Tensor:
        return _uniform(generator, low, high, *shape)

    room_min = torch.stack(
        [between(-6.5, -5.0, 1)[0], between(-3.4, -2.6, 1)[0], torch.tensor(-5.0)]
    )
    room_max = torch.stack(
        [between(5.0, 6.5, 1)[0], between(1.2, 1.8, 1)[0], between(5.5, 7.5, 1)[0]]
    )
    # two or three things in view, one beyond either side, one above and one below
    in_view = 2 + int(torch.randint(0, 2, (1,), generator=generator))
    num = in_view + 4
    kind = torch.randint(0, 3, (num,), generator=generator)
    half_size = between(0.4, 0.8, num, 3)
    half_size[-1] = between(0.2, 0.3, 1)  # what lies below the view is low
    half_size[kind == SPHERE] = half_size[kind == SPHERE][:, :1]
    half_size[:, 2] = torch.where(kind == CYLINDER, half_size[:, 0], half_size[:, 2])
    z = between(3.2, 5.0, num)
    top = room_max[1] - 2 * half_size[-1, 1]
    z[-1] = (top / math.tan(math.radians(_TOP_EDGE)) - 0.4).clamp_max(2.9)  # before the others
    wide = torch.rad2deg((half_size.norm(dim=1) / z).atan())
    beyond = between(0, _GAP, 3)
    seen = torch.linspace(-16.0, 16.0, in_view) + between(-5.0, 5.0, in_view)
    left, right = (_SIDE_EDGE + wide[in_view : in_view + 2] + beyond[:2]).unbind()
    yaw = torch.cat([seen, torch.stack([-left, right]), between(-15, 15, 2)])
    pitch = between(-2, 8, num)
    pitch[-2] = -(_TOP_EDGE + wide[-2] + beyond[2] / 2)
    centre = torch.stack([z * torch.deg2rad(yaw).tan(), z * torch.deg2rad(pitch).tan(), z], dim=-1)
    # most of those beside the axis stand on the floor
    stands = (torch.rand(num, generator=generator) < 0.7) & (torch.arange(num) < in_view + 2)
    stands[-1] = True
    centre[:, 1] = torch.where(stands, room_max[1] - half_size[:, 1], centre[:, 1])
    # what is to be uncovered waits where it is
    moves = ((torch.rand(num, generator=generator) < 0.4) & (torch.arange(num) < in_view))[:, None]
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
    """The world with one or two partitions, boxes from floor to ceiling that reach from a side wall
    inwards, each with or without a doorway and with a thing behind it."""

    def between(low: float, high: float) -> float:
        return float(_uniform(generator, low, high, 1))

    low, high = world.room_min_3.tolist(), world.room_max_3.tolist()
    partitions: list[list[float]] = []  # centre, then half sizes
    things: list[list[float]] = []
    sides = ((-1,), (1,), (-1, 1), (-1, 1))[int(between(0, 4))]
    for side in sides:
        z, wall = between(2.6, 3.6), high[0] if side > 0 else -low[0]
        inner = z * between(0.12, 0.34)  # its edge, seen at 7 to 19 degrees
        spans = [(inner, wall)]
        if between(0, 1) < 0.5:
            door = inner + between(0.5, 1.0)
            spans = [(inner, door), (door + between(0.7, 1.1), wall)]
        for near, far in spans:
            middle, half_height = (low[1] + high[1]) / 2, (high[1] - low[1]) / 2
            half_width = max(far - near, 0.2) / 2
            partitions.append(
                [side * (near + half_width), middle, z, half_width, half_height, _THICKNESS]
            )
        size = between(0.4, 0.6)
        x, behind = side * (inner + between(0.3, 1.2)), z + 0.3 + size + between(0, 0.6)
        things.append([x, high[1] - size, behind, size, size, size])
    count, boxes = len(partitions) + len(things), torch.tensor([*partitions, *things])
    kinds = torch.randint(0, 3, (len(things),), generator=generator)
    textures = _plain_textures(generator, count)
    zeros = torch.zeros(count)
    # a partition has a wall's muted colours, a thing has a vivid one
    order = torch.cat([torch.arange(len(partitions)), NUM_WALLS + torch.arange(len(things))])
    return replace(
        world,
        kind_N=torch.cat([world.kind_N, torch.full((len(partitions),), BOX), kinds]),
        centre_N3=torch.cat([world.centre_N3, boxes[:, :3]]),
        half_size_N3=torch.cat([world.half_size_N3, boxes[:, 3:]]),
        yaw_N=torch.cat([world.yaw_N, zeros]),
        swing_N3=torch.cat([world.swing_N3, torch.zeros(count, 3)]),
        rate_N=torch.cat([world.rate_N, zeros]),
        phase_N=torch.cat([world.phase_N, zeros]),
        spin_N=torch.cat([world.spin_N, zeros]),
        textures=world.textures.followed_by(textures.of(order)),
    )
