"""Every shade drawn for a name is found to have it, darkened, blurred or in 8 bits."""

from __future__ import annotations

import pytest
import torch

from mv2v_engine.synthetic.colours import COLOUR_NAMES, colour_index, draw_shade


@pytest.mark.parametrize("name", COLOUR_NAMES)
def test_a_shade_keeps_its_name(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shades = torch.stack([draw_shade(name, generator) for _ in range(200)])
    noisy = (shades + 0.02 * torch.randn(200, 3, generator=generator)).clamp(0, 1)
    for colours in (shades, 0.4 * shades, (shades * 255).round() / 255):
        assert bool((colour_index(colours) == COLOUR_NAMES.index(name)).all())
    assert float((colour_index(noisy) == COLOUR_NAMES.index(name)).float().mean()) > 0.97
    # and leaves much open
    assert float(shades.amax(-1).std()) > 0.1


def test_grey_has_no_name_and_clear_colours_have_theirs() -> None:
    greys = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [1.0, 1.0, 1.0], [0.5, 0.45, 0.42]])
    assert colour_index(greys).tolist() == [-1] * 4
    pure = torch.tensor([[[1.0, 0, 0], [1.0, 1, 0]], [[0, 1.0, 0], [0, 0, 1.0]]])
    names = [[COLOUR_NAMES[i] for i in row] for row in colour_index(pure).tolist()]
    assert names == [["red", "yellow"], ["green", "blue"]]
