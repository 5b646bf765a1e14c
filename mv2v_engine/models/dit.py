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
from functools import partial
from itertools import chain, repeat
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mv2v_engine.config import APPROXIMATE_ATTENTION, HeadMode, TransformerConfig
from mv2v_engine.models.attention import CrossAttention
from mv2v_engine.models.block import Block
from mv2v_engine.models.camera_encoder import frame_cameras
from mv2v_engine.models.camera_rays import CameraAdapter
from mv2v_engine.models.history import Encoded, HistoryEncoder
from mv2v_engine.models.kept import ConditioningCache, KeysValues, TargetResidual
from mv2v_engine.models.merging import Merger, MergeRecord, merged
from mv2v_engine.models.modulation import ConditionEmbedder
from mv2v_engine.models.offload import BlockOffload
from mv2v_engine.models.rope import table_on
from mv2v_engine.models.sample import Sample
from mv2v_engine.models.sequence import Sequence
from mv2v_engine.models.stream_cache import ArrivingLayer, StreamCache
from mv2v_engine.models.stream_history import StreamHistory
from mv2v_engine.models.vace import Hints, VaceBlock
from mv2v_engine.ops.adaln import adaln
from mv2v_engine.ops.conv3d import PatchConv3d
from mv2v_engine.parallel.context import ContextGroup, Shard
from mv2v_engine.tokens.layout import Layout, Run
from mv2v_engine.tokens.plan import Segment, TokenPlan
from mv2v_engine.tokens.tokenizers import Tokenizer, init_from_base

# what a block does, or does again on the way back
_Layer = Callable[..., tuple[Tensor, KeysValues | None]]


class MV2VTransformer(nn.Module):
    """The denoiser. Parameter names are diffusers' `WanTransformer3DModel`'s, and
    `blocks.N.cam_encoder`, `blocks.N.projector`, `tokenizers.K`, `history_encoders.RATE`,
    `mergers.N`, `control_adapter` and `blocks.N.attn1.rope_phase_qk` and `_vo`; of VACE
    `WanVACETransformer3DModel`'s.
    """

    # small and sensitive: diffusers keeps them in float32 under bf16 weights, and so do we
    keep_in_fp32_modules = ("time_embedder", "end_time_embedder", "scale_shift_table", "norm2")

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        channels = config.latent_channels if config.vace_layers else config.in_channels
        self.patch_embedding = PatchConv3d(channels, dim, (1, 2, 2))
        self.vace_patch_embedding = None
        if config.vace_layers:
            self.vace_patch_embedding = PatchConv3d(config.source_channels, dim, (1, 2, 2))
        self.tokenizers = nn.ModuleDict(
            {str(k): Tokenizer(config.latent_channels, dim, k) for k in config.tokenizers}
        )
        for tokenizer in self.tokenizers.values():
            init_from_base(tokenizer, self.patch_embedding)  # type: ignore[arg-type]
        history = config.history
        self.history_encoders = nn.ModuleDict(
            {rate: HistoryEncoder(config, rate) for rate in (history.rates if history else ())}
        )
        self.control_adapter = CameraAdapter(dim) if config.has_phases else None
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList([Block(config, index) for index in range(config.num_layers)])
        self.vace_blocks = nn.ModuleList(
            [VaceBlock(config, is_first=layer == 0) for layer in config.vace_layers]
        )
        self.mergers = nn.ModuleDict()
        if config.merger is not None:
            merging = config.merging_blocks[:1] if config.merger.shared else config.merging_blocks
            for block in merging:
                self.mergers[str(block)] = Merger(dim, config.merger)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, dim).normal_().div_(dim**0.5))
        self.proj_out = nn.Linear(dim, config.out_channels * 4)
        self.backend = "reference"
        self.responsiveness_heads: HeadMode = "concat"
        self.is_by_frames, self.merging_blocks = config.is_by_frames, config.merging_blocks
        # training: keep every block's input alone and compute the rest again on the way back
        self.gradient_checkpointing = False
        # where the blocks' weights wait on the host
        self.offload: BlockOffload | None = None

    def offload_blocks(self, device: torch.device) -> None:
        """Let the blocks' weights, which lie on the host, come to a device block by block."""
        self.offload = BlockOffload(list(self.blocks), device)

    def _places(self) -> list[nn.Module]:
        """The modules that run in the place of offloaded blocks."""
        return [] if self.offload is None else self.offload.places

    def set_backend(self, backend: str, attention: str | None = None) -> None:
        """Run every operation on a resolved backend (`ops.backend.resolve`).

        attention: a library (`ops.attention_backends.resolve_attention`); None takes the fastest,
            or the reference under the reference and native. An approximate one takes
            self-attention alone: to the text's few keys attention stays exact.
        """
        exact = "reference" if backend in ("reference", "native") else "auto"
        attention = attention or exact
        for module in chain(self.modules(), *(place.modules() for place in self._places())):
            if hasattr(module, "backend"):
                module.backend = backend  # type: ignore[assignment]
            if hasattr(module, "attention_backend"):
                stays = isinstance(module, CrossAttention) and attention in APPROXIMATE_ATTENTION
                module.attention_backend = exact if stays else attention  # type: ignore[assignment]

    def add_end_time(self) -> None:
        """Let the weights become a flow map; until they are trained on they are what they were."""
        if not self.config.has_end_time:
            self.condition_embedder.add_end_time()
            self.config = replace(self.config, has_end_time=True)

    def set_feed_forward_chunk(self, chunk: int | None) -> None:
        """Tokens that a block's feed-forward takes at once without gradients; None takes all."""
        for block in (*self.blocks, *self.vace_blocks, *self._places()):
            cast(Block, block).ffn.chunk = chunk

    def begin_block(self, stream: StreamCache) -> None:
        """Make room in a stream's cache for its next block, before the block's forwards.

        With a history, frames that leave the window become tokens of it first (METHOD 17).
        """
        history = stream.history
        latents = None if history is None else history.due(stream.num_blocks)
        if history is not None and latents is not None:
            self._remember(stream, history, latents)
        stream.begin_block()

    def _remember(self, stream: StreamCache, history: StreamHistory, latents: Tensor) -> None:
        """Leave K and V of the tokens of latents [B, C, F, H, W] in the cache's layers."""
        encoder = cast(HistoryEncoder, self.history_encoders[history.rate])
        found, _, state = encoder.append(latents, self.patch_embedding, history.state)
        x, count = found.tokens, latents.shape[2] // history.frames
        rope = history.new_table(stream.plan, count, x.device)[None]
        _, temb_6 = self.condition_embedder.time(
            torch.zeros(len(x), dtype=torch.float32, device=x.device)
        )
        sequence = Sequence.of(
            x,
            rope,
            torch.arange(count, device=x.device).expand(len(x), -1),
            Layout((Run(*history.segment.token_grid, count, False),)),
            temb=temb_6[:, 0],
            temb_6=temb_6,
            text=None,
            cameras=None,
        )
        blocks = self.blocks if self.offload is None else self.offload.resident()
        for block, layer in zip(blocks, stream.layers, strict=False):
            arriving = ArrivingLayer(layer, rope)
            x, _ = self._layer(block)(sequence, None, False, arriving)
            sequence = replace(sequence, x=x)
        # last, so that what breaks off can be done again
        history.state = state

    def forward(
        self,
        latents: Series[Tensor],
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        plan: TokenPlan,
        cameras: Tensor | None = None,
        records: list[MergeRecord] | None = None,
        kept: ConditioningCache | None = None,
        residual: TargetResidual | None = None,
        ranks: ContextGroup | None = None,
        stream: StreamCache | None = None,
        image: Tensor | None = None,
        end_timestep: Tensor | None = None,
    ) -> Tensor:
        """Velocity of the target latents [B, C_out, F, H, W].

        Args:
            latents: one tensor [B, C, F, H, W] per segment of the plan, the target first. The
                target's has C_in channels: with `source_channels` the source follows the noise.
            timestep: [B], in 0..1000; or [B, F], one a target frame, for a plan of a target alone.
            encoder_hidden_states: text embeddings [B, S, text_dim].
            cameras: tracks [B, V, F, 12], row-major [R|t] relative to the source's first frame,
                or [B, V, F, 16] with intrinsics for `camera_attention`, as
                `CameraTrajectory.vectors` gives them, or 64 of those of all frames for phases; None
                for a model without cameras.
            records: receives what every merge did.
            kept: the K and V of static conditioning, which one forward leaves for later ones. An
                empty one is filled. With a full one the target runs alone over what it holds;
                conditioning latents and cameras are not read then, and may be left out.
            residual: receives what `forward_residual` needs.
            ranks: processes that all call this alike and share the tokens; what is kept is then
                this rank's part. Each gets the whole velocity.
            stream: what a causal model sees of the blocks before the target, which is its newest
                one: the target's K and V are left there, and the text's the first time.
            image: tokens of the image encoder [B, I, image_dim], for a model with `image_dim`.
            end_timestep: of a flow map (`TransformerConfig.has_end_time`), the timestep to which
                the step goes, in the shape of `timestep` and at most that; the result is then the
                mean velocity on the way. None: the timestep itself, which is plain flow.

        Raises:
            ValueError: what does not fit the plan or the model.
        """
        sample = Sample(
            latents=latents,
            timestep=timestep,
            encoder_hidden_states=encoder_hidden_states,
            plan=plan,
            cameras=cameras,
            records=records,
            kept=kept,
            residual=residual,
            ranks=ranks,
            stream=stream,
            image=image,
            end_timestep=end_timestep,
        )
        return self.forward_samples([sample])[0]

    def forward_samples(self, samples: Series[Sample]) -> list[Tensor]:
        """Velocities [B, C_out, F, H, W] of samples whose tokens run as one sequence.

        Each is what `forward` gives for it alone, within rounding; a single one may be a batch and
        fill its `kept`, several are batches of one.

        Raises:
            ValueError: as `forward`, or what several samples cannot hold.
        """
        if not samples:
            return []
        for sample in samples:
            sample.check(is_alone=len(samples) == 1)
        # while a cache is being filled it is not read
        kept = [sample.kept if sample.is_kept else None for sample in samples]
        sequence = Sequence.packed([self._embed(sample) for sample in samples])
        embedded = _targets(sequence, samples)
        hints, stream = self._hints(sequence, samples[0]), samples[0].stream
        layers = repeat(None) if stream is None else stream.layers
        merges = any(sample.plan.merge != "off" and not sample.is_kept for sample in samples)
        merging_blocks = self.merging_blocks if merges else ()
        blocks = self.blocks if self.offload is None else self.offload.resident()
        for index, (block, layer) in enumerate(zip(blocks, layers, strict=False)):
            if index in merging_blocks:
                sequence = self._merge(index, cast(Block, block), sequence, samples)
            run = self._layer(block)
            if sequence.static_temb_6 is not None:
                x = _static(run, sequence, samples[0].kept)
            else:
                x, _ = run(sequence, _of_block(kept, index), False, layer)
            if hints is not None:
                x = hints.added(index, x)
            sequence = replace(sequence, x=x)
            del x  # a merge before the next block does not need them
        parts = sequence.split()
        for sample, part, before, after in zip(
            samples, parts, embedded, _targets(sequence, samples), strict=True
        ):
            if sample.residual is not None and before is not None and after is not None:
                rays = 0 if part.rays is None else part.rays[:, : part.target_length]
                sample.residual.value = after - before + rays
        return [self._head(*pair) for pair in zip(parts, samples, strict=True)]

    def forward_residual(
        self,
        latents: Tensor,
        timestep: Tensor,
        *,
        plan: TokenPlan,
        residual: TargetResidual,
        end_timestep: Tensor | None = None,
    ) -> Tensor:
        """No block runs: what they and the rays added to the target before is added again.

        Args:
            latents: the target's [B, C_in, F, H, W]. residual: as `forward` of that plan left it.
            end_timestep: as `forward`.
        """
        x = self._target_tokens(latents) + residual.read()
        temb = self.condition_embedder.time_embedding(timestep, end_timestep)
        return self._velocity(x, temb, plan)

    def _target_tokens(self, latents: Tensor) -> Tensor:
        """The target's tokens [B, L, C]; of VACE's channels, its own latents' alone."""
        own = latents[:, : self.patch_embedding.in_channels]
        video = self.patch_embedding(own.to(self.patch_embedding.weight.dtype))
        tokens: Tensor = video.flatten(2).transpose(1, 2)
        return tokens

    def _encode(self, segment: Segment, latents: Tensor) -> Encoded:
        """A conditioning segment's tokens by its encoder."""
        if segment.is_encoded:
            given = latents.to(self.patch_embedding.weight.dtype)
            tokens, hidden = given.split([self.config.dim, given.shape[2] - self.config.dim], 2)
            return Encoded(tokens, hidden if hidden.shape[2] else None)
        if segment.encoder == "history":
            found: Encoded = self.history_encoders[segment.rate](latents, self.patch_embedding)
            return found
        return Encoded(self.tokenizers[str(segment.tokenizer)](latents), None)

    def _hints(self, sequence: Sequence, sample: Sample) -> Hints | None:
        """VACE's, whose context has the target's places."""
        if self.vace_patch_embedding is None:
            return None
        target = sequence if len(sample.plan.segments) == 1 else sequence.halves()[0]
        given = sample.latents[0][:, self.patch_embedding.in_channels :]
        video = self.vace_patch_embedding(given.to(self.patch_embedding.weight.dtype))
        x = self.vace_blocks[0].proj_in(video.flatten(2).transpose(1, 2))  # type: ignore[operator]
        context = replace(target, x=x + target.x)
        return Hints(self.vace_blocks, self.config.vace_layers, context)

    def _embed(self, sample: Sample) -> Sequence:
        """The tokens of the first block: the target's alone where the conditioning is kept."""
        plan, embedder = sample.plan, self.condition_embedder
        count = 1 if sample.is_kept else len(plan.segments)
        latents = sample.latents[:count]
        parts, hidden = [self._target_tokens(latents[0])], list[Tensor]()
        for latent, segment in zip(latents[1:], plan.segments[1:count], strict=True):
            encoded = self._encode(segment, latent)
            parts.append(encoded.tokens)
            hidden += [] if encoded.hidden is None else [encoded.hidden]
        history = None
        if plan.attended_history is not None:
            kept = None if sample.kept is None else sample.kept.history
            history = torch.cat(hidden, 1) if hidden else kept
        x, layout = torch.cat(parts, dim=1), Layout(plan.layout.runs[:count])
        frames = torch.arange(layout.num_frames, device=x.device).expand(len(x), -1)
        if sample.kept is not None and sample.is_kept:
            cameras = sample.kept.cameras
        else:
            cameras = None if sample.cameras is None else frame_cameras(plan, sample.cameras)
        rays = None
        if self.control_adapter is not None:
            assert cameras is not None
            counts = [segment.num_frames for segment in plan.segments[:count]]
            pairs = zip(cameras.split(counts, 1), plan.segments, strict=False)
            rays = torch.cat([self.control_adapter(*pair) for pair in pairs], 1)
            x = x + rays
        # a fake tensor's table has no bits: kept, it would be served to real forwards
        table = table_on if type(x) is Tensor else table_on.__wrapped__
        end = None if sample.end_timestep is None else sample.end_timestep.flatten()
        temb, temb_6 = embedder.time(sample.timestep.flatten(), end)
        static_temb_6 = None
        if plan.conditioning == "static" and not sample.is_kept:
            _, static_temb_6 = embedder.time(torch.zeros_like(sample.timestep))
            if sample.kept is not None:
                sample.kept.start(plan, cameras, history)
        stream, text = sample.stream, None if sample.stream is None else sample.stream.text
        if text is None:
            text = embedder.text(sample.encoder_hidden_states)
        if stream is None:
            rope = table(plan, x.device)[None, : layout.length]
        else:
            rope, stream.text = stream.new_rope(x.device), text
            stream.keep(latents[0])
        sequence = Sequence.of(
            x,
            rope,
            frames,
            layout,
            temb=temb,
            temb_6=temb_6,
            static_temb_6=static_temb_6,
            text=text,
            cameras=cameras,
            rays=rays,
            image=None if sample.image is None else embedder.image(sample.image),
            history=history,
        ).over(sample.ranks, is_by_frames=self.is_by_frames)
        return sequence.with_frame_timesteps() if sample.timestep.ndim == 2 else sequence

    def _merge(
        self, index: int, block: Block, sequence: Sequence, samples: Series[Sample]
    ) -> Sequence:
        """The tokens as they enter merging block `index`; what is kept has merged before."""
        own = sequence.split()
        fused = [
            part
            if sample.plan.merge == "off" or sample.is_kept
            else merged(self, index, block, part, sample.plan, sample.records)
            for part, sample in zip(own, samples, strict=True)
        ]
        has_merged = any(after is not before for after, before in zip(fused, own, strict=True))
        return Sequence.packed(fused) if has_merged else sequence

    def _layer(self, block: nn.Module) -> _Layer:
        """A block, of which training keeps the inputs alone where it is told to."""
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return block
        # nothing here draws random numbers, so their state need not be kept
        return partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)

    def _head(self, sequence: Sequence, sample: Sample) -> Tensor:
        shard = sequence.shard and sequence.shard.alone(0)
        hidden = sequence.x[:, : sequence.target_length]
        return self._velocity(hidden, sequence.temb, sample.plan, sequence.row, shard)

    def _velocity(
        self,
        x_BLC: Tensor,
        temb_TC: Tensor,
        plan: TokenPlan,
        row_BL: Tensor | None = None,
        shard: Shard | None = None,
    ) -> Tensor:
        """Normalise, modulate, project and unpatch the target tokens."""
        shift, scale = (self.scale_shift_table.float() + temb_TC.float()[:, None]).unbind(1)
        x = adaln(x_BLC, scale, shift, row=row_BL, eps=self.config.eps, backend=self.backend)
        patches = self.proj_out(x) if shard is None else shard.gather(self.proj_out(x))
        frames, (rows, columns) = plan.target.num_frames, plan.target.token_grid
        patches = patches.unflatten(1, (frames, rows, columns)).unflatten(-1, (2, 2, -1))
        video: Tensor = patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
        return video


def _static(block: _Layer, sequence: Sequence, cache: ConditioningCache | None) -> Tensor:
    """Run a block so that the conditioning sees only itself and the target sees everything."""
    target, conditioning = sequence.halves()
    x_c, keys_values = block(conditioning, None, True)
    assert keys_values is not None
    if cache is not None:
        cache.append(keys_values)
    x_t, _ = block(target, [keys_values])
    return torch.cat([x_t, x_c], 1)


def _of_block(kept: Series[ConditioningCache | None], index: int) -> list[KeysValues | None] | None:
    """The kept K and V that block `index` reads, one a sample; None if no sample has any."""
    if not any(cache is not None for cache in kept):
        return None
    return [None if cache is None else cache.of_block(index) for cache in kept]


def _targets(sequence: Sequence, samples: Series[Sample]) -> list[Tensor | None]:
    """Copies of the target's tokens of the samples that ask for a residual.

    A view would hold the whole sequence's tokens until the last block.
    """
    return [
        None if sample.residual is None else part.x[:, : part.target_length].clone()
        for part, sample in zip(sequence.split(), samples, strict=True)
    ]
