"""Configurations: frozen, flat, one per component.

What a transformer looks like is in `shapes`, and is imported from here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mv2v_engine import arguments
from mv2v_engine.arguments import fit_fields
from mv2v_engine.errors import RequestError
from mv2v_engine.shapes import LUCY_5B as LUCY_5B
from mv2v_engine.shapes import TINY as TINY
from mv2v_engine.shapes import TINY_EDIT as TINY_EDIT
from mv2v_engine.shapes import WAN_1_3B as WAN_1_3B
from mv2v_engine.shapes import WAN_5B as WAN_5B
from mv2v_engine.shapes import CameraAttention as CameraAttention
from mv2v_engine.shapes import CameraConditioning as CameraConditioning
from mv2v_engine.shapes import MergerConfig as MergerConfig
from mv2v_engine.shapes import TransformerConfig as TransformerConfig

MergeMode = Literal["conv", "discard", "off"]
MergeScope = Literal["group", "joint"]
Conditioning = Literal["joint", "static"]
RopeMode = Literal["pooled", "centre"]
HeadMode = Literal["concat", "mean"]
BackendName = Literal["auto", "reference", "native", "triton", "cuda"]
AttentionName = Literal[
    "auto", "reference", "fa3", "fa4", "cudnn", "fa2", "torch", "xformers", "triton"
]
MemoryMode = Literal["retrieved", "alone", "previous", "none"]
MemoryRanking = Literal["fov", "random"]
MemoryTokenizers = Literal["ranked", "uniform"]
GraphMode = Literal["auto", "on", "off"]
SchedulerName = Literal["euler", "unipc", "lightx2v", "dmd", "rcm"]
FastName = Literal["lightx2v", "fastwan", "turbo"]
# what is put behind a video's transparent pixels; "refuse" does not take them
Alpha = Literal["black", "white", "refuse"]
# how a source is brought to the model's shape: its edges are cut off, or bars are added
Fit = Literal["crop", "letterbox"]
Timesteps = Literal["exact", "bfloat16"]
TextOffload = Literal["auto", "always", "never"]

MAX_STEPS = 1000
# solvers of weights that are distilled to few steps without guidance: how many they have tables for
FEW_STEPS: Mapping[SchedulerName, tuple[int, ...]] = {
    "lightx2v": (4,),
    "dmd": (3, 4),
    "rcm": (1, 2, 3, 4),
}
# what each family of such weights is sampled with, by the fields of SamplingConfig
FAST: Mapping[FastName, Mapping[str, Any]] = {
    "lightx2v": {"scheduler": "lightx2v", "num_inference_steps": 4, "flow_shift": 5.0},
    "fastwan": {"scheduler": "dmd", "num_inference_steps": 3, "flow_shift": 8.0},
    "turbo": {"scheduler": "rcm", "num_inference_steps": 4},
}
# what is said to those who still ask for it
REUSE_IS_GONE = (
    "approximate reuse of joint conditioning is gone: fewer num_inference_steps (--steps) or a "
    "step_cache (--step-cache) save as much and lose less; leave reuse out"
)
# far above what anybody samples with, 1 to 20, and far below what overflows
MAX_GUIDANCE_SCALE = 100
# of a LoRA; what is used is 0.3 to 1.5, and what a negative one takes away
MAX_STRENGTH = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """What a checkpoint was made for: the window, its size and the sampler's defaults (METHOD 8).

    num_frames: pixel frames of one window, 4n+1. size: (height, width) in pixels. fps: the rate
    that it was made at, for frames that come without one. sizes: others that it was made for, too.
    timesteps: how the model is told them; "bfloat16" rounds them, as ReCamMaster does in training
    and inference.
    """

    num_frames: int = 81
    size: tuple[int, int] = (480, 832)
    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    flow_shift: float = 5.0
    negative_prompt: str = ""
    fps: float = 16.0
    scheduler: SchedulerName = "euler"
    sizes: tuple[tuple[int, int], ...] = ()
    timesteps: Timesteps = "exact"

    def __post_init__(self) -> None:
        if self.num_frames % 4 != 1 or self.num_frames < 1:
            raise RequestError(f"num_frames must be 4n+1, got {self.num_frames}")
        arguments.number("fps", self.fps, 0.01, 1000)
        arguments.integer("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        arguments.number("guidance_scale", self.guidance_scale, 0, MAX_GUIDANCE_SCALE)
        arguments.number("flow_shift", self.flow_shift, 0.01, 1000)
        if self.scheduler not in get_args(SchedulerName):
            known = ", ".join(get_args(SchedulerName))
            raise RequestError(f"scheduler must be one of {known}, got {self.scheduler!r}")
        if self.timesteps not in get_args(Timesteps):
            known = ", ".join(get_args(Timesteps))
            raise RequestError(f"timesteps must be one of {known}, got {self.timesteps!r}")

    def under(
        self,
        *,
        fast: FastName | None = None,
        scheduler: SchedulerName | None = None,
        timesteps: Timesteps | None = None,
    ) -> SamplingConfig:
        """The same as an `EngineConfig` of these fields has it; None keeps the checkpoint's."""
        changes: dict[str, Any] = {}
        if fast is not None:
            changes |= {"guidance_scale": 1.0, **FAST[fast]}
        if scheduler is not None:
            changes["scheduler"] = scheduler
        if timesteps is not None:
            changes["timesteps"] = timesteps
        return dataclasses.replace(self, **changes)

    def fewest_steps(self, least: int) -> int:
        """The fewest steps, from `least` on, that the scheduler can take."""
        counts = FEW_STEPS.get(self.scheduler, (least,))
        return next((count for count in counts if count >= least), counts[-1])

    def check_few_steps(self, steps: int, scale: float) -> None:
        """Refuse what a scheduler of few steps has no table for, or no use.

        Raises:
            RequestError: another number of steps, or guidance.
        """
        counts = FEW_STEPS.get(self.scheduler)
        if counts is None:
            return
        advice = 'fast (--fast) sets both; scheduler="unipc" or "euler" takes any'
        if steps not in counts:
            known = " or ".join(map(str, counts))
            raise RequestError(
                f"scheduler {self.scheduler} has a table for {known} steps, got "
                f"num_inference_steps={steps}; ask for {known}: {advice}"
            )
        if scale != 1:
            raise RequestError(
                f"scheduler {self.scheduler} is of weights that are distilled with guidance inside "
                f"them, got guidance_scale={scale:g}; use 1: {advice}"
            )

    def at(self, size: tuple[int, int] | None, name: str) -> SamplingConfig:
        """The same at another of its sizes, (height, width); None keeps its own.

        name: of the checkpoint, for the error.

        Raises:
            RequestError: the weights were not made for it.
        """
        if size is None or tuple(size) == self.size:
            return self
        if tuple(size) not in self.sizes:
            known = " and ".join(f"{height}x{width}" for height, width in (self.size, *self.sizes))
            raise RequestError(
                f"{name} was made for {known} (height x width), not {size[0]}x{size[1]}; ask for "
                'that, or have the source brought to it (source_fit="letterbox", --fit letterbox)'
            )
        return dataclasses.replace(self, size=(size[0], size[1]))


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How many processes, each with a device of its own, share a step; torchrun starts them.

    guidance: 2 runs the two forwards of guidance beside each other. context: processes that share
    the tokens of a forward, at most one an attention head. timeout_seconds: how long one waits
    for another within a step; the first step compiles.
    """

    guidance: int = 1
    context: int = 1
    timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        fit_fields(self)
        if self.guidance not in (1, 2):
            raise RequestError(
                f"guidance has one forward or two, got guidance={self.guidance} processes for "
                "them; give 1 or 2, and share the tokens by context"
            )
        if self.context < 1 or not 0 < self.timeout_seconds < math.inf:
            raise RequestError(
                "context counts processes, 1 or more, and timeout_seconds is positive, got "
                f"{self.context} and {self.timeout_seconds}"
            )

    @property
    def num_ranks(self) -> int:
        return self.guidance * self.context


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How an engine runs; nothing here changes what a checkpoint is.

    scheduler, timesteps: None takes the checkpoint's.
    fast: the scheduler, steps, shift and guidance of a family of weights that are distilled to few
        steps, whole ones or a LoRA; see docs/checkpoints.md.
    attention: the library; "auto" takes the fastest here, or what backend="reference" or
        "native" means.
    memory, merge: None is "retrieved" and "conv" where the checkpoint has trained weights for
        them, else "none" and "off", so that a base without memory keeps its own quality.
    cache_bytes: budget of the latent memory. max_memory: most memory videos of one turn.
    device_cache_bytes: how many of cache_bytes one arena on the device holds, allocated at once;
        the rest is an arena on the host, pinned beside CUDA. None: tensors on the device, one by
        one.
    frames_bytes: budget of decoded frames that turns hold, of all sessions together; older ones
        are decoded again when they are asked for. The turn used last holds its own in any case.
    memory_ranking: "random" draws the videos by the turn's seed (the ablation, of novel views).
    memory_tokenizers: "uniform" gives every memory video 1x2x2 tokens (the ablation).
    descriptor: a DINOv2 folder of transformers, by which the segments of a long edit are compared,
        descriptor_batch frames at once on descriptor_device (None: the engine's); None compares
        the pooled latents of their sources.
    cross_shot_similarity: cosine from which on an edit's segments of other shots are remembered
        too; None keeps every shot to itself.
    merge_fraction: None takes METHOD 7's rule. fov_radius: metres (METHOD 9).
    graphs: replay captured steps; "auto" where launches and not products bound a step, "on" for
        every plan or an error. A turn beside one that replays is eager in any case.
    graph_bytes: most that graphs, their inputs and their kept K and V may hold.
    max_source_pixels: larger frames are refused before they are decoded.
    size: (height, width) of turns, one that the checkpoint was made for; None: its first.
    source_fit: "letterbox" shows all of a source between black bars, "crop" fills the frame.
    source_alpha: what is put behind a source's transparent pixels; "refuse" does not take them.
    step_cache: steps are skipped while the timestep's modulation has changed by less than this
        (relative L1) since the last computed one; None computes all.
    feed_forward_chunk: tokens that a block's feed-forward takes at once, which bounds its hidden
        rows; None takes all together.
    memory_limit_bytes: what weights, memory and a turn's tensors may take of the device together;
        a turn that is predicted to need more is refused. None: what a GPU has free; no limit on
        a CPU.
    text_offload: whether the text encoder's weights wait on the host. "auto": where a turn with
        max_memory videos would not fit beside them.
    batch_tokens: how many tokens the turns of a batch share in one forward; a longer turn runs
        alone. None: 32,768 on CUDA; on a CPU, where sharing saves nothing, turn after turn.
    check_weights: refuse weights that are not finite when they are loaded, which reads each once
        more; False spares a huge checkpoint that.
    parallel: processes that share every step; see docs/parallel.md.
    lora: files of changes that are merged into the weights when they are loaded, each with its
        strength; see docs/checkpoints.md.
    """

    backend: BackendName = "auto"
    attention: AttentionName = "auto"
    memory: MemoryMode | None = None
    max_memory: int = 10
    memory_ranking: MemoryRanking = "fov"
    memory_tokenizers: MemoryTokenizers = "ranked"
    descriptor: Path | str | None = None
    descriptor_batch: int = 16
    descriptor_device: str | None = None
    cross_shot_similarity: float | None = None
    merge: MergeMode | None = None
    merge_scope: MergeScope = "group"
    merge_fraction: float | None = None
    rope: RopeMode = "pooled"
    responsiveness_heads: HeadMode = "concat"
    conditioning: Conditioning = "joint"
    scheduler: SchedulerName | None = None
    timesteps: Timesteps | None = None
    fast: FastName | None = None
    fov_radius: float = 4.0
    fov_blend: float = 0.5
    cache_bytes: int = 4 << 30
    device_cache_bytes: int | None = None
    graphs: GraphMode = "auto"
    graph_bytes: int = 4 << 30
    frames_bytes: int = 1 << 30
    max_source_pixels: int = 3840 * 2160
    size: tuple[int, int] | None = None
    source_fit: Fit = "crop"
    source_alpha: Alpha = "black"
    step_cache: float | None = None
    feed_forward_chunk: int | None = 16_384
    memory_limit_bytes: int | None = None
    text_offload: TextOffload = "auto"
    batch_tokens: int | None = None
    check_weights: bool = True
    parallel: ParallelConfig = ParallelConfig()
    lora: tuple[tuple[Path | str, float], ...] = ()
    reuse: InitVar[str | None] = None  # gone, and said so

    def __post_init__(self, reuse: str | None) -> None:
        fit_fields(self)
        if reuse is not None:
            raise RequestError(REUSE_IS_GONE)
        if self.fast is not None and self.scheduler not in (None, FAST[self.fast]["scheduler"]):
            raise RequestError(
                f"fast={self.fast!r} samples with {FAST[self.fast]['scheduler']}, got "
                f"scheduler={self.scheduler!r}; leave one of them out"
            )
        self._check_graphs()
        self._check_parallel()
        for _, strength in self.lora:
            arguments.number("a LoRA's strength", strength, -MAX_STRENGTH, MAX_STRENGTH)
        if self.merge_fraction is not None and not 0 <= self.merge_fraction <= 1:
            raise RequestError(f"merge_fraction must lie in 0..1, got {self.merge_fraction}")
        if not 0 < self.fov_radius < math.inf or not 0 <= self.fov_blend <= 1:
            raise RequestError(
                f"fov_radius must be positive and fov_blend lie in 0..1, got {self.fov_radius} "
                f"and {self.fov_blend}"
            )
        similarity = self.cross_shot_similarity
        if similarity is not None and not -1 <= similarity <= 1:
            raise RequestError(
                f"cross_shot_similarity is a cosine, -1..1 or None, got {similarity}"
            )
        if self.descriptor_batch < 1:
            raise RequestError(f"descriptor_batch must be at least 1, got {self.descriptor_batch}")
        for name in ("max_memory", "cache_bytes", "frames_bytes", "graph_bytes"):
            if getattr(self, name) < 0:
                raise RequestError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("batch_tokens", "feed_forward_chunk", "memory_limit_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name} must be positive, or None for no bound, got {value}")
        if self.step_cache is not None and not 0 <= self.step_cache < math.inf:
            raise RequestError(
                f"step_cache must be finite and not negative, or None, got {self.step_cache}"
            )
        if not 0 <= (self.device_cache_bytes or 0) <= self.cache_bytes:
            raise RequestError(
                f"device_cache_bytes is the device's part of cache_bytes: give 0.."
                f"{self.cache_bytes:,} or raise cache_bytes, got {self.device_cache_bytes:,}"
            )

    def _check_graphs(self) -> None:
        if self.graphs == "on" and self.merge_scope == "joint" and self.merge != "off":
            raise RequestError(
                'graphs="on" cannot be met with merge_scope="joint": there the data decide how '
                'many tokens a block sees; use merge_scope="group", merge="off" or graphs="auto"'
            )
        if self.graphs == "on" and self.step_cache is not None:
            raise RequestError(
                'graphs="on" cannot be met with a step_cache: its steps find what earlier ones '
                'left; use graphs="auto"'
            )

    def _check_parallel(self) -> None:
        if self.parallel.num_ranks == 1:
            return
        if self.step_cache is not None:
            raise RequestError(
                "several processes run exact steps alone: what a step_cache adds again is a "
                "tensor of which each has a part; leave it out, or run one process"
            )
        if self.graphs == "on":
            raise RequestError(
                'graphs="on" cannot be met by several processes: gloo cannot be captured, and a '
                'step captured with NCCL would wait for the others\' replays; use graphs="auto"'
            )
