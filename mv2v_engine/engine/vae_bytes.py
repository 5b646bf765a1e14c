"""Peak bytes of the VAE, counted by running a twin of the model on tensors without memory.

T pixel frames.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache

import torch

from mv2v_engine.defaults import without_memory
from mv2v_engine.engine.counting import LiveBytes
from mv2v_engine.models.autoencoder import Autoencoder, AutoencoderConfig
from mv2v_engine.ops.conv3d import speed_up_conv3d
from mv2v_engine.vae import VideoVAE

# from the third latent frame on, every further one adds the same
_LATENTS = (3, 4)


def vae_peak_bytes(vae: VideoVAE, num_frames: int, size: tuple[int, int]) -> tuple[int, int]:
    """The most that encoding and that decoding a video has made and not freed.

    Weights are not part of it, nor is what a library allocates inside a convolution.
    """
    return _counted(
        vae.model.config,
        vae.dtype,
        vae.tile_above,
        vae.device.type == "cpu",
        (num_frames - 1) // vae.temporal_stride + 1,
        size,
    )


@lru_cache(maxsize=16)
def _counted(
    config: AutoencoderConfig,
    dtype: torch.dtype,
    tile_above: int,
    by_taps: bool,
    num_latents: int,
    size: tuple[int, int],
) -> tuple[int, int]:
    twin = _twin(config, dtype, tile_above, by_taps)
    values = ((num_latents - 1) * twin.temporal_stride + 1) * size[0] * size[1] * 3
    # the frames' bytes come to a GPU first
    copied = 0 if by_taps else values
    if num_latents < sum(_LATENTS):  # all of them are less work
        encode, decode = _run(twin, num_latents, size)
        return encode + copied, decode
    before, after = (_run(twin, count, size) for count in _LATENTS)
    further = num_latents - _LATENTS[-1]
    encode, decode = (b + further * (b - a) for a, b in zip(before, after, strict=True))
    # of a long or narrow model's video the pixels as such weigh more: float32 before and after an
    # operation; on the way out bytes too, and what the model computes in
    return max(encode, 8 * values) + copied, max(decode, (9 + dtype.itemsize) * values)


def _twin(
    config: AutoencoderConfig, dtype: torch.dtype, tile_above: int, by_taps: bool
) -> VideoVAE:
    """The same model without memory; `by_taps`: as it runs on a CPU."""
    with without_memory():
        model = Autoencoder(asdict(config))
    if by_taps:
        speed_up_conv3d(model)
    return VideoVAE(model, dtype, tile_above=tile_above)


def _run(twin: VideoVAE, num_latents: int, size: tuple[int, int]) -> tuple[int, int]:
    """Peak bytes of encoding and of decoding so many latent frames."""
    num_frames = (num_latents - 1) * twin.temporal_stride + 1
    frames = torch.empty(num_frames, *size, 3, dtype=torch.uint8, device="meta")
    with LiveBytes() as encoding:
        latents = twin.encode(frames)
    with LiveBytes() as decoding:
        twin.decode_on_device(latents)
    return encoding.peak, decoding.peak
