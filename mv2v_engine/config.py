"""Configurations: frozen, flat, one per component; presets are plain values and functions.

C transformer width, k spatial patch of a tokenizer.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from mv2v_engine.errors import RequestError

MergeMode = Literal["conv", "discard", "off"]
MergeScope = Literal["group", "joint"]
Conditioning = Literal["joint", "static"]
Reuse = Literal["exact", "approximate"]
CameraConditioning = Literal["own", "target", "none"]
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
SchedulerName = Literal["euler", "unipc"]
TextOffload = Literal["auto", "always", "never"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MergerConfig:
    """The convolution C_theta that fuses a frame's neighbouring tokens (METHOD 7, Eq. 6).

    kernel: rows and columns, equal to the stride. groups: 1 dense, C depth-wise.
    pooled: average the cells first and apply a linear layer (a 1x1 kernel's weights).
    shared: one module serves every merging block.
    """

    kernel: tuple[int, int] = (2, 2)
    groups: int = 1
    bias: bool = True
    pooled: bool = False
    shared: bool = False

    def __post_init__(self) -> None:
        if min(self.kernel) < 1 or self.kernel == (1, 1):
            raise RequestError(f"a merge kernel must cover at least two cells, got {self.kernel}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """Shape of an `MV2VTransformer`; the words are diffusers' `WanTransformer3DModel`'s.

    source_channels: how many of in_channels, the last ones, hold the source's latents beside the
        target's (Lucy-Edit); 0 where a source is tokens of its own.
    tokenizers: spatial patches k of the conditioning tokenizers, empty for a base without them.
    merge_blocks: 0-indexed blocks before whose attention tokens merge; None takes METHOD 7's
        thirds. camera_conditioning: whose camera a conditioning token gets (METHOD 5); "none"
        for a base without camera modules.
    """

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    ffn_dim: int
    in_channels: int
    out_channels: int
    source_channels: int = 0
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    eps: float = 1e-6
    rope_theta: float = 10000.0
    camera_conditioning: CameraConditioning = "own"
    tokenizers: tuple[int, ...] = (2, 4, 8)
    merger: MergerConfig | None = MergerConfig()
    merge_blocks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.attention_head_dim % 2:
            raise RequestError(f"attention_head_dim must be even, got {self.attention_head_dim}")
        if any(k % 2 or k < 2 for k in self.tokenizers):
            raise RequestError(f"tokenizer patches must be even, got {self.tokenizers}")
        if self.source_channels and not (
            self.source_channels == self.out_channels == self.latent_channels
        ):
            raise RequestError(
                "a source on channels has as many as the target: expected in_channels twice "
                f"out_channels, got {self.in_channels} in, {self.out_channels} out and "
                f"source_channels {self.source_channels}"
            )
        depth = self.num_layers
        if self.merge_blocks is None:
            blocks = (depth // 3, 2 * depth // 3) if depth >= 3 else ()
            object.__setattr__(self, "merge_blocks", blocks)
        if any(not 0 <= block < depth for block in self.merging_blocks):
            raise RequestError(f"merge_blocks {self.merge_blocks} must lie below {depth} blocks")

    @property
    def dim(self) -> int:
        """C, the transformer width."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        """Of one video's latents."""
        return self.in_channels - self.source_channels

    def channels_of(self, role: str) -> int:
        """Of a segment's latents: the target's carry the source's as well, if it is on channels."""
        return self.in_channels if role == "target" else self.latent_channels

    @property
    def has_camera(self) -> bool:
        return self.camera_conditioning != "none"

    @property
    def merging_blocks(self) -> tuple[int, ...]:
        return self.merge_blocks or ()


# Wan2.1-T2V-1.3B with ReCamMaster's camera modules and Memory-V2V's tokenizers and mergers.
WAN_1_3B = TransformerConfig(
    num_layers=30,
    num_attention_heads=12,
    attention_head_dim=128,
    ffn_dim=8960,
    in_channels=16,
    out_channels=16,
)

# Wan2.2-TI2V-5B with Memory-V2V's tokenizers and mergers, no camera.
WAN_5B = TransformerConfig(
    num_layers=30,
    num_attention_heads=24,
    attention_head_dim=128,
    ffn_dim=14336,
    in_channels=48,
    out_channels=48,
    camera_conditioning="none",
)

# Lucy-Edit: the same with the source on the target's channels; memory is extra tokens.
LUCY_5B = dataclasses.replace(WAN_5B, in_channels=96, source_channels=48)

# The embedded default's transformer, small enough to be trained and run on two CPU cores.
TINY = TransformerConfig(
    num_layers=8,
    num_attention_heads=3,
    attention_head_dim=48,
    ffn_dim=576,
    in_channels=16,
    out_channels=16,
    text_dim=64,
    text_len=8,
    freq_dim=128,
)

# The embedded editing model's: for instructions. Wider, for target and source share a token.
TINY_EDIT = TransformerConfig(
    num_layers=5,
    num_attention_heads=5,
    attention_head_dim=48,
    ffn_dim=720,
    in_channels=32,
    out_channels=16,
    source_channels=16,
    text_dim=64,
    text_len=16,
    freq_dim=128,
    camera_conditioning="none",
    merger=MergerConfig(shared=True),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """What a checkpoint was made for: the window, its size and the sampler's defaults (METHOD 8).

    num_frames: pixel frames of one window, 4n+1. size: (height, width) in pixels. fps: the rate
    that it was made at, for frames that come without one.
    """

    num_frames: int = 81
    size: tuple[int, int] = (480, 832)
    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    flow_shift: float = 5.0
    negative_prompt: str = ""
    fps: float = 16.0
    scheduler: SchedulerName = "euler"

    def __post_init__(self) -> None:
        if self.num_frames % 4 != 1:
            raise RequestError(f"num_frames must be 4n+1, got {self.num_frames}")
        if not self.fps > 0:
            raise RequestError(f"fps must be positive, got {self.fps}")
        if self.scheduler not in get_args(SchedulerName):
            known = ", ".join(get_args(SchedulerName))
            raise RequestError(f"scheduler must be one of {known}, got {self.scheduler!r}")


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

    scheduler: None takes the checkpoint's.
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
    reuse: "approximate" keeps the K and V of joint conditioning between whole forwards, at most
        reuse_refresh steps apart; reuse_drift: a step makes one of its own once the first
        block's conditioning output has changed by so much (relative L2) since the last; None
        does not measure it.
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
    parallel: processes that share every step; see docs/parallel.md.
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
    fov_radius: float = 4.0
    fov_blend: float = 0.5
    cache_bytes: int = 4 << 30
    device_cache_bytes: int | None = None
    graphs: GraphMode = "auto"
    graph_bytes: int = 4 << 30
    frames_bytes: int = 1 << 30
    max_source_pixels: int = 3840 * 2160
    reuse: Reuse = "exact"
    reuse_refresh: int = 4
    reuse_drift: float | None = 0.1
    step_cache: float | None = None
    feed_forward_chunk: int | None = 16_384
    memory_limit_bytes: int | None = None
    text_offload: TextOffload = "auto"
    batch_tokens: int | None = None
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        self._check_reuse()
        self._check_graphs()
        self._check_parallel()
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
        if not 0 <= (self.device_cache_bytes or 0) <= self.cache_bytes:
            raise RequestError(
                f"device_cache_bytes is the device's part of cache_bytes: give 0.."
                f"{self.cache_bytes:,} or raise cache_bytes, got {self.device_cache_bytes:,}"
            )

    def _check_reuse(self) -> None:
        if self.reuse == "approximate" and self.conditioning == "static":
            raise RequestError(
                'reuse="approximate" is for conditioning="joint": with "static" the conditioning '
                'is kept exactly already; leave reuse at "exact"'
            )
        if self.reuse_refresh < 1:
            raise RequestError(f"reuse_refresh counts steps, 1 or more, got {self.reuse_refresh}")
        for name in ("reuse_drift", "step_cache"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise RequestError(f"{name} must be finite and not negative, or None, got {value}")

    def _check_graphs(self) -> None:
        if self.graphs == "on" and self.merge_scope == "joint" and self.merge != "off":
            raise RequestError(
                'graphs="on" cannot be met with merge_scope="joint": there the data decide how '
                'many tokens a block sees; use merge_scope="group", merge="off" or graphs="auto"'
            )
        if self.graphs == "on" and (self.reuse != "exact" or self.step_cache is not None):
            raise RequestError(
                'graphs="on" cannot be met with reuse="approximate" or a step_cache: their steps '
                'find what earlier ones left; use graphs="auto"'
            )

    def _check_parallel(self) -> None:
        if self.parallel.num_ranks == 1:
            return
        if self.reuse != "exact" or self.step_cache is not None:
            raise RequestError(
                'several processes run exact steps alone: reuse="approximate" and a step_cache '
                "decide by tensors of which each has a part; leave them out, or run one process"
            )
        if self.graphs == "on":
            raise RequestError(
                'graphs="on" cannot be met by several processes: gloo cannot be captured, and a '
                'step captured with NCCL would wait for the others\' replays; use graphs="auto"'
            )
