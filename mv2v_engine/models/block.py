"""A transformer block: Wan's, with the camera (METHOD 5).

Static conditioning (METHOD 13) is two calls of it: one of the conditioning, without text, and one
of the target over the K and V that the first one had.

B batch, L tokens, N heads, D head dim, C width, P numbers of a camera.
"""

from __future__ import annotations

from collections.abc import Sequence as Series
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from mv2v_engine.config import TransformerConfig
from mv2v_engine.models.actions import CameraActions, StateSpaceMemory, by_frame, by_place
from mv2v_engine.models.attention import CrossAttention, HistoryAttention, SelfAttention
from mv2v_engine.models.camera_encoder import (
    POSE_DIM,
    Role,
    camera_encoder,
    camera_projector,
    projection,
)
from mv2v_engine.models.camera_rays import turned
from mv2v_engine.models.feed_forward import FeedForward
from mv2v_engine.models.kept import KeysValues
from mv2v_engine.models.modulation import Modulation, split_modulation
from mv2v_engine.models.sequence import Sequence
from mv2v_engine.models.stream_cache import StreamLayer
from mv2v_engine.ops.adaln import adaln
from mv2v_engine.ops.gated_residual import gated_residual
from mv2v_engine.ops.prope import prope
from mv2v_engine.ops.residual_norm import residual_norm
from mv2v_engine.ops.rope import rope


class Block(nn.Module):
    """One Wan block: self-attention with cameras, cross-attention, feed-forward."""

    def __init__(self, config: TransformerConfig, index: int = 0) -> None:
        super().__init__()
        dim, heads, self.eps = config.dim, config.num_attention_heads, config.eps
        num_phases = config.num_phases if config.has_phases else 0
        self.attn1 = SelfAttention(dim, heads, config.eps, num_phases)
        self.attn2 = CrossAttention(dim, heads, config.eps, has_image=config.image_dim > 0)
        self.norm2 = nn.LayerNorm(dim, eps=config.eps)
        self.ffn = FeedForward(dim, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, dim).normal_().div_(dim**0.5))
        self.cam_encoder = camera_encoder(dim) if config.has_camera_modules else None
        self.projector = camera_projector(dim) if config.has_camera_modules else None
        self.action_mlp = CameraActions(dim) if config.camera_actions else None
        self.attn_frames = None
        if config.action_attention:
            self.attn_frames = SelfAttention(dim, heads, config.eps)
        self.attn_history = None
        if config.history is not None and index in config.history.cross_attention:
            width = config.history.channels[-1]
            self.attn_history = HistoryAttention(dim, heads, config.eps, width)
        self.state_space = StateSpaceMemory(dim) if index in config.state_space else None
        self.camera_channels = config.camera_channels
        self.backend = "reference"

    def forward(
        self,
        sequence: Sequence,
        kept: Series[KeysValues | None] | None = None,
        keeps: bool = False,
        stream: StreamLayer | None = None,
    ) -> tuple[Tensor, KeysValues | None]:
        """New tokens [B, L, C]; every token sees its sample's, and those whose K and V are kept.

        kept: one for every sample. keeps: K and V of the sequence's own tokens are returned, too.
        stream: takes K and V of the sequence, the newest frames of a stream, and has the others'.
        """
        own, ffn = self._modulations(sequence)
        if self.action_mlp is not None:
            sequence = replace(sequence, x=self._with_actions(sequence, self.action_mlp))

        # 1. self-attention
        attended, keys_values = self._attend(sequence, own, kept, keeps, stream)

        # 2. cross-attention
        if sequence.text is None:
            x, hidden = self._add_adaln(sequence.x, attended, ffn, gate=own.gate)
        else:
            x, hidden = self._add_norm2(sequence, attended, own)
            del attended  # at full size every tensor of all tokens counts: nothing outlives its use
            # not held by a name: they would stay through the feed-forward
            attended = self.attn2(
                hidden,
                self._text(sequence.text, stream),
                sequence.text_pack,
                None if sequence.image is None else self.attn2.image_keys_values(sequence.image),
                sequence.image_pack,
            )
            if self.attn_history is not None:
                attended = attended + self._from_history(self.attn_history, sequence, hidden)
            del hidden
            x, hidden = self._add_adaln(x, attended, ffn)
        del attended

        # 3. feed-forward
        x = gated_residual(x, self.ffn(hidden), ffn.gate, row=ffn.row, backend=self.backend)
        return x, keys_values

    def attention_input(self, sequence: Sequence, modulation: Modulation | None = None) -> Tensor:
        """The modulated tokens, with their cameras, from which q, k and v are made.

        modulation: the attention's, where it is known already.
        """
        modulation = modulation or self._modulations(sequence)[0]
        camera = frames = None
        if self.cam_encoder is not None and sequence.cameras is not None:
            poses = sequence.cameras[..., :POSE_DIM]
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

    def _modulations(self, sequence: Sequence) -> tuple[Modulation, Modulation]:
        """The attention's and the feed-forward's."""
        return split_modulation(self.scale_shift_table, sequence.temb_6, sequence.row)

    def _attend(
        self,
        sequence: Sequence,
        modulation: Modulation,
        kept: Series[KeysValues | None] | None,
        keeps: bool,
        stream: StreamLayer | None,
    ) -> tuple[Tensor, KeysValues | None]:
        """The result of self-attention [B, L, C], and with `keeps` the K and V of the tokens.

        Over ranks, q, k and v become those of all tokens with this rank's heads.
        """
        hidden, shard = self.attention_input(sequence, modulation), sequence.shard
        queries = self.attn1.queries(hidden, sequence.rope)
        queries = self._from_cameras(queries, "query", sequence)
        phases = self.attn1.phases(sequence.rays)
        if phases is not None:
            queries = turned(queries, phases[0])
        if shard is not None:
            queries = shard.by_heads(queries)
        rotary = sequence.rope if stream is None else None
        keys, values = self.attn1.keys_values(hidden, rotary)
        del hidden
        keys = self._from_cameras(keys, "key", sequence)
        values = self._from_cameras(values, "key", sequence)
        if phases is not None:
            keys, values = turned(keys, phases[0]), turned(values, -phases[1])
        if shard is not None:
            keys = shard.by_heads(keys)
            values = shard.by_heads(values)
        own = (keys, values) if keeps else None
        if stream is not None:
            keys, values = stream.put(keys, values)
            keys = rope(keys, stream.rope(keys.device), backend=self.backend)
        if kept is not None:
            # one after the other: half the copies at once
            keys = sequence.followed_by(keys, [pair and pair[0] for pair in kept])
            values = sequence.followed_by(values, [pair and pair[1] for pair in kept])
        attended = self.attn1.attend(queries, keys, values, sequence.pack_over(kept))
        del queries, keys, values
        if shard is not None:
            attended = shard.by_tokens(attended, self.attn1.num_heads)
        out = self.attn1.out(self._from_cameras(attended, "output", sequence))
        if phases is not None:
            heads = out.unflatten(-1, (self.attn1.num_heads, -1))
            out = turned(heads, phases[1]).flatten(2)
        return (out if self.projector is None else self.projector(out)), own

    def _text(self, text: Tensor, stream: StreamLayer | None) -> KeysValues:
        """K and V of cross-attention, which a stream keeps."""
        if stream is None:
            return self.attn2.keys_values(text)
        if stream.text is None:
            stream.text = self.attn2.keys_values(text)
        return stream.text

    def _from_history(
        self, attention: HistoryAttention, sequence: Sequence, hidden: Tensor
    ) -> Tensor:
        """What every sample's tokens read of its history [B, L, C]; nothing where it has none."""
        read = [
            torch.zeros_like(p.x) if p.history is None else attention(p.x, p.history)
            for p in replace(sequence, x=hidden).split()
        ]
        return read[0] if len(read) == 1 else torch.cat(read, 1)

    def _from_cameras(self, x_BLND: Tensor, role: Role, sequence: Sequence) -> Tensor:
        """PRoPE of this rank's tokens with all heads; without it they are left as they are."""
        if not self.camera_channels:
            return x_BLND
        assert sequence.cameras is not None
        return prope(
            x_BLND,
            projection(sequence.cameras, role),
            sequence.token_frames,
            channels=self.camera_channels,
            backend=self.backend,
        )

    def _with_actions(self, sequence: Sequence, actions: CameraActions) -> Tensor:
        """Tokens [B, L, C] with their frames' cameras."""
        moved: Tensor = sequence.x + actions(sequence)
        if self.attn_frames is None:
            return moved
        attended = []
        for part in replace(sequence, x=moved).split():
            hidden = by_place(part.x, part.layout.num_frames)
            queries = self.attn_frames.queries(hidden, None)
            pair = self.attn_frames.keys_values(hidden, None)
            out = self.attn_frames.out(self.attn_frames.attend(queries, *pair))
            attended.append(by_frame(out, len(part.x)))
        result: Tensor = sequence.x + torch.cat(attended, 1)
        return result

    def _add_norm2(
        self, sequence: Sequence, y: Tensor, modulation: Modulation
    ) -> tuple[Tensor, Tensor]:
        """The gated sum, and what cross-attention is given."""
        x = sequence.x
        if self.state_space is not None:
            gate, row = modulation.gate, modulation.row
            x = gated_residual(x, y, gate, row=row, backend=self.backend)
            x = torch.cat(
                [
                    self.state_space(p.x, p.layout.num_frames, p.layout.runs[0].num_frames)
                    for p in replace(sequence, x=x).split()
                ],
                1,
            )
            weight, bias = self.norm2.weight.float(), self.norm2.bias.float()
            hidden = layer_norm(x.float(), weight.shape, weight, bias, self.eps)
            return x, hidden.to(x.dtype)
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
