"""Colours with names: what a name leaves open, and which name a colour has.

Colours are in 0..1. A name is a range of hues; its shades differ in hue, saturation and value.
"""

from __future__ import annotations

import colorsys

import torch
from torch import Tensor

# name: hues in degrees that are drawn for it; between the ranges lie colours of doubtful name
HUES: dict[str, tuple[float, float]] = {
    "red": (-12.0, 12.0),
    "yellow": (46.0, 64.0),
    "green": (98.0, 142.0),
    "blue": (206.0, 244.0),
    "purple": (272.0, 306.0),
}
COLOUR_NAMES = tuple(HUES)
SATURATION, VALUE = (0.65, 1.0), (0.4, 0.95)

_NAMELESS_BELOW = 0.25  # saturation


def draw_shade(name: str, generator: torch.Generator) -> Tensor:
    """A shade [3] of a named colour."""
    hue, saturation, value = (
        low + (high - low) * float(torch.rand(1, generator=generator))
        for low, high in (HUES[name], SATURATION, VALUE)
    )
    return torch.tensor(colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value))


def colour_index(colours: Tensor) -> Tensor:
    """Index into COLOUR_NAMES [...] of colours [..., 3]; -1 for what is near grey.

    A hue belongs to the nearest drawn range, so that blurred and noisy shades keep their name.
    """
    value, low = colours.amax(-1), colours.amin(-1)
    chroma = value - low
    red, green, blue = colours.unbind(-1)
    safe = chroma.clamp_min(1e-6)
    sextant = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue = (60 * sextant)[..., None]
    ranges = torch.tensor(list(HUES.values()), device=colours.device)
    centre, half = ranges.mean(1), (ranges[:, 1] - ranges[:, 0]) / 2
    turned = (hue - centre + 180) % 360 - 180
    nearest = (turned.abs() - half).argmin(-1)
    nameless = chroma < _NAMELESS_BELOW * value.clamp_min(0.05)
    return torch.where(nameless, -1, nearest)
