"""Dynamic tokenizers: learned patch embeddings of one latent frame each, at three rates (METHOD 3).

B batch, C latent channels, F H W latent grid, L tokens, k spatial patch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mv2v_engine.ops.conv3d import PatchConv3d


class Tokenizer(PatchConv3d):
    """A convolution of kernel and stride (1, k, k) over replicate-padded latents."""

    def __init__(self, in_channels: int, dim: int, patch: int) -> None:
        super().__init__(in_channels, dim, (1, patch, patch))
        self.patch = patch

    def forward(self, latents_BCFHW: Tensor) -> Tensor:
        """Tokens [B, L, dim], frame by frame, row by row."""
        patch = self.patch
        pad_rows, pad_columns = -latents_BCFHW.shape[3] % patch, -latents_BCFHW.shape[4] % patch
        if pad_rows or pad_columns:
            # bottom and right, as FramePack pads (METHOD 3)
            latents_BCFHW = nn.functional.pad(
                latents_BCFHW, (0, pad_columns, 0, pad_rows, 0, 0), mode="replicate"
            )
        tokens: Tensor = super().forward(latents_BCFHW.to(self.weight.dtype))
        return tokens.flatten(2).transpose(1, 2)


@torch.no_grad()
def init_from_base(tokenizer: Tokenizer, base: nn.Conv3d) -> None:
    """Initialise a tokenizer from the base 1x2x2 patch embedding, as FramePack does (METHOD 3).

    The kernel is repeated spatially and divided by (k/2)^2, so that a constant latent embeds
    the same at every rate; the bias is copied. Of a base with the source on further channels,
    the target's own are taken. A tokenizer without memory is left as it is.
    """
    if tokenizer.weight.is_meta:
        return
    repeat = tokenizer.patch // 2
    weight = base.weight[:, : tokenizer.in_channels]
    weight = weight.repeat_interleave(repeat, dim=3).repeat_interleave(repeat, dim=4)
    tokenizer.weight.copy_(weight / repeat**2)
    if tokenizer.bias is not None and base.bias is not None:
        tokenizer.bias.copy_(base.bias)
