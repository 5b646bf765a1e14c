"""What a turn will take of the device, from its plan before anything runs, and what it may take.

Bytes are of tensors alive at once; what a library allocates inside an operation is not known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mv2v_engine.engine.vae_bytes import vae_peak_bytes
from mv2v_engine.errors import MemoryBudgetError
from mv2v_engine.text import TextEncoder
from mv2v_engine.tokens.flops import conditioning_bytes
from mv2v_engine.tokens.peak import Execution, forward_peak_bytes
from mv2v_engine.tokens.plan import TokenPlan, memory_tokenizers, turn_plan

if TYPE_CHECKING:
    from mv2v_engine.engine.engine import Engine

# torch keeps this much for cuBLAS on Hopper, and less elsewhere
CUBLAS_WORKSPACE = 32 << 20
# beside what the forwards make: the noisy latents, the positive branch's velocity, the next latents
_STEP_VIDEOS = 3
# with guidance
_BRANCHES = 2


@dataclass(frozen=True, kw_only=True)
class Parts:
    """An engine's bytes on its device that no plan changes.

    transformer, vae, text: weights. is_text_offloaded: the last are there for the stage "text"
    alone. cache: the latent memory's share. video: latents of one. copies_memory: remembered
    videos are copied out of an arena. embedding: of one prompt. encode, decode, embed: the most
    that the VAE and the text encoder make. workspace: what libraries and captured steps keep;
    arena: for these, what static conditioning keeps.
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
        """By the names of a report's stages: the VAE's two are one."""
        spans: dict[str, int] = {}
        for name, count in self.stages.items():
            span = name.split()[0]
            spans[span] = max(count, spans.get(span, 0))
        return spans


def predict(parts: Parts, plan: TokenPlan) -> Prediction:
    """A turn's stages, with guidance; a prompt whose embedding is kept takes less of "text"."""
    source = parts.video
    copied = plan.num_memory if parts.copies_memory else 0
    inputs = source + copied * parts.video + 2 * parts.embedding
    table = plan.length * plan.shape.attention_head_dim * 4
    arriving = parts.text if parts.is_text_offloaded else 0
    forward = forward_peak_bytes(plan, parts.execution)
    steps = () if plan.scope == "joint" else None
    in_arena = min(parts.arena, conditioning_bytes(plan, parts.execution.element_bytes, steps))
    own = {
        "vae encode": parts.encode,
        "text": source + arriving + parts.embed,
        "memory": inputs,
        "sampling": inputs + _STEP_VIDEOS * parts.video + forward - in_arena,
        "vae decode": inputs + table + parts.decode,
    }
    return Prediction({name: parts.resident + count for name, count in own.items()})


class Budget:
    """The bytes of an engine's turns: what they will take, may take, and how to take less."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def parts(self) -> Parts:
        """As they are now: the cache fills, the text encoder comes and goes."""
        engine, config = self.engine, self.engine.config
        shape, text, sampling = engine.transformer.config, engine.text, engine.sampling
        encode, decode = vae_peak_bytes(engine.vae, sampling.num_frames, sampling.size)
        on_gpu, held = engine.device.type == "cuda", engine.graphs.bytes()
        return Parts(
            transformer=module_bytes(engine.transformer),
            vae=module_bytes(engine.vae.model),
            text=0 if text is None else module_bytes(text.model),
            is_text_offloaded=text is not None and text.is_offloaded,
            cache=self._cache_bytes(),
            video=engine.video_bytes,
            copies_memory=config.device_cache_bytes is not None,
            embedding=shape.text_len * shape.text_dim * engine.dtype.itemsize,
            encode=encode,
            decode=decode,
            embed=0 if text is None else embed_bytes(text),
            workspace=held["pool"] + held["buffers"] + (CUBLAS_WORKSPACE if on_gpu else 0),
            arena=held["arena"],
            execution=Execution(
                engine.dtype.itemsize,
                config.feed_forward_chunk,
                is_fused=engine.backend != "reference",
                residuals=_BRANCHES if config.step_cache is not None else 0,
            ),
        )

    def predict(self, plan: TokenPlan) -> Prediction:
        """Peak bytes of a turn's stages."""
        return predict(self.parts(), plan)

    def limit(self) -> int | None:
        """What everything of this engine together may take; None: nobody says."""
        engine, limits = self.engine, []
        if engine.config.memory_limit_bytes is not None:
            limits.append(engine.config.memory_limit_bytes)
        if engine.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(engine.device)
            unused = torch.cuda.memory_reserved(engine.device)
            unused -= torch.cuda.memory_allocated(engine.device)
            own = module_bytes(engine.transformer) + module_bytes(engine.vae.model)
            if engine.text is not None and not engine.text.is_offloaded:
                own += module_bytes(engine.text.model)
            own += sum(engine.graphs.bytes().values())
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
                f"this turn needs {found.peak:,} bytes of {self.engine.device} in its stage "
                f"{found.fullest!r}, {limit:,} are available; {self.advice(plan, limit)}"
            )

    def place_text(self) -> None:
        """Put the text encoder's weights where `EngineConfig.text_offload` wants them."""
        text, mode = self.engine.text, self.engine.config.text_offload
        if text is None:
            return
        if mode != "auto":
            text.offload(mode == "always")
        elif self.engine.device.type == "cuda":  # a CPU engine's device is the host
            limit, parts = self.limit(), replace(self.parts(), is_text_offloaded=False)
            text.offload(limit is not None and predict(parts, self.largest_plan()).peak > limit)

    def largest_plan(self) -> TokenPlan:
        """Of a turn that remembers as many videos as the configuration allows."""
        engine, config = self.engine, self.engine.config
        shape, sampling = engine.transformer.config, engine.sampling
        _, frames, rows, columns = engine.vae.latent_shape(sampling.num_frames, sampling.size)
        remembers = engine.memory in ("retrieved", "alone") and shape.tokenizers
        return turn_plan(
            shape,
            (frames, rows, columns),
            memory_tokenizers(
                config.max_memory if remembers else 0,
                shape.tokenizers,
                mode=config.memory_tokenizers,
            ),
            source=not shape.source_channels,
            merge=engine.merge,
            scope=config.merge_scope,
            fraction=config.merge_fraction,
            conditioning=config.conditioning,
        )

    def advice(self, plan: TokenPlan, limit: int) -> str:
        """The single settings that bring a turn's peak to a limit, or what comes nearest."""
        parts = self.parts()
        peaks = {
            words: predict(*changed).peak for words, changed in self._changes(parts, plan, limit)
        }
        enough = [f"{words} ({peak:,})" for words, peak in peaks.items() if peak <= limit]
        if enough:
            return f"try {' or '.join(enough)}"
        words = min(peaks, key=lambda name: peaks[name])
        if peaks[words] == predict(parts, plan).peak:
            return "no setting lowers it: use a larger device, or a smaller model"
        return (
            f"no single setting brings it there, {words} comes nearest ({peaks[words]:,}): change "
            "several, or use a larger device"
        )

    def _changes(
        self, parts: Parts, plan: TokenPlan, limit: int
    ) -> Iterator[tuple[str, tuple[Parts, TokenPlan]]]:
        """What a user may change, most harmless first."""
        if parts.text and not parts.is_text_offloaded and self.engine.device.type == "cuda":
            yield 'text_offload="always"', (replace(parts, is_text_offloaded=True), plan)
        smaller = max((parts.execution.chunk or plan.length) // 4, 1)
        execution = replace(parts.execution, chunk=smaller)
        yield f"feed_forward_chunk={smaller}", (replace(parts, execution=execution), plan)
        if parts.cache > parts.video:
            less = replace(parts, cache=parts.video, copies_memory=True)
            # a CPU's arenas are one memory
            name = "cache_bytes" if self.engine.device.type == "cpu" else "device_cache_bytes"
            yield f"{name}={parts.video}", (less, plan)
        if plan.merge == "off" and plan.shape.merger is not None:
            yield 'merge="conv"', (parts, replace(plan, merge="conv"))
        if plan.conditioning == "static":
            yield 'conditioning="joint"', (parts, replace(plan, conditioning="joint"))
        for count in reversed(range(plan.num_memory)):
            segments = plan.segments[: len(plan.segments) - plan.num_memory + count]
            fraction = self.engine.config.merge_fraction
            fewer = replace(plan, segments=segments, fraction=fraction)
            if count == 0 or predict(parts, fewer).peak <= limit:
                yield f"max_memory={count}", (parts, fewer)
                return

    def _cache_bytes(self) -> int:
        """The latent memory on the device after this turn."""
        engine, config = self.engine, self.engine.config
        if config.device_cache_bytes is None:
            return min(engine.cache.bytes_used + engine.video_bytes, config.cache_bytes)
        # a CPU's two arenas are one memory
        is_host = engine.device.type == "cpu"
        return config.cache_bytes if is_host else config.device_cache_bytes


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights."""
    tensors: set[Tensor] = {*module.parameters(), *module.buffers()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def embed_bytes(text: TextEncoder) -> int:
    """The most that one prompt makes in a T5 encoder: a layer's scores or its hidden rows."""
    config, length, size = text.model.config, text.max_length, text.dtype.itemsize
    wide = 4 if size < 4 else 0
    # scores, position bias and their sum; the softmax in float32 and back
    scores = config.num_heads * length**2 * (4 * size + wide)
    hidden = 3 * length * config.d_ff * size
    return int(max(scores, hidden) + 6 * length * config.d_model * size)
