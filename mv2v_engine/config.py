"""Configurations: frozen, flat, one per component.

What a transformer looks like is in `shapes`, and is imported from here.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any, Literal

from mv2v_engine import arguments
from mv2v_engine.arguments import fit_fields
from mv2v_engine.errors import RequestError
from mv2v_engine.settings import PROGRAMS, setting
from mv2v_engine.shapes import LUCY_5B as LUCY_5B
from mv2v_engine.shapes import TINY as TINY
from mv2v_engine.shapes import TINY_EDIT as TINY_EDIT
from mv2v_engine.shapes import VACE_1_3B as VACE_1_3B
from mv2v_engine.shapes import WAN_1_3B as WAN_1_3B
from mv2v_engine.shapes import WAN_5B as WAN_5B
from mv2v_engine.shapes import CameraAttention as CameraAttention
from mv2v_engine.shapes import CameraConditioning as CameraConditioning
from mv2v_engine.shapes import HistoryConfig as HistoryConfig
from mv2v_engine.shapes import MergerConfig as MergerConfig
from mv2v_engine.shapes import TransformerConfig as TransformerConfig
from mv2v_engine.shapes import rate_of

MergeMode = Literal["conv", "discard", "off"]
MergeScope = Literal["group", "joint"]
ConditioningMode = Literal["joint", "static"]
RopeMode = Literal["pooled", "centre"]
HeadMode = Literal["concat", "mean"]
BackendName = Literal["auto", "reference", "native", "triton", "cuda"]
AttentionName = Literal[
    "auto",
    "reference",
    "fa3",
    "fa4",
    "cudnn",
    "fa2",
    "torch",
    "xformers",
    "triton",
    "sage",
    "sparge",
    "sage-reference",
    "sparge-reference",
]
MemoryMode = Literal["retrieved", "alone", "previous", "none"]
MemoryRanking = Literal["fov", "coverage", "learned", "random"]
MemoryTokenizers = Literal["ranked", "uniform"]
GraphMode = Literal["auto", "on", "off"]
SchedulerName = Literal["euler", "unipc", "lightx2v", "dmd", "rcm", "flow_map"]
FastName = Literal["lightx2v", "fastwan", "turbo"]
# what is put behind a video's transparent pixels; "refuse" does not take them
Alpha = Literal["black", "white", "refuse"]
# how a source is brought to the model's shape: its edges are cut off, or bars are added
Fit = Literal["crop", "letterbox"]
GuidanceMode = Literal["cfg", "apg"]
Timesteps = Literal["exact", "bfloat16"]
TextOffload = Literal["auto", "always", "never"]
DtypeName = Literal["float32", "bfloat16", "float16"]
StreamPolicy = Literal["memrope", "sink", "window", "all", "history"]
QuantizeName = Literal["int8", "fp8"]
Offload = Literal["blocks"]

# what self-attention loses, in words; these are taken by name alone
APPROXIMATE_ATTENTION: Mapping[str, str] = {
    "sage": "queries and keys in eight bits",
    "sparge": "queries and keys in eight bits, half of the keys' blocks",
    "sage-reference": "queries and keys in eight bits",
    "sparge-reference": "queries and keys in eight bits, half of the keys' blocks",
}

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
    "approximate reuse of joint conditioning is gone: fewer num_inference_steps or a step_cache "
    "save as much and lose less; leave it out"
)
# far above what anybody samples with, 1 to 20, and far below what overflows
MAX_GUIDANCE_SCALE = 100
# the largest strength of a LoRA, and of a negative one, which takes it away; 0.3 to 1.5 is usual
MAX_STRENGTH = 100

# titles of the options
MODEL = "the model"
SAMPLING = "sampling"
PICTURE = "the source's frames"
MEMORY = "the memory"
VIEWS = "the memory of novel views"
EDITS = "the memory of edits"
STEPS = "reuse across steps"
BUDGET = "bytes"
RANKS = "several processes, under torchrun"
STREAM = "what a block sees of those before"


def name_with_attention(name: str, attention: AttentionName) -> str:
    """A checkpoint's name, which tells sessions made by approximate attention from exact ones."""
    return f"{name} ({attention} attention)" if attention in APPROXIMATE_ATTENTION else name


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """What a checkpoint was made for: the window, its size and the sampler's defaults (METHOD 8).

    num_frames: pixel frames of one window, 4n+1. size: (height, width) in pixels. fps: the rate
    that it was made at, for frames that come without one. sizes: others that it was made for, too.
    timesteps: how the model is told them; "bfloat16" rounds them, as ReCamMaster does in training
    and inference. guidance: how two predictions become one, `sampling.guidance`. prompt_prefix:
    what stands before every prompt but the negative one; reference_prefix: in its place where there
    are reference images, if it is not empty. reference_scales: of the images and of the video,
    which with reference images are guided apart from the words, `sampling.guidance.guide_chain`;
    empty: as without them.
    """

    num_frames: int = 81
    size: tuple[int, int] = (480, 832)
    num_inference_steps: int = setting(
        50,
        SAMPLING,
        "denoising steps of a turn, or of a window of an edit; the checkpoint's if not given",
        flag="--steps",
        low=1,
        high=MAX_STEPS,
    )
    guidance_scale: float = setting(
        5.0,
        SAMPLING,
        "guidance scale, 1 is none; the checkpoint's if not given",
        flag="--guidance",
        metavar="S",
        low=0,
        high=MAX_GUIDANCE_SCALE,
    )
    flow_shift: float = setting(5.0, PROGRAMS, "shift of the timesteps", low=0.01, high=1000)
    negative_prompt: str = ""
    fps: float = setting(16.0, PROGRAMS, "frames a second", low=0.01, high=1000)
    scheduler: SchedulerName = "euler"
    sizes: tuple[tuple[int, int], ...] = ()
    timesteps: Timesteps = "exact"
    guidance: GuidanceMode = "cfg"
    prompt_prefix: str = ""
    reference_prefix: str = ""
    reference_scales: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        fit_fields(self)
        if len(self.reference_scales) not in (0, 2):
            raise RequestError(
                "reference_scales must be two, of the images and of the video, or none, got "
                f"{self.reference_scales}"
            )
        if self.num_frames % 4 != 1 or self.num_frames < 1:
            raise RequestError(f"num_frames must be 4n+1, got {self.num_frames}")

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
        if self.scheduler == "flow_map" and scale != 1:
            raise RequestError(
                f"guidance moves velocities, not the long steps of a flow map, got guidance_scale="
                f'{scale:g}; use 1, or scheduler="euler", which takes the same weights as plain '
                "flow"
            )
        counts = FEW_STEPS.get(self.scheduler)
        if counts is None:
            return
        preset = next(name for name in FAST if FAST[name]["scheduler"] == self.scheduler)
        advice = (
            f"fast={preset!r} sets both if they are left out; "
            'scheduler="unipc" or scheduler="euler" in its place takes any'
        )
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
                'that: source_fit="letterbox" brings the whole source to it'
            )
        return dataclasses.replace(self, size=(size[0], size[1]))


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """Which weights an engine runs, and where."""

    checkpoint: str = setting(
        "tiny-nvs",
        MODEL,
        "a file, a folder, a hub's owner/name[@revision][:path], or an embedded name",
        metavar="NAME_OR_PATH",
    )
    components: Path | None = setting(
        None,
        MODEL,
        "VAE, text encoder and tokenizer from this folder or hub's owner/name, of diffusers' "
        "layout, Wan's or ComfyUI's; the checkpoint's own if not given",
    )
    rename: Path | None = setting(
        None, MODEL, "names that the checkpoint leaves open; none if not given", metavar="FILE"
    )
    device: str | None = setting(
        None, MODEL, "cpu, cuda or cuda:N; cuda where there is one if not given", metavar="D"
    )
    dtype: DtypeName | None = setting(
        None, MODEL, "the transformer's numbers; bfloat16 on cuda, else float32, if not given"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How many processes, each with a device of its own, share a step; torchrun starts them."""

    guidance: int = setting(
        1,
        RANKS,
        "2: one process for each of the two forwards of guidance; if not given, 2 where there is "
        "guidance and the processes are even",
        flag="--guidance-ranks",
    )
    context: int = setting(
        1,
        RANKS,
        "processes that share the tokens of a forward, at most one an attention head; if not "
        "given, all that guidance leaves",
        flag="--context-ranks",
        low=1,
    )
    timeout_seconds: float = setting(
        600.0, RANKS, "wait so long for another process; 600 if not given", metavar="S", above=0
    )

    def __post_init__(self) -> None:
        fit_fields(self)
        if self.guidance not in (1, 2):
            raise RequestError(
                f"guidance has one forward or two, got guidance={self.guidance} processes for "
                f"them; give 1 or 2, and share the tokens by context={self.guidance}"
            )

    @property
    def num_ranks(self) -> int:
        return self.guidance * self.context


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How an engine runs; nothing here changes what a checkpoint is."""

    backend: BackendName = setting("auto", MODEL, "what computes the operations")
    attention: AttentionName = setting(
        "auto",
        MODEL,
        "the library of attention; auto: the fastest exact one here that goes with the backend; "
        "sage and sparge are approximate",
    )
    base: Path | str | None = setting(
        None,
        MODEL,
        "the model that a checkpoint of trained tensors alone (ReDirector) was trained on, a path "
        "or a hub's owner/name; none if not given",
        metavar="NAME_OR_PATH",
    )
    decoder: Path | str | None = setting(
        None,
        MODEL,
        "a TAEHV or LightTAE file that makes the frames, sooner and less sharp; the VAE if not "
        "given",
        metavar="FILE",
    )
    graphs: GraphMode = setting(
        "auto", MODEL, "replay steps as CUDA graphs; auto: where it pays; on: all, or an error"
    )
    check_weights: bool = setting(
        True, MODEL, "load weights without looking for NaN and infinity; spares a pass"
    )
    lora: tuple[tuple[Path | str, float], ...] = setting(
        (),
        MODEL,
        "merge this LoRA into the weights, S times (1 if not given); may be repeated",
        metavar="FILE[:S]",
    )
    quantize: QuantizeName | None = setting(
        None, MODEL, "8 bits a weight of the blocks, with a scale a row; as the dtype if not given"
    )
    quantize_text: QuantizeName | None = setting(
        None,
        MODEL,
        "8 bits a weight of the text encoder's layers; as the dtype if not given",
    )
    scheduler: SchedulerName | None = setting(
        None, SAMPLING, "what integrates the flow; the checkpoint's if not given"
    )
    timesteps: Timesteps | None = setting(
        None,
        SAMPLING,
        "timesteps as they are, or rounded to bfloat16; the checkpoint's if not given",
    )
    fast: FastName | None = setting(
        None,
        SAMPLING,
        "solver, steps, shift and guidance of weights, or a LoRA, distilled to few steps by this "
        "family; the checkpoint's if not given",
    )
    size: tuple[int, int] | None = setting(
        None,
        PICTURE,
        "frames' size in turns, one that the weights were made for; their first if not given",
    )
    source_fit: Fit = setting(
        "crop",
        PICTURE,
        "to bring frames to that size, cut the edges off, or add black bars",
        flag="--fit",
    )
    source_alpha: Alpha = setting(
        "black", PICTURE, "what is put behind transparent pixels, or refuse them", flag="--alpha"
    )
    max_source_pixels: int = setting(
        3840 * 2160, PICTURE, "larger frames are refused before they are decoded"
    )
    memory: MemoryMode | None = setting(
        None,
        MEMORY,
        "what is remembered; retrieved if the weights learned to, else none, if not given",
    )
    max_memory: int = setting(
        10, MEMORY, "videos that a turn remembers at most; of an edit, windows", low=0
    )
    merge: MergeMode | None = setting(
        None, MEMORY, "how frames merge; conv if the weights learned to, else off, if not given"
    )
    merge_scope: MergeScope = setting(
        "group", PROGRAMS, "the ablation: joint ranks frames of all token grids together (METHOD 5)"
    )
    merge_fraction: float | None = setting(
        None,
        MEMORY,
        "share of the frames that merge, at each depth; the depth's if not given",
        low=0,
        high=1,
    )
    memory_tokenizers: MemoryTokenizers = setting(
        "ranked", PROGRAMS, "the ablation: uniform gives every memory video 1x2x2 tokens"
    )
    history: str | None = setting(
        None,
        MEMORY,
        "remembered videos as one history, at this rate of tokens or the checkpoint's first, by "
        "its history encoder; tokenizers by rank if not given",
        metavar="RATE",
    )
    history_frames: int = setting(
        0, MEMORY, "the last latent frames of the history that are seen whole beside it", low=0
    )
    rope: RopeMode = setting(
        "pooled", PROGRAMS, "the ablation: centre gives a coarse token one position, no average"
    )
    responsiveness_heads: HeadMode = setting(
        "concat", PROGRAMS, "the ablation: mean takes the heads of a frame's responsiveness apart"
    )
    fov_radius: float = setting(
        4.0, VIEWS, "metres to the points by which views are compared", above=0
    )
    fov_blend: float = setting(
        0.5, VIEWS, "weight of intersection over union, or of coverage", low=0, high=1
    )
    memory_ranking: MemoryRanking = setting(
        "fov",
        VIEWS,
        "coverage takes one video after the other by what it adds to the source, learned by a "
        "network of the checkpoint's; random, the ablation, draws them by the turn's seed",
    )
    descriptor: Path | str | None = setting(
        None, EDITS, "a DINOv2 folder that compares windows; latents do if not given", metavar="DIR"
    )
    descriptor_batch: int = setting(16, EDITS, "frames that it takes at once", low=1)
    descriptor_device: str | None = setting(
        None, EDITS, "the descriptor's device; the engine's if not given", metavar="D"
    )
    cross_shot_similarity: float | None = setting(
        None, EDITS, "cosine from which other shots count; none if not given", low=-1, high=1
    )
    conditioning: ConditioningMode = setting(
        "joint", STEPS, "static is computed once a turn, on weights trained for it"
    )
    step_cache: float | None = setting(
        None, STEPS, "skip steps whose modulation changes by less; none if not given", low=0
    )
    cache_bytes: int = setting(
        4 << 30,
        BUDGET,
        "bytes of remembered latents, of all sessions together, as 4GiB or 500MB",
        low=0,
    )
    device_cache_bytes: int | None = setting(
        None,
        BUDGET,
        "how many of these one arena on the device holds, the rest is one on the host, pinned "
        "beside CUDA; tensor by tensor on the device if not given",
        low=0,
    )
    frames_bytes: int = setting(
        1 << 30, BUDGET, "bytes of decoded frames that turns hold; others are decoded again", low=0
    )
    graph_bytes: int = setting(
        4 << 30, BUDGET, "bytes of CUDA graphs, their inputs and their kept K and V", low=0
    )
    feed_forward_chunk: int | None = setting(
        16_384, BUDGET, "tokens that a feed-forward takes at once; 0: all together", low=1
    )
    memory_limit_bytes: int | None = setting(
        None,
        BUDGET,
        "bytes that weights, memory and turn may take; what a GPU has free if not given",
        low=1,
    )
    text_offload: TextOffload = setting(
        "auto", BUDGET, "move the text encoder to the host; auto: if turns have no room beside"
    )
    offload: Offload | None = setting(
        None,
        BUDGET,
        "blocks: the transformer's blocks wait on the host, and the next one's weights are copied "
        "while one computes; all are on the device if not given",
    )
    batch_tokens: int | None = setting(
        None,
        BUDGET,
        "tokens in one forward that steps of several sessions' novel views share; if not given, "
        "32768 on cuda, and on a CPU one turn at a time",
        low=1,
    )
    parallel: ParallelConfig = ParallelConfig()
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
        if self.history not in (None, "default"):
            rate_of(self.history)
        if self.history_frames and self.history is None:
            raise RequestError(
                f"history_frames={self.history_frames} are those of a history; ask for one "
                '(history="default"), or leave them out'
            )
        self._check_graphs()
        self._check_parallel()
        for _, strength in self.lora:
            arguments.number("a LoRA's strength", strength, -MAX_STRENGTH, MAX_STRENGTH)
        if (self.device_cache_bytes or 0) > self.cache_bytes:
            raise RequestError(
                f"device_cache_bytes is the device's part of cache_bytes: give 0.."
                f"{self.cache_bytes:,} or raise cache_bytes, got {self.device_cache_bytes:,}"
            )

    def _check_graphs(self) -> None:
        if self.graphs == "on" and self.attention in APPROXIMATE_ATTENTION:
            raise RequestError(
                f'graphs="on" cannot be met with attention={self.attention!r}: replayed with other '
                'numbers, such libraries are known to give wrong results; use graphs="auto"'
            )
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

        if self.graphs == "on" and self.offload is not None:
            raise RequestError(
                'graphs="on" cannot be met with offload="blocks": weights that come from the host '
                'at every step are no part of a graph; use graphs="auto"'
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


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """How a causal model makes video without end, block by block."""

    block_frames: int = setting(3, PROGRAMS, "latent frames of a block", low=1)
    policy: StreamPolicy = setting(
        "memrope",
        STREAM,
        "memrope: the first frames, averages of all that is gone, the recent frames; sink: without "
        "averages; window: the recent frames; all: everything; history: a history encoder's tokens "
        "in place of averages; the checkpoint's if not given",
    )
    window: int = setting(
        12,
        STREAM,
        "latent frames that a block sees at most, its own included; the checkpoint's if not given",
    )
    sink_frames: int = setting(
        3,
        STREAM,
        "first latent frames that memrope, sink and history never let go; the checkpoint's if not "
        "given",
        flag="--sink",
        low=0,
    )
    long_alpha: float = setting(
        0.01, PROGRAMS, "how much of the long average is new in every block", low=0, high=1
    )
    short_alpha: float = setting(
        0.1, PROGRAMS, "how much of the short average is new in every block", low=0, high=1
    )
    is_adaptive: bool = setting(
        False,
        STREAM,
        "the short average is one of every position, and takes more where keys change; the "
        "checkpoint's if not given",
        flag="--adaptive",
    )
    averages: Literal["float32", "cache"] = setting(
        "float32",
        PROGRAMS,
        "the dtype of averages; cache is that of K and V, in which the method's authors round them",
    )
    history_rate: str | None = setting(
        None,
        STREAM,
        "rate of policy history's tokens, as 2x2x2; the first that the checkpoint has if not given",
        metavar="RATE",
    )
    history_slots: int = setting(
        2,
        STREAM,
        "of the window, the latent frames in whose place policy history has as many tokens of what "
        "is gone; the checkpoint's if not given",
        low=1,
    )
    timesteps: tuple[float, ...] = setting(
        (1000, 750, 500, 250), PROGRAMS, "the timesteps of a block, from 1000 down"
    )
    is_warped: bool = setting(
        True,
        PROGRAMS,
        "shift the timesteps by the checkpoint's flow_shift; else they are what the model is told",
    )
    recache: bool = setting(
        False,
        STREAM,
        "under a new prompt the recent frames are seen again, so that it shows sooner; as the "
        "frames were seen if not given",
    )
    snapshot_blocks: int = setting(
        40,
        PROGRAMS,
        "blocks from one snapshot of all that is held to the next; as many are computed again, at "
        "most, where a stored stream goes on",
        low=1,
    )

    def __post_init__(self) -> None:
        fit_fields(self)
        if self.window < self.num_fixed + self.block_frames:
            raise RequestError(
                f"a window of {self.window} latent frames cannot hold the {self.num_fixed} that "
                f"policy {self.policy!r} always keeps and {self.block_frames} new ones; raise "
                "window, or lower sink_frames"
            )
        if self.history_rate is not None:
            rate_of(self.history_rate)
        times = self.timesteps
        falls = all(earlier > later for earlier, later in itertools.pairwise(times))
        if not times or not falls or not 0 < times[-1] <= times[0] <= 1000:
            raise RequestError(
                f"timesteps must fall from at most 1000 and stay above 0, got {self.timesteps}"
            )

    @property
    def num_fixed(self) -> int:
        """Frames that stay where they are once the window is full, or tokens in their place."""
        if self.policy in ("all", "window"):
            return 0
        more: dict[StreamPolicy, int] = {"memrope": 2, "history": self.history_slots}
        return self.sink_frames + more.get(self.policy, 0)

    @property
    def whole_frames(self) -> int:
        """The window's places of frames that are kept whole."""
        return self.window - (self.history_slots if self.policy == "history" else 0)
