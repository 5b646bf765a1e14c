"""Seeded worlds: a textured room with coloured, partly moving objects in and out of view.

The world frame is the source camera's first frame: OpenCV axes, metres. Objects live between
and beside the camera and the far wall, so that every preset move uncovers some the source
never sees. Everything is a batch over surfaces, which keeps the ray caster vectorised.

N objects, S surfaces (6 walls, then the N objects).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

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


def make_world(seed: int) -> World:
    """The world of a seed: the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
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
