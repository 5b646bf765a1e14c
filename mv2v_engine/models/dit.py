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
from mv2v_engine.models.forward_pass import (
    ForwardPass,
    TargetResidual,
    check_inputs,
    check_latents,
    check_timestep,
)
from mv2v_engine.models.merging import merged_before
from mv2v_engine.models.modulation import ConditionEmbedder
from mv2v_engine.models.packed import Sample, run_packed
from mv2v_engine.models.rope import rotary_table
from mv2v_engine.models.static_cache import ConditioningCache
from mv2v_engine.models.token_merge import Merger, MergeRecord, Sequence
from mv2v_engine.ops.adaln import adaln
from mv2v_engine.ops.frame_responsiveness import frame_responsiveness
from mv2v_engine.parallel.context import ContextGroup, Shard
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
            {str(k): Tokenizer(config.latent_channels, dim, k) for k in config.tokenizers}
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
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, dim).normal_().div_(dim**0.5))
        self.proj_out = nn.Linear(dim, config.out_channels * 4)
        self.backend = "reference"
        self.responsiveness_heads: HeadMode = "concat"
        # training: keep every block's input alone and compute the rest again on the way back
        self.gradient_checkpointing = False

    def set_backend(self, backend: str, attention: str | None = None) -> None:
        """Run every operation on a resolved backend (`ops.backend.resolve`).

        attention: a library (`ops.attention_backends.resolve_attention`); None takes the fastest,
            or the reference under the reference and native.
        """
        attention = attention or ("reference" if backend in ("reference", "native") else "auto")
        for module in self.modules():
            if hasattr(module, "backend"):
                module.backend = backend  # type: ignore[assignment]
            if hasattr(module, "attention_backend"):
                module.attention_backend = attention  # type: ignore[assignment]

    def set_feed_forward_chunk(self, chunk: int | None) -> None:
        """Tokens that a block's feed-forward takes at once without gradients; None takes all."""
        for block in self.blocks:
            block.ffn.chunk = chunk  # type: ignore[assignment]

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
        residual: TargetResidual | None = None,
        context: ContextGroup | None = None,
    ) -> Tensor:
        """Velocity of the target latents [B, C_out, F, H, W].

        Args:
            latents: one tensor [B, C, F, H, W] per segment of the plan, the target first. The
                target's has C_in channels: with `source_channels` the source follows the noise.
            timestep: [B], in 0..1000; or [B, F], one a target frame, for a plan of a target alone.
            encoder_hidden_states: text embeddings [B, S, text_dim].
            cameras: tracks [B, V, F, 12], row-major [R|t] relative to the source's first frame,
                or [B, V, F, 16] with intrinsics for `camera_attention`, as
                `CameraTrajectory.vectors` gives them; None for a model without cameras.
            records: receives what every merge did.
            keep: receives what `forward_target` needs.
            residual: receives what `forward_residual` needs.
            context: ranks that all call this alike and share the tokens; what is kept is then
                this rank's part. Each gets the whole velocity.
        """
        given = (latents, timestep, encoder_hidden_states)
        begun = self.begin(*given, plan=plan, cameras=cameras, residual=residual, context=context)
        if keep is not None:
            begun.keep_in(keep)
        self.run_blocks(begun, records=records)
        return self.finish(begun)

    def forward_target(
        self,
        latents: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        kept: ConditioningCache,
        residual: TargetResidual | None = None,
        context: ContextGroup | None = None,
    ) -> Tensor:
        """`forward` for other target latents, timestep and text: conditioning as it was kept.

        Args:
            latents: the target's [B, C_in, F, H, W]; the rest as in `forward`.

        Raises:
            ValueError: no forward has filled the cache.
        """
        given = (latents, timestep, encoder_hidden_states)
        begun = self.begin_target(*given, kept=kept, residual=residual, context=context)
        self.run_blocks(begun)
        return self.finish(begun)

    def begin_target(
        self,
        latents: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        kept: ConditioningCache,
        residual: TargetResidual | None = None,
        context: ContextGroup | None = None,
    ) -> ForwardPass:
        """A forward before its first block, for `run_blocks` and `finish`; as `forward_target`."""
        plan = kept.plan
        if len(kept.blocks) != len(self.blocks):
            raise ValueError(
                f"the cache holds {len(kept.blocks)} of {len(self.blocks)} blocks; fill it with "
                "forward(..., keep=cache) first"
            )
        check_latents([latents], plan)
        target = self._embed([latents], plan).over(context)
        temb, temb_6 = self.condition_embedder.time(timestep)
        text = self.condition_embedder.text(encoder_hidden_states)
        begun = ForwardPass(plan, target, temb, temb_6, None, text, kept.cameras, kept=kept)
        if residual is not None:
            begun.leave_in(residual)
        return begun

    def forward_packed(self, samples: Series[Sample]) -> list[Tensor]:
        """Velocities [1, C_out, F, H, W] of samples whose tokens run as one sequence.

        Each is what `forward`, or `forward_target` where K and V are kept, gives for it alone,
        within rounding; a single one is run so.

        Raises:
            ValueError: a sample is no batch of one, is static without K and V, or does not fit
                the model.
        """
        begun = [sample.begin(self) for sample in samples]
        if len(samples) == 1:
            self.run_blocks(begun[0], records=samples[0].records)
        else:
            run_packed(self, begun, [sample.records for sample in samples])
        return [self.finish(each) for each in begun]

    def forward_residual(
        self, latents: Tensor, timestep: Tensor, *, plan: TokenPlan, residual: TargetResidual
    ) -> Tensor:
        """No block runs: what they added to the target in another forward is added again.

        Args:
            latents: the target's [B, C_in, F, H, W]. residual: as `forward` of that plan left it.
        """
        check_latents([latents], plan)
        target = self._embed([latents], plan)
        temb = self.condition_embedder.time_embedding(timestep)
        return self._head(target.x + residual.read(), temb, plan)

    def begin(
        self,
        latents: Series[Tensor],
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        plan: TokenPlan,
        cameras: Tensor | None = None,
        residual: TargetResidual | None = None,
        context: ContextGroup | None = None,
    ) -> ForwardPass:
        """A forward before its first block, for `run_blocks` and `finish`; as `forward`."""
        check_inputs(latents, plan, cameras)
        rows = None if cameras is None else frame_cameras(plan, cameras)
        check_timestep(timestep, plan)
        sequence = self._embed(latents, plan).over(context)
        if timestep.ndim == 2:
            sequence = sequence.with_frame_timesteps()
        temb, temb_6 = self.condition_embedder.time(timestep.flatten())
        static_temb = None
        if plan.conditioning == "static":
            _, static_temb = self.condition_embedder.time(torch.zeros_like(timestep))
        text = self.condition_embedder.text(encoder_hidden_states)
        begun = ForwardPass(plan, sequence, temb, temb_6, static_temb, text, rows)
        if residual is not None:
            begun.leave_in(residual)
        return begun

    def run_blocks(
        self,
        begun: ForwardPass,
        *,
        stop: int | None = None,
        records: list[MergeRecord] | None = None,
    ) -> None:
        """Take a forward through its next blocks, up to block `stop` or to the end."""
        for index in range(begun.depth, len(self.blocks) if stop is None else stop):
            block = self.blocks[index]
            assert isinstance(block, Block)
            if begun.is_merging and index in self.config.merging_blocks:
                begun.sequence = merged_before(self, index, begun, records)
            sequence, temb_6, rows = begun.sequence, begun.temb_6, begun.rows
            given: tuple[Any, ...] = (sequence, temb_6, begun.context, rows)
            layer: Callable[..., Tensor] = block
            if begun.kept is not None:
                given += ([begun.kept.of_block(index)],)
            elif begun.static_temb is not None:
                layer = block.forward_static
                given = (sequence, temb_6, begun.static_temb, begun.context, rows, begun.keep)
            begun.sequence = replace(sequence, x=self._run(layer, *given))
            begun.depth = index + 1
            del sequence, given  # a merge before the next block does not need them

    def finish(self, begun: ForwardPass) -> Tensor:
        """The velocity of a forward whose blocks have all run."""
        sequence = begun.sequence
        hidden = sequence.x[:, : sequence.target_length]
        begun.fill_residual(hidden)
        shard = sequence.shard and sequence.shard.alone(0)
        return self._head(hidden, begun.temb, begun.plan, sequence.row, shard)

    def constants(self, plan: TokenPlan, device: torch.device) -> tuple[Tensor, ...]:
        """What a forward of the plan reads beside its arguments and the weights; made once."""
        return (_rotary_table(plan, device),)

    def _run(self, layer: Callable[..., Tensor], *arguments: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # nothing here draws random numbers, so their state need not be kept
            result: Tensor = checkpoint(
                layer, *arguments, use_reentrant=False, preserve_rng_state=False
            )
            return result
        return layer(*arguments)

    def _embed(self, latents: Series[Tensor], plan: TokenPlan) -> Sequence:
        """Tokenize the plan's first segments, the target with the base model's patch embedding."""
        target = self.patch_embedding(latents[0].to(self.patch_embedding.weight.dtype))
        parts = [target.flatten(2).transpose(1, 2)]
        for latent, segment in zip(latents[1:], plan.segments[1:], strict=False):
            parts.append(self.tokenizers[str(segment.tokenizer)](latent))
        x, layout = torch.cat(parts, dim=1), Layout(plan.layout.runs[: len(latents)])
        frames = torch.arange(layout.num_frames, device=x.device).expand(len(x), -1)
        # a fake tensor's table has no bits: kept, it would be served to real forwards
        make = _rotary_table if type(x) is Tensor else _rotary_table.__wrapped__
        rope = make(plan, x.device)[None, : layout.length]
        return Sequence.of(x, rope, frames, layout)

    def responsiveness(
        self,
        block: Block,
        sequence: Sequence,
        temb_6: Tensor,
        static_temb: Tensor | None,
        rows: Tensor | None,
        whole: Sequence | None = None,
    ) -> Tensor:
        """R_t [B, F'] of the conditioning frames that enter this block (Eq. 4-5).

        The other arguments are what the block itself is given. whole: the sequence's tokens of all
        ranks; each takes its own queries and all keys, and the largest of all ranks is R_t.
        """
        split, runs = sequence.target_length, sequence.layout.runs[1:]
        if static_temb is None and sequence.shard is None:
            hidden = block.attention_input(sequence, block.modulations(temb_6)[0], rows)
            target, conditioning = hidden[:, :split], hidden[:, split:]
        else:
            halves = sequence.halves()[0], (whole or sequence).halves()[1]
            modulations = temb_6, temb_6 if static_temb is None else static_temb
            target, conditioning = (
                block.attention_input(half, block.modulations(temb)[0], rows)
                for half, temb in zip(halves, modulations, strict=True)
            )
        heads = self.config.num_attention_heads if self.responsiveness_heads == "mean" else 1
        scores = frame_responsiveness(
            block.attn1.plain_queries(target),
            block.attn1.plain_keys(conditioning),
            frames=[run.num_frames for run in runs],
            tokens=[run.tokens_per_frame for run in runs],
            num_heads=heads,
            backend=self.backend,
        )
        if sequence.shard is not None:
            sequence.shard.context.take_largest(scores)
        return scores

    def _head(
        self,
        x_BLC: Tensor,
        temb_BC: Tensor,
        plan: TokenPlan,
        row_BL: Tensor | None = None,
        shard: Shard | None = None,
    ) -> Tensor:
        """Normalise, modulate, project and unpatch the target tokens."""
        shift, scale = (self.scale_shift_table.float() + temb_BC.float()[:, None]).unbind(1)
        x = adaln(x_BLC, scale, shift, row=row_BL, eps=self.config.eps, backend=self.backend)
        patches = self.proj_out(x) if shard is None else shard.gather(self.proj_out(x))
        frames, (rows, columns) = plan.target.num_frames, plan.target.token_grid
        patches = patches.unflatten(1, (frames, rows, columns)).unflatten(-1, (2, 2, -1))
        video: Tensor = patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
        return video


# a plan of 100,000 tokens has a table of 50 MB
@lru_cache(maxsize=8)
def _rotary_table(plan: TokenPlan, device: torch.device) -> Tensor:
    """The plan's table on a device; plans repeat over every step of a turn."""
    # made under inference mode, a cached table could never be trained with again
    with torch.inference_mode(False):
        return rotary_table(plan).to(device)
