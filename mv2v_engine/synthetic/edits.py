"""Edits of worlds: an instruction, and a seed for the choice that its words leave open.

Which red, which hat, which stripes: `apply_edit` draws that once for the whole clip, so that an
editor of single windows has no way to know it. Objects keep their numbers; what an edit adds comes
last.

N objects, S surfaces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mv2v_engine.synthetic.colours import COLOUR_NAMES, draw_shade
from mv2v_engine.synthetic.instructions import WALL_NOUNS, Instruction
from mv2v_engine.synthetic.worlds import BOX, CYLINDER, NUM_WALLS, SPHERE, Textures, World

TARGET = NUM_WALLS  # the surface of object 0

_NEW_COLOUR = 0.2  # least mean difference from the old one
_TWO_TONES = 0.3  # least mean difference between a pattern's colours
_CLEAR = 0.16  # mean difference of a hat from what is behind it
_SIDE_WALLS = [0, 2, 3, 5]  # all but ceiling and floor
STRIPES = torch.nn.functional.normalize(
    torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [1.0, 1.0, 1.0], [1.0, -1.0, 1.0]]), dim=-1
)
_FAR_AWAY = 1000.0  # metres below the floor: where a removed object goes


@dataclass(frozen=True, eq=False)
class Edit:
    """An edited world. changed, added: surfaces that look otherwise, and that are new."""

    world: World
    changed: tuple[int, ...] = ()
    added: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()


def apply_edit(world: World, instruction: Instruction, choice: int) -> Edit:
    """The world as the instruction wants it; `choice` seeds what the instruction leaves open.

    An instruction about an object is about object 0.
    """
    generator = torch.Generator().manual_seed(choice)
    surface = WALL_NOUNS.get(instruction.target, TARGET)
    if instruction.kind == "hat":
        hatted = _with_hat(world, generator)
        first = NUM_WALLS + len(world.kind_N)
        return Edit(hatted, added=tuple(range(first, NUM_WALLS + len(hatted.kind_N))))
    if instruction.kind == "remove":
        centre, swing = world.centre_N3.clone(), world.swing_N3.clone()
        centre[0, 1] += _FAR_AWAY
        swing[0] = 0
        return Edit(replace(world, centre_N3=centre, swing_N3=swing), removed=(surface,))
    if instruction.kind == "pattern":
        values = _pattern(world, instruction.value, generator)
    else:
        values = _colours(world, surface, instruction.value, generator)
    return Edit(replace(world, textures=_repainted(world.textures, surface, values)), (surface,))


def _repainted(textures: Textures, surface: int, values: dict[str, Tensor]) -> Textures:
    changed = {}
    for name, value in values.items():
        changed[name] = getattr(textures, name).clone()
        changed[name][surface] = value
    return replace(textures, **changed)


def _colours(
    world: World, surface: int, name: str, generator: torch.Generator
) -> dict[str, Tensor]:
    """A shade of the named colour, of any that is new if none is named, and a darker one of it."""
    textures = world.textures
    old = (textures.colour_a_S3[surface] + textures.colour_b_S3[surface]) / 2
    while True:
        drawn = (
            name or COLOUR_NAMES[int(torch.randint(len(COLOUR_NAMES), (1,), generator=generator))]
        )
        shade = draw_shade(drawn, generator)
        darker = shade * (0.55 + 0.45 * torch.rand(1, generator=generator))
        # a named colour may be near the old one; asked for a new one, all of it must be new
        if name or float(((shade + darker) / 2 - old).abs().mean()) >= _NEW_COLOUR:
            return {"colour_a_S3": shade, "colour_b_S3": darker}


def _pattern(world: World, pattern: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Stripes or checks of the target's own colour and another."""
    own = world.textures.colour_a_S3[TARGET]
    half = world.half_size_N3[0]
    other = own
    while float((other - own).abs().mean()) < _TWO_TONES:
        bright = torch.rand(1, generator=generator)
        hue = COLOUR_NAMES[int(torch.randint(len(COLOUR_NAMES), (1,), generator=generator))]
        grey = torch.full((3,), 0.08 if float(bright) < 0.5 else 0.92)
        other = draw_shade(hue, generator) if 0.25 < float(bright) < 0.75 else grey
    length = 0.36 + 0.24 * float(torch.rand(1, generator=generator))
    if pattern == "striped":
        direction = STRIPES[int(torch.randint(len(STRIPES), (1,), generator=generator))]
        waves = (direction * 2 * math.pi / length).expand(3, 3)
        phases = (2 * math.pi * torch.rand(1, generator=generator)).expand(3)
        weights = torch.tensor([1.0, 0.0])
    else:
        # whole cells, and faces where the third factor is at its height
        cells = (2 * half / (0.5 * length)).round().clamp_min(2)
        rate = cells * math.pi / (2 * half)
        waves, phases = rate.diag(), math.pi / 2 - rate * half
        weights = torch.tensor([0.0, 1.0])
    return {
        "colour_a_S3": own,
        "colour_b_S3": other,
        "waves_S33": waves,
        "phases_S3": phases,
        "weights_S2": weights,
        "sharpness_S": torch.tensor(4.0),
    }


def hat_place(world: World) -> tuple[float, float]:
    """Height (metres, in the target's axes, down positive) where a hat sits, and its radius."""
    half = world.half_size_N3[0].tolist()
    if int(world.kind_N[0]) == SPHERE:
        return -0.85 * half[1], 0.7 * half[0]
    return -half[1], half[0]


def _with_hat(world: World, generator: torch.Generator) -> World:
    """The target wears a brimmed hat, a ball or a box, as it moves and turns."""
    top, radius = hat_place(world)
    drawn = torch.rand(3, generator=generator).tolist()
    style = int(3 * drawn[0])
    width, height = (0.5 + 0.2 * drawn[1]) * radius, (0.5 + 0.4 * drawn[2]) * radius
    # kind, half size, height of the centre above the target's top
    if style == 0:
        brim = 0.12 * radius
        parts = [
            (CYLINDER, (0.95 * radius, brim, 0.95 * radius), brim),
            (CYLINDER, (width, height, width), 2 * brim + height),
        ]
    elif style == 1:
        parts = [(SPHERE, (width + 0.1 * radius,) * 3, 0.5 * width)]
    else:
        parts = [(BOX, (width, height, width), height)]
    offsets = torch.tensor([[0.0, top - above, 0.0] for _, _, above in parts])
    return _with_objects(
        world,
        kinds=[kind for kind, _, _ in parts],
        half_sizes=torch.tensor([size for _, size, _ in parts]),
        centres=world.centre_N3[0] + offsets,
        shades=_hat_shades(world, len(parts), generator),
    )


def _hat_shades(world: World, count: int, generator: torch.Generator) -> Tensor:
    """Shades [count, 3] of different names, clear of the walls' own colours where any is."""
    textures = world.textures
    walls = torch.cat([textures.colour_a_S3[_SIDE_WALLS], textures.colour_b_S3[_SIDE_WALLS]])
    order = torch.randperm(len(COLOUR_NAMES), generator=generator).tolist()
    drawn = torch.stack([draw_shade(COLOUR_NAMES[i], generator) for _ in range(4) for i in order])
    distance = (drawn[:, None] - walls).abs().mean(-1).amin(1)
    chosen: list[int] = []
    # those that are clear in their order, then the others from the clearest on
    for index in sorted(range(len(drawn)), key=lambda i: -min(float(distance[i]), _CLEAR)):
        if all((index - other) % len(order) for other in chosen):
            chosen.append(index)
    return drawn[chosen[:count]]


def _with_objects(
    world: World, *, kinds: Sequence[int], half_sizes: Tensor, centres: Tensor, shades: Tensor
) -> World:
    """More objects, of plain colours, that move and turn as the target does."""
    surfaces, first = torch.full((len(kinds),), TARGET), torch.zeros(len(kinds)).long()
    textures = world.textures.of(surfaces)
    textures = replace(textures, colour_a_S3=shades, colour_b_S3=0.85 * shades)
    names = ("yaw_N", "swing_N3", "rate_N", "phase_N", "spin_N")
    values = {name: getattr(world, name) for name in names}
    moving: dict[str, Any] = {name: torch.cat([each, each[first]]) for name, each in values.items()}
    return replace(
        world,
        kind_N=torch.cat([world.kind_N, torch.tensor(kinds)]),
        half_size_N3=torch.cat([world.half_size_N3, half_sizes]),
        centre_N3=torch.cat([world.centre_N3, centres]),
        textures=world.textures.followed_by(textures),
        **moving,
    )
