"""The VAE's predicted bytes against its real work: whole videos, real tensors, tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mv2v_engine import counting
from mv2v_engine.counting import LiveBytes, vae_peak_bytes
from mv2v_engine.models.autoencoder import Autoencoder, AutoencoderConfig
from mv2v_engine.vae import VideoVAE

SMALL: dict[str, Any] = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "latents_mean": [0.0] * 4,
    "latents_std": [0.5] * 4,
    "scale_factor_spatial": 4,
}
RESIDUAL = {
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 8,
}
SIZE = (32, 48)


def _vae(tile_above: int = 1 << 30, **changes: Any) -> VideoVAE:
    torch.manual_seed(0)
    return VideoVAE(Autoencoder(SMALL | changes), tile_above=tile_above)


def _counted(vae: VideoVAE, num_frames: int, size: tuple[int, int]) -> tuple[int, int]:
    """Peak bytes of encoding and decoding a video, copied to the device first."""
    frames = torch.zeros(num_frames, *size, 3, dtype=torch.uint8, device=vae.device)
    with LiveBytes() as encoding:
        latents = vae.encode(frames)
    with LiveBytes() as decoding:
        vae.decode_on_device(latents)
    copied = 0 if vae.device.type == "cpu" else frames.numel()
    return encoding.peak + copied, decoding.peak


@pytest.mark.parametrize("num_frames", [5, 33])
def test_real_tensors_take_what_was_predicted(num_frames: int) -> None:
    counted, vae = _counted(_vae(), num_frames, SIZE), _vae()
    assert vae_peak_bytes(vae, num_frames, SIZE) == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("base_dim", [4, 32])
def test_a_long_video_is_predicted_from_its_first_frames(base_dim: int) -> None:
    """Narrow, its pixels weigh most at the end; wide, a chunk's features."""
    config = AutoencoderConfig(**SMALL | {"base_dim": base_dim})
    twin = counting._Form(config, torch.bfloat16, 1 << 30, False).twin()
    counted = _counted(twin, 25, SIZE)
    assert vae_peak_bytes(twin, 25, SIZE) == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("by_taps", [True, False])
@pytest.mark.parametrize("num_latents", [1, 3])
@pytest.mark.parametrize("changes", [{}, RESIDUAL], ids=["wan21", "wan22"])
def test_shapes_and_layouts_are_those_of_torch(
    changes: dict[str, Any], num_latents: int, by_taps: bool
) -> None:
    """Else other copies would be counted than are made."""
    config = AutoencoderConfig(**SMALL | changes)
    twin = counting._Form(config, torch.bfloat16, SIZE[0] * SIZE[1] - 1, by_taps).twin()
    num_frames = 4 * num_latents - 3
    encode, decode = _counted(twin, num_frames, SIZE)
    copied = num_frames * SIZE[0] * SIZE[1] * 3
    assert counting._run(twin, num_latents, SIZE) == (encode - copied, decode)


def test_tiles_take_less() -> None:
    size = (520, 520)
    whole = vae_peak_bytes(_vae(), 5, size)
    tiled = vae_peak_bytes(_vae(tile_above=size[0] * size[1] - 1), 5, size)
    assert all(with_tiles < without for with_tiles, without in zip(tiled, whole, strict=True))


def test_wans_own_at_full_size() -> None:
    twin = counting._Form(AutoencoderConfig(), torch.bfloat16, 480 * 832, False).twin()
    encode, decode = vae_peak_bytes(twin, 81, (480, 832))
    # four frames of 96 channels at full resolution are 307 MB; about ten such are alive
    assert 3.0e9 < encode < decode < 4.5e9
