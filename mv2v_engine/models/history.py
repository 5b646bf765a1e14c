"""TinyHistory's encoder: a whole history of latents becomes few tokens (METHOD 17).

A token is the sum of two branches. The low-resolution one averages the latents over the cells of a
token and takes them through the transformer's own patch embedding, which adds no weights. The
full-resolution one is four strided convolutions with attention within a frame; its last layer is
zero at the start, so that an untrained encoder is the low-resolution branch.

Convolutions look back in time and never ahead, so that a new part of a history is encoded alone.

B batch, C latent channels, F H W latent grid, L tokens, D transformer width, E channels of the last
convolution, t latent frames that a token covers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mv2v_engine.config import TransformerConfig
from mv2v_engine.errors import RequestError
from mv2v_engine.models.attention import SelfAttention
from mv2v_engine.ops.conv3d import PatchConv3d
from mv2v_engine.shapes import rate_of
from mv2v_engine.tokens.encoders import FRAMES_AT_ONCE, history_strides
from mv2v_engine.tokens.layout import encoded_grid


class Encoded(NamedTuple):
    """tokens [B, L, D], frame by frame, row by row; hidden [B, L, E], what they were made of in the
    full-resolution branch, None without it."""

    tokens: Tensor
    hidden: Tensor | None


@dataclass(frozen=True, eq=False)
class HistoryState:
    """What a history leaves for the part that comes after it.

    past: the last inputs of every convolution. pending: its last frames [B, C, <t, H, W], which do
    not fill a token yet.
    """

    past: tuple[Tensor, ...] = ()
    pending: Tensor | None = None


class HistoryTokens:
    """The tokens of a history that grows by videos, each of which is encoded alone and once.

    What is kept is that of the last history that was asked for. with_hidden: each token is
    followed by what it was made of.
    """

    def __init__(self, encoder: HistoryEncoder, base: nn.Conv3d, *, with_hidden: bool) -> None:
        self._encoder, self._base, self._with_hidden = encoder, base, with_hidden
        self._parts: list[tuple[str, Encoded, Encoded | None, HistoryState]] = []

    def forget(self, id: str | None = None) -> None:
        """Let go of a video and of all that came after it; None: of all."""
        ids = [part[0] for part in self._parts]
        del self._parts[0 if id is None else ids.index(id) if id in ids else len(ids) :]

    @torch.no_grad()
    def of(self, videos: Sequence[tuple[str, Tensor]]) -> Tensor:
        """Tokens float32 [1, L, D or D + E] of videos one after the other.

        videos: id and latents [C, F, H, W] of each. Those at the beginning that were the
        beginning before are not encoded again.

        Raises:
            RequestError: as `HistoryEncoder.forward`.
        """
        known = [part[0] for part in self._parts]
        same = 0
        while same < min(len(known), len(videos)) and known[same] == videos[same][0]:
            same += 1
        del self._parts[same:]
        for id, latents in videos[same:]:
            state = self._parts[-1][3] if self._parts else HistoryState()
            part = latents[None].to(self._base.weight.device)
            self._parts.append((id, *self._encoder.append(part, self._base, state)))
        found = [part[1] for part in self._parts]
        found += [last for *_, last, _ in self._parts[-1:] if last is not None]
        tokens = torch.cat([each.tokens for each in found], 1).float()
        if not self._with_hidden:
            return tokens
        hidden = [each.hidden for each in found if each.hidden is not None]
        return torch.cat([tokens, torch.cat(hidden, 1).float()], 2)


class CausalConv(nn.Conv3d):
    """A 3x3x3 convolution that sees frames of before and none to come, then SiLU."""

    def __init__(self, channels: int, made: int, stride: tuple[int, int, int]) -> None:
        super().__init__(channels, made, 3, stride=stride, padding=(0, 1, 1))
        # inputs before the first of an output's own
        self.behind = 3 - stride[0]

    def follow(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """The result for the frames of x [B, C, F, H, W], and the past of those after it.

        past: None at the beginning, before which there is nothing.
        """
        if past is None:
            past = x.new_zeros(*x.shape[:2], self.behind, *x.shape[3:])
        x = torch.cat([past, x], 2)
        return F.silu(super().forward(x)), x[:, :, -self.behind :]


class HistoryEncoder(nn.Module):
    """Makes a history's tokens at one rate. rate: as "4x4x2", one of `HistoryConfig.rates`."""

    def __init__(self, config: TransformerConfig, rate: str) -> None:
        super().__init__()
        assert config.history is not None
        self.config, self.channels = config.history, config.latent_channels
        self.rate, self.rows, self.frames = rate, rate_of(rate)[0], rate_of(rate)[2]
        self.patch = 2 * self.rows
        self.convs, widths = nn.ModuleList(), self.config.channels
        if self.config.branches == "kernel":
            size = (self.frames, self.patch, self.patch)
            self.kernel = PatchConv3d(self.channels, config.dim, size)
        if not self.config.has_convolutions:
            return
        strides = history_strides(self.patch, self.frames)
        for given, made, stride in zip((self.channels, *widths), widths, strides, strict=False):
            self.convs.append(CausalConv(given, made, stride))
        self.norm = nn.LayerNorm(widths[-1], eps=config.eps)
        self.attention = SelfAttention(widths[-1], self.config.heads, config.eps)
        self.proj = nn.Linear(widths[-1], config.dim)
        nn.init.zeros_(self.proj.bias)
        if self.config.branches == "both":  # alone it would pass nothing on
            nn.init.zeros_(self.proj.weight)

    @torch.no_grad()
    def begin_as(self, base: nn.Conv3d) -> None:
        """Let the ablation's kernel be the base's repeated, so that it averages a token's cells."""
        if self.config.branches != "kernel" or self.kernel.weight.is_meta:
            return
        weight = base.weight[:, : self.channels].repeat_interleave(self.frames, 2)
        weight = weight.repeat_interleave(self.rows, 3).repeat_interleave(self.rows, 4)
        self.kernel.weight.copy_(weight / (self.frames * self.rows**2))
        if self.kernel.bias is not None and base.bias is not None:
            self.kernel.bias.copy_(base.bias)

    def forward(self, latents_BCFHW: Tensor, base: nn.Conv3d) -> Encoded:
        """All tokens of a history, whose last frame is repeated to a whole stride.

        base: the transformer's patch embedding.

        Raises:
            RequestError: latents of another VAE, of fewer cells than a token covers, of no frame.
        """
        found, state, last = list[Encoded](), HistoryState(), None
        length = latents_BCFHW.shape[2] if torch.is_grad_enabled() else FRAMES_AT_ONCE
        for part in latents_BCFHW.split(max(length, 1), 2):
            made, last, state = self.append(part, base, state)
            found.append(made)
        found += [] if last is None else [last]
        hidden = [each.hidden for each in found if each.hidden is not None]
        tokens = torch.cat([each.tokens for each in found], 1)
        return Encoded(tokens, torch.cat(hidden, 1) if hidden else None)

    def append(
        self, latents_BCFHW: Tensor, base: nn.Conv3d, state: HistoryState
    ) -> tuple[Encoded, Encoded | None, HistoryState]:
        """The tokens that a new part of a history completes, and the state after it.

        Between them the token of the frames that are pending then, as if the last one were
        repeated: it stands for them until their token is complete. None where no frame is pending.

        Raises:
            RequestError: as `forward`.
        """
        latents = self._cropped(latents_BCFHW)
        if state.pending is not None:
            latents = torch.cat([state.pending, latents], 2)
        count = latents.shape[2] // self.frames * self.frames
        done, past = self._encode(latents[:, :, :count], base, state.past)
        pending = latents[:, :, count:]
        if not pending.shape[2]:
            return done, None, HistoryState(past)
        more = self.frames - pending.shape[2]
        filled = torch.cat([pending, pending[:, :, -1:].expand(-1, -1, more, -1, -1)], 2)
        return done, self._encode(filled, base, past)[0], HistoryState(past, pending)

    def _cropped(self, latents: Tensor) -> Tensor:
        channels, frames, rows, columns = latents.shape[1:]
        if channels != self.channels:
            raise RequestError(
                f"the history has latents of {channels} channels, this encoder takes "
                f"{self.channels}; give latents of the VAE that belongs to it"
            )
        if min(rows, columns) < self.patch or not frames:
            raise RequestError(
                f"a token of rate {self.rate} covers {self.frames} latent frames of "
                f"{self.patch}x{self.patch} cells, got latents {list(latents.shape)}"
            )
        _, token_rows, token_columns = encoded_grid(
            "history", (frames, rows, columns), self.patch, self.frames
        )
        return latents[..., : token_rows * self.patch, : token_columns * self.patch]

    def _encode(
        self, latents: Tensor, base: nn.Conv3d, past: tuple[Tensor, ...]
    ) -> tuple[Encoded, tuple[Tensor, ...]]:
        """Whole strides of frames, of which there may be none."""
        x, hidden, tokens = latents.to(base.weight.dtype), None, None
        if not x.shape[2]:
            empty = x.new_zeros(len(x), 0, base.out_channels)
            if self.config.has_convolutions:
                hidden = x.new_zeros(len(x), 0, self.config.channels[-1])
            return Encoded(empty, hidden), past
        if self.config.branches == "kernel":
            tokens = self.kernel(latents.to(self.kernel.weight.dtype)).flatten(2).mT
        if self.config.branches in ("both", "lr"):
            pooled = F.avg_pool3d(x, (self.frames, self.rows, self.rows))
            weight = base.weight[:, : self.channels]
            tokens = F.conv3d(pooled, weight, base.bias, stride=(1, 2, 2)).flatten(2).mT
        if self.config.has_convolutions:
            hidden, past = self._full_resolution(latents, past)
            high = self.proj(hidden)
            tokens = high if tokens is None else tokens + high
        assert tokens is not None
        return Encoded(tokens, hidden), past

    def _full_resolution(
        self, latents: Tensor, past: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, kept = latents.to(self.proj.weight.dtype), []
        for index, conv in enumerate(self.convs):
            x, left = cast(CausalConv, conv).follow(x, past[index] if past else None)
            kept.append(left)
        frames = x.shape[2]
        # attention within a frame of tokens: what is encoded later changes nothing of it
        x = x.flatten(3).permute(0, 2, 3, 1).flatten(0, 1)
        normed, attention = self.norm(x), self.attention
        attended = attention.attend(
            attention.queries(normed, None), *attention.keys_values(normed, None)
        )
        x = x + attention.out(attended)
        return x.unflatten(0, (-1, frames)).flatten(1, 2), tuple(kept)
