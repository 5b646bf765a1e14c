"""Linear colours of latents: fitted to what is linear, read as written, known for Wan's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mv2v_engine.errors import CheckpointError
from mv2v_engine.models.autoencoder import AutoencoderConfig
from mv2v_engine.models.latent_rgb import LatentRGB, cell_colours, wan21, wan22


def coloured_clip(num_latents: int = 3) -> tuple[Tensor, Tensor]:
    """Colours uint8 [3, F, 4, 5] of cells, and frames of 8x8 pixels a cell that have them."""
    colours = torch.randint(0, 256, (3, num_latents, 4, 5), dtype=torch.uint8)
    cells = colours.repeat_interleave(8, 2).repeat_interleave(8, 3)
    frames = torch.cat([cells[:, :1], cells[:, 1:].repeat_interleave(4, 1)], dim=1)
    return colours, frames.permute(1, 2, 3, 0)


def test_cells_have_the_mean_of_their_own_frames() -> None:
    torch.manual_seed(0)
    colours, frames = coloured_clip()
    assert torch.allclose(cell_colours(frames, (3, 4, 5)), colours / 127.5 - 1, atol=1e-5)
    # half of the frames of the second latent are black: so is half of its colour
    frames[3:5] = 0
    halved = (cell_colours(frames, (3, 4, 5))[:, 1] + 1) * 127.5
    assert torch.allclose(halved, colours[:, 1] / 2, atol=1e-3)


def test_a_linear_space_is_found_again() -> None:
    torch.manual_seed(1)
    mixing = torch.randn(6, 3, dtype=torch.float64)
    clips, pictures = [], []
    for _ in range(4):
        colours, frames = coloured_clip()
        rgb = (colours / 127.5 - 1).double() - 0.2
        # six channels, three of which say something else
        latents = torch.einsum("cfhw,kc->kfhw", rgb, mixing[:3])
        latents = torch.cat([latents, torch.randn(3, *latents.shape[1:], dtype=torch.float64)])
        clips.append((latents.float(), frames))
        pictures.append(colours[:, 1].permute(1, 2, 0))
    fitted = LatentRGB.fitted(clips)
    for (latents, _), expected in zip(clips, pictures, strict=True):
        shown = fitted.picture(latents[:, 1])
        assert shown.dtype == torch.uint8 and shown.shape == (4, 5, 3)
        assert int((shown.int() - expected.int()).abs().max()) <= 4


def test_one_colour_gives_that_colour() -> None:
    torch.manual_seed(2)
    frames = torch.tensor([200, 20, 90], dtype=torch.uint8).expand(5, 16, 16, 3)
    fitted = LatentRGB.fitted([(torch.zeros(16, 2, 2, 2), frames)])
    assert fitted.picture(torch.zeros(16, 2, 2))[0, 0].tolist() == [200, 20, 90]
    lost = fitted.picture(torch.full((16, 2, 2), torch.nan))
    assert lost.unique().tolist() == [0]


def test_a_map_is_read_as_it_was_written(tmp_path: Path) -> None:
    torch.manual_seed(3)
    written = LatentRGB(torch.randn(16, 3), torch.randn(3))
    written.save(tmp_path / "map.json")
    read = LatentRGB.read(tmp_path / "map.json", 16)
    assert torch.allclose(read.factors, written.factors, atol=1e-4)
    assert torch.allclose(read.bias, written.bias, atol=1e-4)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"factors": [[1, 2, 3]]}',
        json.dumps({"factors": [[1, 2, 3]] * 15, "bias": [0, 0, 0]}),
        json.dumps({"factors": [[1, 2, 3]] * 16, "bias": [0, 0]}),
        json.dumps({"factors": [[1, 2, float("nan")]] * 16, "bias": [0, 0, 0]}),
        json.dumps({"factors": "red", "bias": [0, 0, 0]}),
    ],
)
def test_what_is_no_map_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"map\.json.*copy it again, or delete it"):
        LatentRGB.read(tmp_path / "map.json", 16)


def test_wans_maps_fit_its_latents() -> None:
    for colours, channels in ((wan21(), 16), (wan22(), 48)):
        assert colours.factors.shape == (channels, 3) and colours.bias.shape == (3,)
    # normalised latents have deviation 1, and pictures must not be clipped by them
    assert 0.2 < float(wan21().factors.pow(2).sum(0).sqrt().max()) < 1
    assert 0.2 < float(wan22().factors.pow(2).sum(0).sqrt().max()) < 1
    assert len(AutoencoderConfig().latents_mean) == 16
