"""VACE's context: what its blocks are given of a source, a mask, and reference images.

Where the mask is 1 the video is made anew, with what the source shows there as a hint; where it is
0 the source stays. Both halves are encoded apart, and the mask's pixels follow as channels.

T pixel frames, F latent frames, H W latent rows and columns, C latent channels, S the VAE's stride.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mv2v_engine.errors import VideoError
from mv2v_engine.vae import VideoVAE


def vace_context(
    vae: VideoVAE,
    frames: Tensor,
    mask: Tensor | None = None,
    *,
    whole: Tensor | None = None,
    check: Callable[[], None] | None = None,
) -> Tensor:
    """The context [2 C + S^2, F, H, W] of a source on the VAE's device.

    Args:
        frames: uint8 [T, height, width, 3].
        mask: [T, height, width], from 0.5 on what is made anew; None is all of it.
        whole: the latents of all frames, where they are known; read without a mask.

    Raises:
        VideoError: a mask of another shape, or frames as `VideoVAE.encode` refuses them.
    """
    if mask is not None and mask.shape != frames.shape[:3]:
        raise VideoError(
            f"the mask must have shape {list(frames.shape[:3])}, one value a pixel of every frame, "
            f"got {list(mask.shape)}"
        )
    ones = torch.ones(frames.shape[:3], device=vae.device)
    chosen = ones if mask is None else (mask.to(vae.device).float() >= 0.5).float()
    pixels = frames.to(vae.device).permute(3, 0, 1, 2).float() / 127.5 - 1
    inactive = vae.encode_pixels(pixels * (1 - chosen), check=check)
    if mask is not None or whole is None:
        reactive = vae.encode_pixels(pixels * chosen, check=check)
    else:
        reactive = whole.to(vae.device)
    return torch.cat([inactive, reactive, mask_channels(chosen, vae.spatial_stride, reactive)])


def mask_channels(mask_THW: Tensor, stride: int, latents_CFHW: Tensor) -> Tensor:
    """The mask's pixels of every latent cell as channels [S^2, F, H, W], of the nearest frames."""
    cells = mask_THW.unflatten(2, (-1, stride)).unflatten(1, (-1, stride))
    channels = cells.permute(2, 4, 0, 1, 3).flatten(0, 1)[None]
    size = list(latents_CFHW.shape[1:])
    return F.interpolate(channels, size=size, mode="nearest-exact")[0]
