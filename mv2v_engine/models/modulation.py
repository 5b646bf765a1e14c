"""Timestep and text conditioning: what modulates a block, and the text it attends to.

Names follow diffusers' `condition_embedder`. B batch, L tokens, S text tokens, C width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mv2v_engine.config import TransformerConfig


@dataclass(frozen=True, slots=True)
class Modulation:
    """One sublayer's shift, scale and gate, float32 [B, C]; with row [B, L] rows by token."""

    shift: Tensor
    scale: Tensor
    gate: Tensor
    row: Tensor | None


def split_modulation(
    table_16C: Tensor, temb_B6C: Tensor, row_BL: Tensor | None = None
) -> tuple[Modulation, Modulation]:
    """The attention's and the feed-forward's modulation, summed in float32.

    row: which of the B timesteps modulates a token; None is its sample's.
    """
    shift, scale, gate, *ffn = (table_16C.float() + temb_B6C.float()).unbind(1)
    return Modulation(shift, scale, gate, row_BL), Modulation(ffn[0], ffn[1], ffn[2], row_BL)


def sinusoidal_embedding(timestep_B: Tensor, dim: int) -> Tensor:
    """Cosines then sines [B, dim] of the timestep, float32 with diffusers' operation order."""
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep_B.device)
    angles = timestep_B.float()[:, None] * torch.exp(exponent / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class _TimeEmbedder(nn.Module):
    def __init__(self, freq_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(freq_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, embedding: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.linear_1(embedding))
        result: Tensor = self.linear_2(hidden)
        return result


def _embedded(embedder: _TimeEmbedder, timestep_B: Tensor, freq_dim: int) -> Tensor:
    embedding = sinusoidal_embedding(timestep_B, freq_dim)
    result: Tensor = embedder(embedding.to(embedder.linear_1.weight.dtype))
    return result


class _TextEmbedder(nn.Module):
    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(text_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, text: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.linear_1(text), approximate="tanh")
        result: Tensor = self.linear_2(hidden)
        return result


class _GELULinear(nn.Module):
    """GELU between two linear layers, with the names of diffusers' feed-forward."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(image_dim, image_dim)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(image_dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.net[0].proj(x)  # type: ignore[operator]
        result: Tensor = self.net[2](nn.functional.gelu(hidden))
        return result


class _ImageEmbedder(nn.Module):
    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(image_dim)
        self.ff = _GELULinear(image_dim, dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        dtype = image.dtype
        return _wide_norm(self.norm2, self.ff(_wide_norm(self.norm1, image).to(dtype))).to(dtype)


def _wide_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """A LayerNorm in float32, whatever dtype the tokens and the norm's weights have."""
    weight, bias = norm.weight.float(), norm.bias.float()
    return nn.functional.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps)


class ConditionEmbedder(nn.Module):
    """Timesteps become modulation vectors, text and image embeddings what blocks attend to."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = _TimeEmbedder(config.freq_dim, config.dim)
        self.end_time_embedder: _TimeEmbedder | None = None
        self.time_proj = nn.Linear(config.dim, 6 * config.dim)
        self.text_embedder = _TextEmbedder(config.text_dim, config.dim)
        self.image_embedder = None
        if config.image_dim:
            self.image_embedder = _ImageEmbedder(config.image_dim, config.dim)
        if config.has_end_time:
            self.add_end_time()

    def image(self, image_BID: Tensor) -> Tensor:
        """Image tokens [B, I, C] of an image encoder's [B, I, image_dim]."""
        assert self.image_embedder is not None
        weight = self.image_embedder.ff.net[2].weight
        image: Tensor = self.image_embedder(image_BID.to(weight.dtype))  # type: ignore[arg-type]
        return image

    def add_end_time(self) -> None:
        """Make the second time embedding, which adds nothing until it is trained."""
        like = self.time_embedder.linear_1.weight
        added = _TimeEmbedder(self.freq_dim, len(like)).to(like.device, like.dtype)
        nn.init.zeros_(added.linear_2.weight)
        nn.init.zeros_(added.linear_2.bias)
        self.end_time_embedder = added

    def time(self, timestep_B: Tensor, end_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """temb [B, C] for the head and its projection [B, 6, C] for the blocks.

        end: as in `time_embedding`.
        """
        temb = self.time_embedding(timestep_B, end_B)
        return temb, self.time_proj(nn.functional.silu(temb)).unflatten(1, (6, -1))

    def time_embedding(self, timestep_B: Tensor, end_B: Tensor | None = None) -> Tensor:
        """temb [B, C] alone.

        end: the timestep to which a flow map's step goes; None is the timestep itself. How far it
        goes is embedded, so that plain flow has one and the same embedding at every timestep.
        """
        temb = _embedded(self.time_embedder, timestep_B, self.freq_dim)
        if self.end_time_embedder is not None:
            gap = torch.zeros_like(timestep_B) if end_B is None else timestep_B - end_B
            temb = temb + _embedded(self.end_time_embedder, gap, self.freq_dim)
        return temb.to(self.time_proj.weight.dtype)

    def text(self, text_BSD: Tensor) -> Tensor:
        """Text [B, S, C] of embeddings [B, S, text_dim]."""
        weight = self.text_embedder.linear_1.weight
        text: Tensor = self.text_embedder(text_BSD.to(weight.dtype))
        return text
