"""MV2VTransformer: Wan's diffusion transformer over a token plan, with memory.

Target, source and memory tokens are one sequence; every video has its own tokenizer, temporal
ids and cameras; at the merging blocks the conditioning frames that the target ignores are fused
before attention. A plan with a target alone is Wan's own model, parameter for parameter.

B batch, L tokens, S text tokens, C width, F H W latent grid.
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
from mv2v_engine.models.block import Block
from mv2v_engine.models.camera_encoder import frame_cameras
from mv2v_engine.models.modulation import ConditionEmbedder
from mv2v_engine.models.rope import rotary_table
from mv2v_engine.models.static_cache import ConditioningCache
from mv2v_engine.models.token_merge import (
    Merger,
    MergeRecord,
    Sequence,
    apply_merge,
    joint_counts,
)
from mv2v_engine.ops.adaln import adaln
from mv2v_engine.ops.frame_responsiveness import frame_responsiveness
from mv2v_engine.tokens.layout import Layout
from mv2v_engine.tokens.plan import TokenPlan
from mv2v_engine.tokens.tokenizers import Tokenizer, init_from_base


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
        keep: ConditioningCache | None = None,
    ) -> Tensor:
        """Velocity of the target latents [B, C_out, F, H, W].

        Args:
            latents: one tensor [B, C_in, F, H, W] per segment of the plan, the target first.
            timestep: [B], in 0..1000.
            encoder_hidden_states: text embeddings [B, S, text_dim].
            cameras: tracks [B, V, F, 12], row-major [R|t] relative to the source's first frame;
                None for a model without cameras.
            records: receives what every merge did.
            keep: receives what `forward_target` needs, with static conditioning.
        """
        self._check(latents, plan, cameras)
        rows = None if cameras is None else frame_cameras(plan, cameras)
        if keep is not None:
            keep.start(plan, rows)
        sequence = self._embed(latents, plan)
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
                x = self._run(
                    block.forward_static, sequence, temb_6, static_temb, context, rows, keep
                )
            sequence = replace(sequence, x=x)
        return self._head(sequence.x[:, : plan.target.length], temb, plan)

    def forward_target(
        self,
        latents: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        kept: ConditioningCache,
    ) -> Tensor:
        """`forward` for other target latents, timestep and text: conditioning as it was kept.

        Args:
            latents: the target's [B, C_in, F, H, W]; the rest as in `forward`.

        Raises:
            ValueError: no forward has filled the cache.
        """
        plan = kept.plan
        if not kept.is_filled:
            raise ValueError(
                f"the cache holds {len(kept.blocks)} of {len(self.blocks)} blocks; fill it with "
                "forward(..., keep=cache) first"
            )
        self._check_latents([latents], plan)
        target = self._embed([latents], plan)
        temb, temb_6 = self.condition_embedder.time(timestep)
        context = self.condition_embedder.text(encoder_hidden_states)
        for block, keys_values in zip(self.blocks, kept.blocks, strict=True):
            x = block(target, temb_6, context, kept.cameras, keys_values)
            target = replace(target, x=x)
        return self._head(target.x, temb, plan)

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
        self._check_latents(latents, plan)
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

    def _check_latents(self, latents: Series[Tensor], plan: TokenPlan) -> None:
        for latent, segment in zip(latents, plan.segments, strict=False):
            expected = (self.config.in_channels, *segment.grid)
            if tuple(latent.shape[1:]) != expected:
                raise ValueError(
                    f"{segment.role} latents must have shape [B, {', '.join(map(str, expected))}], "
                    f"got {list(latent.shape)}"
                )

    def _embed(self, latents: Series[Tensor], plan: TokenPlan) -> Sequence:
        """Tokenize the plan's first segments, the target with the base model's patch embedding."""
        target = self.patch_embedding(latents[0].to(self.patch_embedding.weight.dtype))
        parts = [target.flatten(2).transpose(1, 2)]
        for latent, segment in zip(latents[1:], plan.segments[1:], strict=False):
            parts.append(self.tokenizers[str(segment.tokenizer)](latent))
        x, layout = torch.cat(parts, dim=1), Layout(plan.layout.runs[: len(latents)])
        frames = torch.arange(layout.num_frames, device=x.device).expand(len(x), -1)
        rope = _rotary_table(plan, x.device)[None, : layout.length]
        return Sequence(x, rope, frames, layout)

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
        if static_temb is None:
            hidden = block.attention_input(sequence, temb_6, rows)
            target, conditioning = hidden[:, :split], hidden[:, split:]
        else:
            halves, modulations = sequence.halves(), (temb_6, static_temb)
            target, conditioning = (
                block.attention_input(half, temb, rows)
                for half, temb in zip(halves, modulations, strict=True)
            )
        heads = self.config.num_attention_heads if self.responsiveness_heads == "mean" else 1
        return frame_responsiveness(
            block.attn1.plain_queries(target),
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
