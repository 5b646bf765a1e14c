"""The autoencoder against diffusers' `AutoencoderKLWan`: the same names, bits and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine.defaults import without_memory
from mv2v_engine.errors import RequestError
from mv2v_engine.models.autoencoder import Autoencoder, Tiles
from mv2v_engine.ops.conv3d import speed_up_conv3d

RESIDUAL: dict[str, Any] = {
    "base_dim": 8,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "wan21": {"base_dim": 8, "num_res_blocks": 1},
    "wan21-wide-decoder": {"base_dim": 4, "decoder_base_dim": 8, "dim_mult": [1, 2, 2, 4]},
    "wan21-two-stages": {
        "base_dim": 4,
        "dim_mult": [1, 2, 4],
        "temperal_downsample": [True, True],
        "scale_factor_spatial": 4,
    },
    "wan22": {
        **RESIDUAL,
        "decoder_base_dim": 16,
        "z_dim": 48,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
        "scale_factor_spatial": 16,
    },
    "wan22-two-stages": RESIDUAL,
}
# as published; what they need no memory for
PUBLISHED: dict[str, dict[str, Any]] = {
    "wan21": {},
    "wan22": {**LAYOUTS["wan22"], "base_dim": 160, "decoder_base_dim": 256},
}


def pair(layout: str) -> tuple[Autoencoder, Any]:
    """Ours and diffusers', of the same random weights."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    ours = Autoencoder(LAYOUTS[layout]).eval()
    for name, parameter in ours.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    theirs = AutoencoderKLWan(**LAYOUTS[layout]).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def video(model: Autoencoder, num_frames: int, rows: int = 2, columns: int = 3) -> Tensor:
    side = model.config.scale_factor_spatial
    generator = torch.Generator().manual_seed(num_frames)
    shape = (1, 3, num_frames, rows * side, columns * side)
    return torch.rand(shape, generator=generator) * 2 - 1


@pytest.mark.parametrize("layout", PUBLISHED)
def test_published_models_have_the_names_and_shapes_of_diffusers(layout: str) -> None:
    from diffusers import AutoencoderKLWan

    with without_memory():
        ours = Autoencoder(PUBLISHED[layout])
    with torch.device("meta"):
        theirs = AutoencoderKLWan(**PUBLISHED[layout])
    found, expected = ours.state_dict(), theirs.state_dict()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}


@pytest.mark.parametrize("is_by_taps", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_the_bits_are_diffusers(layout: str, is_by_taps: bool) -> None:
    ours, theirs = pair(layout)
    if is_by_taps:
        speed_up_conv3d(ours)
        speed_up_conv3d(theirs)
    for num_frames in (1, 5, 13):
        pixels = video(ours, num_frames)
        latents = ours.encode(pixels)
        assert torch.equal(latents, theirs.encode(pixels).latent_dist.mode())
        decoded = ours.decode(latents)
        assert decoded.shape == pixels.shape
        assert torch.equal(decoded.clamp(-1, 1), theirs.decode(latents).sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_bits_are_diffusers_in_half_precision(dtype: torch.dtype) -> None:
    ours, theirs = (model.to(dtype) for model in pair("wan22-two-stages"))
    pixels = video(ours, 9).to(dtype)
    latents = ours.encode(pixels)
    assert latents.dtype == dtype
    assert torch.equal(latents, theirs.encode(pixels).latent_dist.mode())
    assert torch.equal(ours.decode(latents).clamp(-1, 1), theirs.decode(latents).sample)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("wan21", torch.float32),
        ("wan21", torch.bfloat16),
        ("wan22", torch.float32),
        ("wan22-two-stages", torch.bfloat16),  # CPUs without instructions for it are slow
    ],
)
@torch.no_grad()
def test_tiles_are_diffusers(layout: str, dtype: torch.dtype) -> None:
    """But for rounding: in tiles diffusers goes through `quant_conv` frame by frame, and some CPUs
    sum a product of another shape in another order."""
    ours, theirs = (model.to(dtype) for model in pair(layout))
    cells, patch = ours.config.scale_factor_spatial, ours.config.patch
    tiles = Tiles(side=4, stride=3)
    pixels = video(ours, 5, rows=5, columns=6).to(dtype)
    # diffusers measures an encoder's tiles in patches, a decoder's in pixels
    sizes = [length * cells // patch for length in (tiles.side, tiles.stride)]
    theirs.enable_tiling(sizes[0], sizes[0], sizes[1], sizes[1])
    latents = ours.encode(pixels, tiles=tiles)
    torch.testing.assert_close(latents, theirs.encode(pixels).latent_dist.mode())
    assert (latents - ours.encode(pixels)).abs().max() > 1e-3
    sizes = [length * cells for length in (tiles.side, tiles.stride)]
    theirs.enable_tiling(sizes[0], sizes[0], sizes[1], sizes[1])
    decoded = ours.decode(latents, tiles=tiles).clamp(-1, 1)
    torch.testing.assert_close(decoded, theirs.decode(latents).sample)
    assert (decoded - ours.decode(latents).clamp(-1, 1)).abs().max() > 1e-3


@pytest.mark.parametrize("layout", ["wan21", "wan22-two-stages"])
def test_gradients_are_diffusers(layout: str) -> None:
    ours, theirs = pair(layout)
    pixels = video(ours, 9)
    ours.decode(ours.encode(pixels)).clamp(-1, 1).square().mean().backward()
    theirs.decode(theirs.encode(pixels).latent_dist.mode()).sample.square().mean().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_batch_is_its_videos_and_a_walk_leaves_nothing() -> None:
    ours, _ = pair("wan22-two-stages")
    first, second = video(ours, 9), -video(ours, 9)
    together = ours.encode(torch.cat([first, second]))
    torch.testing.assert_close(together, torch.cat([ours.encode(first), ours.encode(second)]))
    decoded = ours.decode(together)
    torch.testing.assert_close(decoded, torch.cat([ours.decode(z[None]) for z in together]))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"base_dim": "8"}, "base_dim must be an integer"),
    ({"base_dim": 0}, "must be at least 1"),
    ({"dim_mult": []}, "must be at least 1"),
    ({"dim_mult": 3}, "dim_mult must be a tuple"),
    ({"attn_scales": [0.5]}, "attn_scales must be empty"),
    ({"temperal_downsample": [True, True]}, "length of temperal_downsample is 2.*make it 3"),
    ({"temperal_downsample": [True] * 3}, "scale_factor_temporal is 4.*make it 8"),
    ({"scale_factor_spatial": 16}, "scale_factor_spatial is 16.*make it 8"),
    ({"patch_size": 2}, "scale_factor_spatial is 8.*make it 16"),
    ({"patch_size": 2, "scale_factor_spatial": 16}, "in_channels is 3.*make it 12"),
    ({"out_channels": 4}, "out_channels is 4.*make it 3"),
    ({"is_residual": True, "dim_mult": [3, 5, 7, 11]}, "shortcut.*expected a multiple"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_a_config_that_describes_no_model_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message), without_memory():
        Autoencoder(fields)


def test_fields_of_others_are_kept_and_change_nothing() -> None:
    given = {**RESIDUAL, "clip_output": False, "_class_name": "AutoencoderKLWan"}
    model = Autoencoder(given)
    assert model.config == Autoencoder(RESIDUAL).config
    assert model.fields["clip_output"] is False and "_class_name" not in model.fields
