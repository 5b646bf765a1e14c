"""A transformer block: Wan's, with the camera, and its static form (METHOD 5 and 13).

A packed sequence passes like any other: its tokens name their timestep, and attention stays within
each of its samples.

B batch, L tokens, S text tokens, C width, F frames of the plan, P numbers of a camera.
"""

from __future__ import annotations

from collections.abc import Sequence as Series

import torch
from torch import Tensor, nn

from mv2v_engine.config import TransformerConfig
from mv2v_engine.models.attention import CrossAttention, SelfAttention
from mv2v_engine.models.camera_encoder import (
    POSE_DIM,
    Role,
    camera_encoder,
    camera_projector,
    projection,
)
from mv2v_engine.models.feed_forward import FeedForward
from mv2v_engine.models.modulation import Modulation, split_modulation
from mv2v_engine.models.packed import PackedSequence
from mv2v_engine.models.static_cache import ConditioningCache, KeysValues
from mv2v_engine.models.token_merge import Sequence
from mv2v_engine.ops.adaln import adaln
from mv2v_engine.ops.gated_residual import gated_residual
from mv2v_engine.ops.prope import prope
from mv2v_engine.ops.residual_norm import residual_norm


class Block(nn.Module):
    """One Wan block: self-attention with cameras, cross-attention, feed-forward."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim, heads, self.eps = config.dim, config.num_attention_heads, config.eps
        self.attn1 = SelfAttention(dim, heads, config.eps)
        self.attn2 = CrossAttention(dim, heads, config.eps)
        self.norm2 = nn.LayerNorm(dim, eps=config.eps)
        self.ffn = FeedForward(dim, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, dim).normal_().div_(dim**0.5))
        self.cam_encoder = camera_encoder(dim) if config.has_camera_modules else None
        self.projector = camera_projector(dim) if config.has_camera_modules else None
        self.camera_channels = config.camera_channels
        self.backend = "reference"

    def forward(
        self,
        sequence: Sequence | PackedSequence,
        temb_B6C: Tensor,
        context_BSC: Tensor,
        cameras_BFP: Tensor | None,
        kept: Series[KeysValues | None] | None = None,
    ) -> Tensor:
        """New tokens [B, L, C]; every token sees its sample's, and those whose K and V are kept.

        kept: one for every sample of a pack, otherwise one.
        """
        modulation, ffn_modulation = self.modulations(temb_B6C, sequence.row)

        # 1. self-attention
        attended = self._attend(sequence, modulation, cameras_BFP, kept)
        x, hidden = self._add_norm2(sequence.x, attended, modulation)
        del attended  # at full size every tensor of all tokens counts: nothing outlives its use

        # 2. cross-attention
        attended = self.attn2(hidden, context_BSC, sequence.text)
        del hidden
        x, hidden = self._add_adaln(x, attended, ffn_modulation)
        del attended

        # 3. feed-forward
        return self._add_gated(x, self.ffn(hidden), ffn_modulation)

    def modulations(
        self, temb_B6C: Tensor, row_BL: Tensor | None = None
    ) -> tuple[Modulation, Modulation]:
        """The attention's and the feed-forward's."""
        return split_modulation(self.scale_shift_table, temb_B6C, row_BL)

    def forward_static(
        self,
        sequence: Sequence,
        temb_B6C: Tensor,
        static_temb_B6C: Tensor,
        context_BSC: Tensor,
        cameras_BFP: Tensor | None,
        keep: ConditioningCache | None = None,
    ) -> Tensor:
        """As `forward`, with conditioning that sees only itself, at t = 0 and without text.

        (METHOD 13.) Target queries see everything. keep: receives the conditioning's K and V.
        """
        target, conditioning = sequence.halves()
        x_c, keys_values = self._forward_conditioning(conditioning, static_temb_B6C, cameras_BFP)
        if keep is not None:
            keep.append(keys_values)
        x_t = self.forward(target, temb_B6C, context_BSC, cameras_BFP, [keys_values])
        return torch.cat([x_t, x_c], 1)

    def _forward_conditioning(
        self, conditioning: Sequence, temb_B6C: Tensor, cameras_BFP: Tensor | None
    ) -> tuple[Tensor, KeysValues]:
        """New conditioning tokens, and the K and V that they had: neither knows of the target."""
        modulation, ffn_modulation = self.modulations(temb_B6C)
        queries, keys, values = self._queries_keys_values(conditioning, modulation, cameras_BFP)
        attended = self.attn1.attend(queries, keys, values)
        del queries
        attended = self._project(attended, conditioning, cameras_BFP)
        x, hidden = self._add_adaln(conditioning.x, attended, ffn_modulation, gate=modulation.gate)
        del attended
        return self._add_gated(x, self.ffn(hidden), ffn_modulation), (keys, values)

    def _attend(
        self,
        sequence: Sequence | PackedSequence,
        modulation: Modulation,
        cameras_BFP: Tensor | None,
        kept: Series[KeysValues | None] | None,
    ) -> Tensor:
        """What self-attention adds [B, L, C], over kept K and V too; its q, k and v go with it."""
        queries, keys, values = self._queries_keys_values(sequence, modulation, cameras_BFP)
        if kept is not None:
            # one after the other: half the copies at once
            keys = sequence.followed_by(keys, [pair and pair[0] for pair in kept])
            values = sequence.followed_by(values, [pair and pair[1] for pair in kept])
        attended = self.attn1.attend(queries, keys, values, sequence.pack_over(kept))
        del queries, keys, values
        return self._project(attended, sequence, cameras_BFP)

    def _queries_keys_values(
        self,
        sequence: Sequence | PackedSequence,
        modulation: Modulation,
        cameras_BFP: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, L, N, D] of the sequence's own tokens.

        Where they lie over ranks: of all tokens, with the heads of this rank.
        """
        hidden = self.attention_input(sequence, modulation, cameras_BFP)
        queries = self.attn1.queries(hidden, sequence.rope)
        queries = self._from_cameras(queries, "query", sequence, cameras_BFP)
        shard = sequence.shard
        if shard is not None:
            queries = shard.by_heads(queries)
        keys, values = self.attn1.keys_values(hidden, sequence.rope)
        del hidden
        keys = self._from_cameras(keys, "key", sequence, cameras_BFP)
        values = self._from_cameras(values, "key", sequence, cameras_BFP)
        if shard is None:
            return queries, keys, values
        keys = shard.by_heads(keys)
        return queries, keys, shard.by_heads(values)

    def _from_cameras(
        self,
        x_BLND: Tensor,
        role: Role,
        sequence: Sequence | PackedSequence,
        cameras_BFP: Tensor | None,
    ) -> Tensor:
        """PRoPE of this rank's tokens with all heads; without it they are left as they are."""
        if not self.camera_channels:
            return x_BLND
        assert cameras_BFP is not None
        return prope(
            x_BLND,
            projection(cameras_BFP, role),
            sequence.token_frames,
            channels=self.camera_channels,
            backend=self.backend,
        )

    def attention_input(
        self,
        sequence: Sequence | PackedSequence,
        modulation: Modulation,
        cameras_BFP: Tensor | None,
    ) -> Tensor:
        """The modulated tokens, with their cameras, from which q, k and v are made."""
        camera = frames = None
        if self.cam_encoder is not None and cameras_BFP is not None:
            poses = cameras_BFP[..., :POSE_DIM]
            camera = self.cam_encoder(poses.to(self.cam_encoder.weight.dtype))
            frames = sequence.token_frames
        return adaln(
            sequence.x,
            modulation.scale,
            modulation.shift,
            camera=camera,
            frame=frames,
            row=modulation.row,
            eps=self.eps,
            backend=self.backend,
        )

    def _project(
        self,
        attended: Tensor,
        sequence: Sequence | PackedSequence,
        cameras_BFP: Tensor | None,
    ) -> Tensor:
        """What attention made, projected, and by the camera's projector after it (METHOD 5)."""
        if sequence.shard is not None:
            attended = sequence.shard.by_tokens(attended, self.attn1.num_heads)
        out = self.attn1.out(self._from_cameras(attended, "output", sequence, cameras_BFP))
        return out if self.projector is None else self.projector(out)

    def _add_norm2(self, x: Tensor, y: Tensor, modulation: Modulation) -> tuple[Tensor, Tensor]:
        """The gated sum, and what cross-attention is given."""
        return residual_norm(
            x,
            y,
            gate=modulation.gate,
            row=modulation.row,
            weight=self.norm2.weight,
            shift=self.norm2.bias,
            eps=self.eps,
            backend=self.backend,
        )

    def _add_adaln(
        self, x: Tensor, y: Tensor, modulation: Modulation, *, gate: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The sum, and what the feed-forward is given."""
        return residual_norm(
            x,
            y,
            gate=gate,
            row=modulation.row,
            scale=modulation.scale,
            shift=modulation.shift,
            eps=self.eps,
            backend=self.backend,
        )

    def _add_gated(self, x: Tensor, y: Tensor, modulation: Modulation) -> Tensor:
        return gated_residual(x, y, modulation.gate, row=modulation.row, backend=self.backend)
