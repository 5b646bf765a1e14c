"""MV2VTransformer: Wan's diffusion transformer over a token plan, with memory.

Target, source and memory tokens are one sequence; every video has its own tokenizer, temporal
ids and cameras; at the merging blocks the conditioning frames that the target ignores are fused
before attention. A plan with a target alone is Wan's own model, parameter for parameter.

B batch, L tokens, S text tokens, C width, N heads, D head dim, F frames.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Series
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mv2v_engine.config import HeadMode, TransformerConfig
from mv2v_engine.models.attention import CrossAttention, SelfAttention
from mv2v_engine.models.camera_encoder import camera_encoder, camera_projector, frame_cameras
from mv2v_engine.models.feed_forward import FeedForward
from mv2v_engine.models.modulation import ConditionEmbedder, Modulation, split_modulation
from mv2v_engine.models.rope import rotary_table
from mv2v_engine.models.token_merge import (
    Merger,
    MergeRecord,
    Sequence,
    apply_merge,
    joint_counts,
)
from mv2v_engine.ops.adaln import adaln
from mv2v_engine.ops.frame_responsiveness import frame_responsiveness
from mv2v_engine.ops.gated_residual import gated_residual
from mv2v_engine.ops.residual_norm import residual_norm
from mv2v_engine.tokens.plan import TokenPlan
from mv2v_engine.tokens.tokenizers import Tokenizer, init_from_base


class Block(nn.Module):
    """One Wan block: self-attention with cameras, cross-attention, feed-forward."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim, heads, self.eps = config.dim, config.num_attention_heads, config.eps
        self.attn1 = SelfAttention(dim, heads, config.eps)
        self.attn2 = CrossAttention(dim, heads, config.eps)
        self.norm2 = nn.LayerNorm(dim, eps=config.eps)
        self.ffn = FeedForward(dim, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.cam_encoder = camera_encoder(dim) if config.has_camera else None
        self.projector = camera_projector(dim) if config.has_camera else None
        self.backend = "reference"

    def forward(
        self,
        sequence: Sequence,
        temb_B6C: Tensor,
        context_BSC: Tensor,
        cameras_BFP: Tensor | None,
    ) -> Tensor:
        """New tokens [B, L, C]; every token sees every token."""
        x, rope = sequence.x, sequence.rope
        modulation, ffn_modulation = split_modulation(self.scale_shift_table, temb_B6C)

        # 1. self-attention
        hidden = self.attention_input(sequence, temb_B6C, cameras_BFP)
        attended = self.attn1.attend(
            self.attn1.queries(hidden, rope), *self.attn1.keys_values(hidden, rope)
        )
        x, hidden = self._add_norm2(x, self._project(attended), modulation)

        # 2. cross-attention
        x, hidden = self._add_adaln(x, self.attn2(hidden, context_BSC), ffn_modulation)

        # 3. feed-forward
        return gated_residual(x, self.ffn(hidden), ffn_modulation.gate, backend=self.backend)

    def forward_static(
        self,
        sequence: Sequence,
        temb_B6C: Tensor,
        static_temb_B6C: Tensor,
        context_BSC: Tensor,
        cameras_BFP: Tensor | None,
    ) -> Tensor:
        """As `forward`, with conditioning that sees only itself, at t = 0 and without text.

        (METHOD 13.) Target queries see everything.
        """
        split = sequence.layout.target_length
        modulation, ffn_modulation = split_modulation(self.scale_shift_table, temb_B6C)
        still, ffn_still = split_modulation(self.scale_shift_table, static_temb_B6C)
        frames = sequence.token_frames()
        x_t, x_c = sequence.x[:, :split], sequence.x[:, split:]
        rope_t, rope_c = sequence.rope[:, :split], sequence.rope[:, split:]

        # 1. self-attention: the conditioning's keys and values do not depend on the target
        h_t = self._modulate(x_t, temb_B6C, cameras_BFP, frames[:, :split])
        h_c = self._modulate(x_c, static_temb_B6C, cameras_BFP, frames[:, split:])
        keys_c, values_c = self.attn1.keys_values(h_c, rope_c)
        keys_t, values_t = self.attn1.keys_values(h_t, rope_t)
        attended_t = self.attn1.attend(
            self.attn1.queries(h_t, rope_t),
            torch.cat([keys_t, keys_c], 1),
            torch.cat([values_t, values_c], 1),
        )
        attended_c = self.attn1.attend(self.attn1.queries(h_c, rope_c), keys_c, values_c)
        x_t, h_t = self._add_norm2(x_t, self._project(attended_t), modulation)
        x_c, h_c = self._add_adaln(x_c, self._project(attended_c), ffn_still, gate=still.gate)

        # 2. cross-attention, the target alone
        x_t, h_t = self._add_adaln(x_t, self.attn2(h_t, context_BSC), ffn_modulation)

        # 3. feed-forward
        x_t = gated_residual(x_t, self.ffn(h_t), ffn_modulation.gate, backend=self.backend)
        x_c = gated_residual(x_c, self.ffn(h_c), ffn_still.gate, backend=self.backend)
        return torch.cat([x_t, x_c], 1)

    def attention_input(
        self, sequence: Sequence, temb_B6C: Tensor, cameras_BFP: Tensor | None
    ) -> Tensor:
        """The modulated tokens, with their cameras, from which q, k and v are made."""
        frames = None if cameras_BFP is None else sequence.token_frames()
        return self._modulate(sequence.x, temb_B6C, cameras_BFP, frames)

    def _modulate(
        self, x: Tensor, temb_B6C: Tensor, cameras_BFP: Tensor | None, frames: Tensor | None
    ) -> Tensor:
        modulation, _ = split_modulation(self.scale_shift_table, temb_B6C)
        camera = None
        if self.cam_encoder is not None and cameras_BFP is not None:
            camera = self.cam_encoder(cameras_BFP.to(self.cam_encoder.weight.dtype))
        return adaln(
            x,
            modulation.scale,
            modulation.shift,
            camera=camera,
            frame=None if camera is None else frames,
            eps=self.eps,
            backend=self.backend,
        )

    def _project(self, attended: Tensor) -> Tensor:
        return attended if self.projector is None else self.projector(attended)

    def _add_norm2(self, x: Tensor, y: Tensor, modulation: Modulation) -> tuple[Tensor, Tensor]:
        """The gated sum, and what cross-attention is given."""
        return residual_norm(
            x,
            y,
            gate=modulation.gate,
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
            scale=modulation.scale,
            shift=modulation.shift,
            eps=self.eps,
            backend=self.backend,
        )


class MV2VTransformer(nn.Module):
    """The denoiser. Parameter names are diffusers' `WanTransformer3DModel`'s, and
    `blocks.N.cam_encoder`, `blocks.N.projector`, `tokenizers.K`, `mergers.N`.
    """

    # small and sensitive: diffusers keeps them in float32 under bf16 weights, and so do we
    keep_in_fp32_modules = ("time_embedder", "scale_shift_table", "norm2")

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, (1, 2, 2), stride=(1, 2, 2))
        self.tokenizers = nn.ModuleDict(
            {str(k): Tokenizer(config.in_channels, dim, k) for k in config.tokenizers}
        )
        for tokenizer in self.tokenizers.values():
            init_from_base(tokenizer, self.patch_embedding)  # type: ignore[arg-type]
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.mergers = nn.ModuleDict()
        if config.merger is not None:
            merging = config.merging_blocks[:1] if config.merger.shared else config.merging_blocks
            for block in merging:
                self.mergers[str(block)] = Merger(dim, config.merger)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.proj_out = nn.Linear(dim, config.out_channels * 4)
        self.backend = "reference"
        self.responsiveness_heads: HeadMode = "concat"
        # training: keep every block's input alone and compute the rest again on the way back
        self.gradient_checkpointing = False

    def set_backend(self, backend: str, attention: str | None = None) -> None:
        """Run every operation on a resolved backend (`ops.backend.resolve`).

        attention: a library (`ops.attention_backends.resolve_attention`); None takes the fastest,
            or the reference under the reference.
        """
        attention = attention or ("reference" if backend == "reference" else "auto")
        for module in self.modules():
            if hasattr(module, "backend"):
                module.backend = backend  # type: ignore[assignment]
            if hasattr(module, "attention_backend"):
                module.attention_backend = attention  # type: ignore[assignment]

    def forward(
        self,
        latents: Series[Tensor],
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        plan: TokenPlan,
        cameras: Tensor | None = None,
        records: list[MergeRecord] | None = None,
    ) -> Tensor:
        """Velocity of the target latents [B, C_out, F, H, W].

        Args:
            latents: one tensor [B, C_in, F, H, W] per segment of the plan, the target first.
            timestep: [B], in 0..1000.
            encoder_hidden_states: text embeddings [B, S, text_dim].
            cameras: tracks [B, V, F, 12], row-major [R|t] relative to the source's first frame;
                None for a model without cameras.
            records: receives what every merge did.
        """
        self._check(latents, plan, cameras)
        sequence = self._embed(latents, plan)
        rows = None if cameras is None else frame_cameras(plan, cameras)
        temb, temb_6 = self.condition_embedder.time(timestep)
        static_temb = None
        if plan.conditioning == "static":
            _, static_temb = self.condition_embedder.time(torch.zeros_like(timestep))
        context = self.condition_embedder.text(encoder_hidden_states)
        merging = () if plan.merge == "off" else self.config.merging_blocks
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            if index in merging:
                sequence = self._merge(
                    index, block, sequence, plan, temb_6, static_temb, rows, records
                )
            if static_temb is None:
                x = self._run(block, sequence, temb_6, context, rows)
            else:
                x = self._run(block.forward_static, sequence, temb_6, static_temb, context, rows)
            sequence = replace(sequence, x=x)
        return self._head(sequence.x[:, : plan.target.length], temb, plan)

    def _run(self, layer: Callable[..., Tensor], *arguments: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # nothing here draws random numbers, so their state need not be kept
            result: Tensor = checkpoint(
                layer, *arguments, use_reentrant=False, preserve_rng_state=False
            )
            return result
        return layer(*arguments)

    def _check(self, latents: Series[Tensor], plan: TokenPlan, cameras: Tensor | None) -> None:
        if len(latents) != len(plan.segments):
            raise ValueError(f"the plan has {len(plan.segments)} segments, got {len(latents)}")
        for latent, segment in zip(latents, plan.segments, strict=True):
            expected = (self.config.in_channels, *segment.grid)
            if tuple(latent.shape[1:]) != expected:
                raise ValueError(
                    f"{segment.role} latents must have shape [B, {', '.join(map(str, expected))}], "
                    f"got {list(latent.shape)}"
                )
        if plan.scope == "joint" and len(latents[0]) > 1:
            raise ValueError(
                f'scope="joint" merges other counts in every sample, got a batch of '
                f'{len(latents[0])}; run one sample at a time or use scope="group"'
            )
        if (cameras is None) == self.config.has_camera:
            raise ValueError(
                f"cameras are {'missing' if cameras is None else 'given'}, but the model's "
                f"camera_conditioning is {self.config.camera_conditioning!r}"
            )

    def _embed(self, latents: Series[Tensor], plan: TokenPlan) -> Sequence:
        """Tokenize every segment, the target with the base model's own patch embedding."""
        target = self.patch_embedding(latents[0].to(self.patch_embedding.weight.dtype))
        parts = [target.flatten(2).transpose(1, 2)]
        for latent, segment in zip(latents[1:], plan.segments[1:], strict=True):
            parts.append(self.tokenizers[str(segment.tokenizer)](latent))
        x = torch.cat(parts, dim=1)
        frames = torch.arange(len(plan.frame_table), device=x.device).expand(len(x), -1)
        return Sequence(x, _rotary_table(plan, x.device)[None], frames, plan.layout)

    def _merge(
        self,
        index: int,
        block: Block,
        sequence: Sequence,
        plan: TokenPlan,
        temb_6: Tensor,
        static_temb: Tensor | None,
        rows: Tensor | None,
        records: list[MergeRecord] | None,
    ) -> Sequence:
        """Fuse the frames that this block's own queries and keys show to be ignored."""
        layout = sequence.layout
        counts = plan.merge_counts(layout)
        # nothing to choose: the plan counts no responsiveness here either
        if not layout.groups() or (plan.scope == "group" and not any(counts)):
            return sequence
        with torch.no_grad():
            scores = self.responsiveness(block, sequence, temb_6, static_temb, rows)
        if plan.scope == "joint":
            counts = joint_counts(scores, sequence, plan.merge_fraction)
        step = plan.step_at(index, layout, counts)
        if not step.groups:
            return sequence
        shared = self.config.merger is not None and self.config.merger.shared
        key = str(self.config.merging_blocks[0] if shared else index)
        merger = self.mergers[key] if self.config.merger is not None else None
        sequence, record = apply_merge(
            sequence,
            step,
            scores,
            merger,  # type: ignore[arg-type]
            kernel=plan.merger.kernel,
            discard=plan.merge == "discard",
            backend=self.backend,
        )
        if records is not None:
            records.append(record)
        return sequence

    def responsiveness(
        self,
        block: Block,
        sequence: Sequence,
        temb_6: Tensor,
        static_temb: Tensor | None,
        rows: Tensor | None,
    ) -> Tensor:
        """R_t [B, F'] of the conditioning frames that enter this block (Eq. 4-5).

        The other arguments are what the block itself is given.
        """
        split, runs = sequence.layout.target_length, sequence.layout.runs[1:]
        hidden = block.attention_input(sequence, temb_6, rows)
        conditioning = hidden[:, split:]
        if static_temb is not None:
            conditioning = block.attention_input(sequence, static_temb, rows)[:, split:]
        heads = self.config.num_attention_heads if self.responsiveness_heads == "mean" else 1
        return frame_responsiveness(
            block.attn1.plain_queries(hidden[:, :split]),
            block.attn1.plain_keys(conditioning),
            frames=[run.num_frames for run in runs],
            tokens=[run.tokens_per_frame for run in runs],
            num_heads=heads,
            backend=self.backend,
        )

    def _head(self, x_BLC: Tensor, temb_BC: Tensor, plan: TokenPlan) -> Tensor:
        """Normalise, modulate, project and unpatch the target tokens."""
        shift, scale = (self.scale_shift_table.float() + temb_BC.float()[:, None]).unbind(1)
        x = adaln(x_BLC, scale, shift, eps=self.config.eps, backend=self.backend)
        patches = self.proj_out(x)
        frames, (rows, columns) = plan.target.num_frames, plan.target.token_grid
        patches = patches.unflatten(1, (frames, rows, columns)).unflatten(-1, (2, 2, -1))
        video: Tensor = patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
        return video


@lru_cache(maxsize=32)
def _rotary_table(plan: TokenPlan, device: torch.device) -> Tensor:
    """The plan's table on a device; plans repeat over every step of a turn."""
    # made under inference mode, a cached table could never be trained with again
    with torch.inference_mode(False):
        return rotary_table(plan).to(device)
