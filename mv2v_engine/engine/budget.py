"""What a turn will take of the device, from its plan before anything runs, and what it may take.

Bytes are of tensors alive at once; what a library allocates inside an operation is not known.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mv2v_engine.checkpoints.load import stored_dtype
from mv2v_engine.config import (
    EngineConfig,
    Offload,
    QuantizeName,
    SamplingConfig,
    StreamConfig,
    TransformerConfig,
)
from mv2v_engine.counting import StreamBytes, vae_peak_bytes, vae_stream_bytes
from mv2v_engine.defaults import without_memory
from mv2v_engine.engine.parts import Parts
from mv2v_engine.errors import MemoryBudgetError, is_out_of_memory
from mv2v_engine.models.autoencoder import Autoencoder, AutoencoderConfig
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.offload import NUM_PLACES, buffer_bytes, places_bytes
from mv2v_engine.models.quantized import OWN_DTYPES, large_linears, quantize_linears
from mv2v_engine.models.stream_cache import StreamCache
from mv2v_engine.progress import Spans
from mv2v_engine.shapes import TextShape
from mv2v_engine.tokens.flops import conditioning_bytes
from mv2v_engine.tokens.peak import Execution, forward_peak_bytes
from mv2v_engine.tokens.plan import TokenPlan
from mv2v_engine.vae import VideoVAE

# torch keeps this much for cuBLAS on Hopper, and less elsewhere
CUBLAS_WORKSPACE = 32 << 20
# beside what the forwards make: the noisy latents, the positive branch's velocity, the next latents
_STEP_VIDEOS = 3
# with guidance
_BRANCHES = 2
# what a failed turn is advised to save, of what was predicted
_LESS = 0.9


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """An engine's bytes on its device that no plan changes.

    transformer, vae, text: weights. is_text_offloaded: the last are there for the stage "text"
    alone. cache: the latent memory's share. video: latents of one. copies_memory: remembered
    videos are copied out of an arena. embedding: of one prompt. encode, decode, embed: the most
    that the VAE and the text encoder make. workspace: what libraries and captured steps keep;
    arena: for these, what static conditioning keeps. quantizable, offloadable: what `quantize` and
    `offload` would save of the transformer, text_quantizable: `quantize_text` of the text encoder.
    """

    transformer: int
    vae: int
    text: int
    is_text_offloaded: bool
    cache: int
    video: int
    copies_memory: bool
    embedding: int
    encode: int
    decode: int
    embed: int
    workspace: int
    arena: int
    execution: Execution
    quantizable: int = 0
    offloadable: int = 0
    text_quantizable: int = 0

    @property
    def resident(self) -> int:
        """There all the time."""
        text = 0 if self.is_text_offloaded else self.text
        return self.transformer + self.vae + text + self.cache + self.workspace + self.arena


@dataclass(frozen=True)
class Prediction:
    """Peak bytes by stage, everything on the device included."""

    stages: dict[str, int]

    @property
    def peak(self) -> int:
        return max(self.stages.values())

    @property
    def fullest(self) -> str:
        """The stage of the peak."""
        return max(self.stages, key=lambda name: self.stages[name])

    def by_span(self) -> dict[str, int]:
        """Bytes of each stage, by the names that a report has: the VAE's two are one."""
        spans: dict[str, int] = {}
        for name, count in self.stages.items():
            span = name.split()[0]
            spans[span] = max(count, spans.get(span, 0))
        return spans


def predict(footprint: Footprint, plan: TokenPlan) -> Prediction:
    """A turn's stages, with guidance; a prompt whose embedding is kept takes less of "text"."""
    source = footprint.video
    copied = plan.num_memory if footprint.copies_memory else 0
    inputs = source + copied * footprint.video + 2 * footprint.embedding
    table = plan.length * plan.shape.attention_head_dim * 4
    arriving = footprint.text if footprint.is_text_offloaded else 0
    forward = forward_peak_bytes(plan, footprint.execution)
    steps = () if plan.scope == "joint" else None
    in_arena = min(
        footprint.arena, conditioning_bytes(plan, footprint.execution.element_bytes, steps)
    )
    own = {
        "vae encode": footprint.encode,
        "text": source + arriving + footprint.embed,
        "memory": inputs,
        "sampling": inputs + _STEP_VIDEOS * footprint.video + forward - in_arena,
        "vae decode": inputs + table + footprint.decode,
    }
    return Prediction({name: footprint.resident + count for name, count in own.items()})


def predict_stream(footprint: Footprint, cache: StreamCache, vae: StreamBytes) -> Prediction:
    """The stages of a stream's block, once its window is full; policy "all" goes on growing.

    footprint: of the engine; what it says of a turn's videos and of the VAE's stages is not read.
    cache: the stream's, of which only its sizes are read.
    """
    plan, config, size = cache.plan, cache.config, footprint.execution.element_bytes
    shape = plan.shape
    row, frame = shape.dim * size, plan.target.tokens_per_frame
    held, text = cache.num_tokens, shape.text_len * shape.dim * size
    layer = 2 * held * row + 2 * text
    if config.policy == "memrope":
        positions = frame if config.is_adaptive else 1
        averaged = 4 if config.averages == "float32" else size
        layer += 4 * positions * shape.dim * averaged
    has_source = bool(shape.source_channels)
    block = math.prod(plan.latent_shapes[0]) * torch.float32.itemsize
    recent = (config.window - config.num_fixed) // config.block_frames if config.recache else 0
    kept = shape.num_layers * layer + text + 2 * footprint.embedding
    kept += vae.decoder_past + has_source * vae.encoder_past + (1 + recent) * block
    # all keys with their rotary positions, and what moves up when room is made
    reading = held * (row + shape.attention_head_dim * 4)
    arriving = footprint.text if footprint.is_text_offloaded else 0
    sampling = reading + forward_peak_bytes(plan, footprint.execution)
    if cache.history is not None:
        past, made = cache.history.peak_bytes(shape, size)
        kept, sampling = kept + past, max(sampling, made)
    own = {
        "vae encode": has_source * (vae.encode - vae.encoder_past),
        "text": arriving + footprint.embed,
        "sampling": _STEP_VIDEOS * block + sampling,
        "vae decode": vae.decode - vae.decoder_past,
    }
    return Prediction({name: footprint.resident + kept + count for name, count in own.items()})


class Budget:
    """The bytes of an engine's turns: what they will take, may take, and how to take less."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    def footprint(self) -> Footprint:
        """The bytes taken now: the cache fills, the text encoder comes and goes."""
        parts, config = self.parts, self.parts.config
        shape, text, sampling = parts.transformer.config, parts.text, parts.sampling
        blocks = parts.transformer.blocks
        encode, decode = vae_peak_bytes(parts.vae, sampling.num_frames, sampling.size)
        on_gpu, held = parts.device.type == "cuda", parts.graphs.bytes()
        embed = text_saved = 0
        if text is not None:
            own, is_narrow = text.model.config, config.quantize_text is not None
            embed = _embed_bytes(own, text.max_length, text.dtype, is_quantized=is_narrow)
            if not is_narrow:
                words = {each.name: getattr(own, each.name) for each in fields(TextShape)}
                text_saved = TextShape(**words).quantizable_bytes(text.dtype.itemsize)
        return Footprint(
            transformer=transformer_bytes(parts),
            vae=module_bytes(parts.vae.model),
            text=0 if text is None else module_bytes(text.model),
            is_text_offloaded=text is not None and text.is_offloaded,
            cache=self._cache_bytes(),
            video=parts.video_bytes,
            copies_memory=config.device_cache_bytes is not None,
            embedding=shape.text_len * shape.text_dim * parts.dtype.itemsize,
            encode=encode,
            decode=decode,
            embed=embed,
            workspace=held["pool"] + held["buffers"] + (CUBLAS_WORKSPACE if on_gpu else 0),
            arena=held["arena"],
            execution=Execution(
                parts.dtype.itemsize,
                config.feed_forward_chunk,
                is_fused=parts.backend != "reference",
                residuals=_BRANCHES if config.step_cache is not None else 0,
                is_quantized=config.quantize is not None,
            ),
            quantizable=0 if config.quantize else _quantizable_here(parts),
            offloadable=0 if config.offload else module_bytes(blocks) - places_bytes(list(blocks)),
            text_quantizable=text_saved,
        )

    def predict(self, plan: TokenPlan) -> Prediction:
        """Peak bytes of a turn's stages."""
        return predict(self.footprint(), plan)

    def limit(self) -> int | None:
        """What everything of this engine together may take; None: nobody says."""
        parts, limits = self.parts, []
        if parts.config.memory_limit_bytes is not None:
            limits.append(parts.config.memory_limit_bytes)
        if parts.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(parts.device)
            unused = torch.cuda.memory_reserved(parts.device)
            unused -= torch.cuda.memory_allocated(parts.device)
            own = transformer_bytes(parts) + module_bytes(parts.vae.model)
            if parts.text is not None and not parts.text.is_offloaded:
                own += module_bytes(parts.text.model)
            own += sum(parts.graphs.bytes().values())
            limits.append(free + unused + own + self._cache_bytes())
        return min(limits, default=None)

    def check(self, plan: TokenPlan) -> None:
        """Refuse a turn that cannot fit.

        Raises:
            MemoryBudgetError: with what it needs, what there is, and what would fit.
        """
        limit = self.limit()
        if limit is None:
            return
        found = self.predict(plan)
        if found.peak > limit:
            raise MemoryBudgetError(
                f"this turn needs {found.peak:,} bytes of {self.parts.device} in its stage "
                f"{found.fullest!r}, {limit:,} are available; {self.advice(plan, limit)}"
            )

    def predict_stream(self, config: StreamConfig) -> Prediction:
        """Peak bytes of a stream's stages."""
        parts, cache = self.parts, self._stream_cache(config)
        vae = vae_stream_bytes(parts.vae, config.block_frames, parts.sampling.size)
        # a stream has no remembered videos
        footprint = replace(self.footprint(), cache=parts.cache.bytes_used)
        return predict_stream(footprint, cache, vae)

    def _stream_cache(self, config: StreamConfig) -> StreamCache:
        _, _, rows, columns = self.parts.latent_shape
        return StreamCache(self.parts.transformer.config, (rows, columns), config)

    def check_stream(self, config: StreamConfig) -> None:
        """Refuse a stream that cannot fit.

        Raises:
            MemoryBudgetError: with what it needs, what there is, and what would fit.
        """
        limit = self.limit()
        if limit is None:
            return
        found = self.predict_stream(config)
        if found.peak <= limit:
            return
        least = self._stream_cache(config).least_window
        fitting = (
            window
            for window in reversed(range(least, config.window))
            if self.predict_stream(replace(config, window=window)).peak <= limit
        )
        window = next(fitting, None)
        advice = "no smaller window fits either: use a smaller size, a larger device or another "
        advice += 'model, or quantize="int8"'
        if window is not None:
            advice = f"window={window} fits"
        raise MemoryBudgetError(
            f"this stream needs {found.peak:,} bytes of {self.parts.device} in its stage "
            f"{found.fullest!r}, {limit:,} are available; {advice}"
        )

    def place_text(self) -> None:
        """Put the text encoder's weights where `EngineConfig.text_offload` wants them."""
        text, mode = self.parts.text, self.parts.config.text_offload
        if text is None:
            return
        if mode != "auto":
            text.offload(mode == "always")
        elif self.parts.device.type == "cuda":  # a CPU engine's device is the host
            limit, footprint = self.limit(), replace(self.footprint(), is_text_offloaded=False)
            text.offload(limit is not None and predict(footprint, self.largest_plan()).peak > limit)

    def largest_plan(self) -> TokenPlan:
        """The plan of a turn that remembers as many videos as the configuration allows."""
        parts = self.parts
        remembers = parts.memory_mode in ("retrieved", "alone")
        has_encoder = bool(parts.transformer.config.tokenizers or parts.history)
        return parts.plan_of(parts.config.max_memory if remembers and has_encoder else 0)

    def advice(self, plan: TokenPlan, limit: int) -> str:
        """The single settings that bring a turn's peak to a limit, or what comes nearest."""
        footprint = self.footprint()
        peaks = {
            words: predict(*changed).peak
            for words, changed in self._changes(footprint, plan, limit)
        }
        enough = [f"{words} ({peak:,})" for words, peak in peaks.items() if peak <= limit]
        if enough:
            return f"try {' or '.join(enough)}"
        words = min(peaks, key=lambda name: peaks[name])
        if peaks[words] == predict(footprint, plan).peak:
            return "no setting lowers it: use a larger device, or a smaller model"
        return (
            f"no single setting brings it there, {words} comes nearest ({peaks[words]:,}): change "
            "several, or use a larger device"
        )

    def _changes(
        self, footprint: Footprint, plan: TokenPlan, limit: int
    ) -> Iterator[tuple[str, tuple[Footprint, TokenPlan]]]:
        """What a user may change, most harmless first."""
        if footprint.text and not footprint.is_text_offloaded and self.parts.device.type == "cuda":
            yield 'text_offload="always"', (replace(footprint, is_text_offloaded=True), plan)
        if footprint.text_quantizable:
            text = footprint.text - footprint.text_quantizable
            narrow = replace(footprint, text=text, text_quantizable=0)
            yield 'quantize_text="int8"', (narrow, plan)
        smaller = max((footprint.execution.chunk or plan.length) // 4, 1)
        execution = replace(footprint.execution, chunk=smaller)
        yield f"feed_forward_chunk={smaller}", (replace(footprint, execution=execution), plan)
        if footprint.cache > footprint.video:
            less = replace(footprint, cache=footprint.video, copies_memory=True)
            # a CPU's arenas are one memory
            name = "cache_bytes" if self.parts.device.type == "cpu" else "device_cache_bytes"
            yield f"{name}={footprint.video}", (less, plan)
        if footprint.quantizable:
            light = replace(
                footprint,
                transformer=footprint.transformer - footprint.quantizable,
                quantizable=0,
                execution=replace(footprint.execution, is_quantized=True),
            )
            yield 'quantize="int8"', (light, plan)
        if footprint.offloadable and self.parts.device.type == "cuda":
            waiting = footprint.transformer - footprint.offloadable
            yield 'offload="blocks"', (replace(footprint, transformer=waiting, offloadable=0), plan)
        if plan.merge == "off" and plan.shape.merger is not None:
            yield 'merge="conv"', (footprint, replace(plan, merge="conv"))
        if plan.conditioning == "static":
            yield 'conditioning="joint"', (footprint, replace(plan, conditioning="joint"))
        for count in reversed(range(plan.num_memory)):
            segments = plan.segments[: len(plan.segments) - plan.num_memory + count]
            fraction = self.parts.config.merge_fraction
            fewer = replace(plan, segments=segments, fraction=fraction)
            if count == 0 or predict(footprint, fewer).peak <= limit:
                yield f"max_memory={count}", (footprint, fewer)
                return

    def _cache_bytes(self) -> int:
        """The latent memory on the device after this turn."""
        parts, config = self.parts, self.parts.config
        if config.device_cache_bytes is None:
            return min(parts.cache.bytes_used + parts.video_bytes, config.cache_bytes)
        # a CPU's two arenas are one memory
        is_host = parts.device.type == "cpu"
        return config.cache_bytes if is_host else config.device_cache_bytes


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights."""
    tensors: set[Tensor] = {*module.parameters(), *module.buffers()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def transformer_bytes(parts: Parts) -> int:
    """Bytes of a transformer's weights on its device; of offloaded blocks, of their places there.

    A CPU's blocks wait where its places are.
    """
    transformer, offload = parts.transformer, parts.transformer.offload
    own = module_bytes(transformer)
    if offload is not None:
        own += offload.num_bytes
        if parts.device.type != "cpu":
            own -= module_bytes(transformer.blocks)
    return own


def _quantizable_here(parts: Parts) -> int:
    """What eight bits would save on the device, where offloaded blocks have places alone."""
    transformer = parts.transformer
    saved = _quantizable_bytes(transformer, parts.dtype)
    if transformer.offload is None:
        return saved
    count = len(transformer.blocks)
    of_places = saved * min(count, NUM_PLACES) // count
    return of_places + (saved if parts.device.type == "cpu" else 0)


def shape_footprint(
    shape: TransformerConfig,
    sampling: SamplingConfig,
    vae: Mapping[str, Any],
    text: TextShape | None,
    *,
    cached: int,
    quantize: QuantizeName | None = None,
    offload: Offload | None = None,
    quantize_text: QuantizeName | None = None,
) -> Footprint:
    """The `Budget.footprint` of an engine on a GPU in bfloat16 that nobody has loaded.

    vae: the config of an `Autoencoder`. cached: videos in the latent memory after the turn.
    """
    coder, size = _shape_vae(AutoencoderConfig.of(vae)), torch.bfloat16.itemsize
    encode, decode = vae_peak_bytes(coder, sampling.num_frames, sampling.size)
    video = math.prod(coder.latent_shape(sampling.num_frames, sampling.size))
    video *= torch.float32.itemsize
    weights = _shape_weights(shape, quantize)
    text_bytes = text_saved = embed = 0
    is_narrow = quantize_text is not None
    if text is not None:
        text_saved = text.quantizable_bytes(size)
        text_bytes = size * text.num_parameters - (text_saved if is_narrow else 0)
        embed = _embed_bytes(text, shape.text_len, torch.bfloat16, is_quantized=is_narrow)
    return Footprint(
        transformer=weights.total - (weights.waiting if offload is not None else 0),
        vae=size * sum(weight.numel() for weight in coder.model.parameters()),
        text=text_bytes,
        is_text_offloaded=False,
        cache=cached * video,
        video=video,
        copies_memory=False,
        embedding=shape.text_len * shape.text_dim * size,
        encode=encode,
        decode=decode,
        embed=embed,
        workspace=CUBLAS_WORKSPACE,
        arena=0,
        execution=Execution(
            size, EngineConfig().feed_forward_chunk, is_quantized=quantize is not None
        ),
        quantizable=weights.quantizable,
        offloadable=weights.waiting if offload is None else 0,
        text_quantizable=0 if is_narrow else text_saved,
    )


@lru_cache(maxsize=16)
def _shape_vae(config: AutoencoderConfig) -> VideoVAE:
    """A VAE without memory, in bfloat16."""
    with without_memory():
        return VideoVAE(Autoencoder(asdict(config)), torch.bfloat16)


class _ShapeWeights(NamedTuple):
    """Bytes of a transformer's weights.

    waiting: of those that wait on the host where blocks are offloaded. quantizable: what eight bits
    would save.
    """

    total: int
    waiting: int
    quantizable: int


@lru_cache(maxsize=64)
def _shape_weights(shape: TransformerConfig, quantize: QuantizeName | None) -> _ShapeWeights:
    """Count the weights of a transformer in bfloat16, which is made without memory."""
    with without_memory():
        transformer = MV2VTransformer(shape)
        if quantize is not None:
            quantize_linears(transformer, quantize)
    weights = _sizes_as(transformer, torch.bfloat16)
    by_block: dict[str, list[int]] = {}
    for name, count in weights.items():
        if name.startswith("blocks."):
            by_block.setdefault(name.split(".")[1], []).append(count)
    places = max(map(buffer_bytes, by_block.values())) * min(len(by_block), NUM_PLACES)
    waiting = sum(map(sum, by_block.values())) - places
    saved = 0 if quantize is not None else _quantizable_bytes(transformer, torch.bfloat16)
    return _ShapeWeights(sum(weights.values()), waiting, saved)


def _sizes_as(transformer: MV2VTransformer, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of every weight, loaded as a dtype."""
    tensors = (*transformer.named_parameters(), *transformer.named_buffers())
    return {
        name: weight.numel()
        * (
            weight.itemsize
            if name.endswith(OWN_DTYPES)
            else stored_dtype(transformer, name, dtype).itemsize
        )
        for name, weight in tensors
    }


def _quantizable_bytes(transformer: MV2VTransformer, dtype: torch.dtype) -> int:
    """What eight bits save of whole weights: a byte each stays, and a float32 scale a row."""
    return sum(
        (dtype.itemsize - 1) * linear.weight.numel() - 4 * linear.out_features
        for linear in large_linears(transformer).values()
    )


def _embed_bytes(
    config: Any, length: int, dtype: torch.dtype, *, is_quantized: bool = False
) -> int:
    """The most that one prompt makes in a T5 encoder: a layer's scores or its hidden rows.

    config: a `TextShape`, or transformers' own. is_quantized: a layer makes its weight, one at a
    time.
    """
    size = dtype.itemsize
    wide = 4 if size < 4 else 0
    # scores, position bias and their sum; the softmax in float32 and back
    scores = config.num_heads * length**2 * (4 * size + wide)
    hidden = 3 * length * config.d_ff * size
    made = config.d_model * config.d_ff * size if is_quantized else 0
    return int(max(scores, hidden + made) + 6 * length * config.d_model * size)


def overflow_reason(error: MemoryError | RuntimeError) -> str:
    """Why a turn has run out of memory; an error of another kind is raised again."""
    if not is_out_of_memory(error):
        raise error
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def overflow_error(
    parts: Parts, spans: Spans, plan: TokenPlan, reason: str, outcome: str
) -> MemoryBudgetError:
    """Give back what a failed turn held, and say what happened. Call it outside the handler."""
    gc.collect()
    parts.graphs.trim()
    holder = "the process"
    if parts.device.type == "cuda":
        torch.cuda.empty_cache()
        holder = "torch"
    stage, found = spans.current, Budget(parts).predict(plan)
    return MemoryBudgetError(
        f"{parts.device} had no memory left in the stage {stage!r} ({reason}): "
        f"{spans.peak_bytes.get(stage, 0):,} bytes were held by {holder}, "
        f"{found.by_span().get(stage, found.peak):,} predicted for this engine's tensors; "
        f"{outcome}; {Budget(parts).advice(plan, int(_LESS * found.peak))}"
    )
