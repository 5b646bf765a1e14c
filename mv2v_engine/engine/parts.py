"""The ground floor of an engine: its weights on a device, what runs them, and the memory.

Everything that makes turns works on a `Parts`; `Engine` is the same with a door.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from mv2v_engine import arguments
from mv2v_engine.checkpoints.fetch import fetch_components
from mv2v_engine.checkpoints.hub import say
from mv2v_engine.checkpoints.load import Checkpoint, load_checkpoint
from mv2v_engine.checkpoints.resolve import Resolution, is_trained_for_memory
from mv2v_engine.config import (
    EngineConfig,
    MemoryMode,
    MergeMode,
    SchedulerName,
    Timesteps,
    TransformerConfig,
    name_with_attention,
)
from mv2v_engine.engine.descriptors import (
    SegmentDescriber,
    check_descriptor,
    open_describer,
)
from mv2v_engine.engine.graphs import open_graphs
from mv2v_engine.engine.request import check_text
from mv2v_engine.engine.team import Team
from mv2v_engine.engine.turn import RecentFrames
from mv2v_engine.errors import CheckpointError, MemoryBudgetError, RequestError
from mv2v_engine.image import ImageEncoder, load_image_encoder
from mv2v_engine.memory.cache import MemoryCache
from mv2v_engine.memory.entry import LatentKind
from mv2v_engine.memory.ranking import Ranker
from mv2v_engine.models.block import Block
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.ops.attention_backends import resolve_attention
from mv2v_engine.ops.backend import resolve
from mv2v_engine.parallel.context import head_lengths
from mv2v_engine.parallel.device import dtype_of_tokens
from mv2v_engine.sampling.guidance import needs_guidance
from mv2v_engine.text import TextEncoder, load_text_encoder
from mv2v_engine.tokens.plan import TokenPlan, memory_tokenizers, turn_plan
from mv2v_engine.vae import VideoVAE, load_vae

# the settings on which an edit's latents depend, beside the weights
_OF_AN_EDIT = (
    "max_memory",
    "cross_shot_similarity",
    "memory_tokenizers",
    "merge_scope",
    "merge_fraction",
    "rope",
    "responsiveness_heads",
    "conditioning",
    "step_cache",
)
# what older folders hold of a choice that is gone, where nothing was reused
_EXACT = {"reuse": "exact", "reuse_refresh": 4, "reuse_drift": 0.1}
# settings that all engines on the same weights share
_OF_THE_WEIGHTS = (
    "backend",
    "attention",
    "responsiveness_heads",
    "feed_forward_chunk",
    "text_offload",
    "parallel",
    "base",
    "lora",
    "quantize",
    "quantize_text",
    "offload",
    "decoder",
)


def checked_arguments(
    path_or_name: Path | str,
    *,
    config: EngineConfig | None,
    components: Path | str | None,
    rename: Path | str | None,
) -> tuple[EngineConfig, Path | None]:
    """The configuration and the components' folder that a caller passed to `from_pretrained`.

    Raises:
        RequestError: an argument of another type.
    """
    arguments.path("path_or_name", path_or_name, "an embedded name, or the path of a checkpoint")
    if config is None:
        config = EngineConfig()
    arguments.instance("config", config, EngineConfig, "an EngineConfig")
    if rename is not None:
        arguments.path("rename", rename, "the path of a JSON file")
    if components is None:
        return config, None
    return config, arguments.path("components", components, "the path of a folder")


def load_parts(
    path_or_name: Path | str,
    place: torch.device,
    dtype: torch.dtype,
    config: EngineConfig,
    *,
    components: Path | None,
    rename: Path | str | None,
    causal: bool = False,
) -> tuple[Checkpoint, VideoVAE, TextEncoder | None, ImageEncoder | None]:
    """Load what `Engine.from_pretrained` makes an engine of."""
    # refuse before anything large is read
    resolve(config.backend, place)
    tokens = dtype_of_tokens(dtype, place)
    resolve_attention(config, place, tokens)
    open_graphs(config, place)
    check_descriptor(config)
    moved = {"offload": config.offload, "text_offload": config.text_offload}
    for name, asked in moved.items():
        if asked in ("blocks", "always") and place.type != "cuda":
            say(
                f"note: {name}={asked!r} runs and saves nothing here: the memory of {place} is the "
                "host's"
            )
    given = None
    if components is not None:
        given = fetch_components(components, has_image=config.base is not None)
    is_checked = config.check_weights

    def check(plan: Resolution) -> None:
        if given is None:
            require_components(plan)
        text = plan.text_path if given is None else given.text_encoder
        if config.quantize_text is not None and text is None:
            raise RequestError(
                f"{plan.name} has no text encoder, got quantize_text={config.quantize_text!r}; "
                "leave it out"
            )

    checkpoint = load_checkpoint(
        path_or_name,
        device=place,
        dtype=tokens,
        products=dtype,
        rename=rename,
        lora=config.lora,
        quantize=config.quantize,
        offload=config.offload,
        check_weights=is_checked,
        with_components=given is None,
        causal=causal,
        base=config.base,
        check=check,
    )
    checkpoint = replace(checkpoint, name=name_with_attention(checkpoint.name, config.attention))
    has_image, image_path = bool(checkpoint.config.image_dim), checkpoint.image_path
    vae_path, text_path = checkpoint.vae_path, checkpoint.text_path
    tokenizer_path = checkpoint.tokenizer_path
    if given is not None:
        vae_path = given.vae(checkpoint.config.latent_channels)
        text_path, tokenizer_path = given.text_encoder, given.tokenizer
        if has_image and given.image_encoder is not None:
            image_path = given.image_encoder
    assert vae_path is not None
    # convolutions in half precision are slow or missing on a CPU
    vae_dtype = torch.float32 if place.type == "cpu" else dtype
    vae = load_vae(vae_path, device=place, dtype=vae_dtype, check_weights=is_checked)
    if config.decoder is not None:
        vae.take_decoder(config.decoder, check_weights=is_checked)
    text = None
    if text_path is not None and tokenizer_path is not None:
        text = load_text_encoder(
            text_path,
            tokenizer_path,
            max_length=checkpoint.config.text_len,
            device=place,
            dtype=dtype,
            quantize=config.quantize_text,
            # on the host until it is known what else a turn needs
            is_offloaded=config.text_offload != "never" and place.type == "cuda",
            check_weights=is_checked,
        )
    image = None
    if has_image:
        _require_image(checkpoint.name, image_path)
        assert image_path is not None
        image = load_image_encoder(image_path, device=place, dtype=dtype, check_weights=is_checked)
    return checkpoint, vae, text, image


def require_components(found: Resolution) -> None:
    """Refuse a checkpoint that lacks what turns need beside its transformer; ours need no text.

    Raises:
        CheckpointError: with what is missing, and how to give it.
    """
    needed = {"VAE": found.vae_path}
    if found.format != "mv2v_engine":
        needed |= {"text encoder": found.text_path, "tokenizer": found.tokenizer_path}
    missing = [what for what, place in needed.items() if place is None]
    if missing:
        raise CheckpointError(
            f"{found.name} ({found.format}) holds no {missing[0]}; give components=FOLDER, "
            "a Wan diffusers folder with vae, text_encoder and tokenizer, one with "
            "Wan2.1_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth and google/umt5-xxl/, or the name of "
            "such a repository, as Wan-AI/Wan2.1-T2V-1.3B"
        )
    if found.config.image_dim:
        _require_image(found.name, found.image_path)


def _require_image(name: str, place: Path | None) -> None:
    if place is None:
        raise CheckpointError(
            f"{name} reads image tokens, and no image encoder is beside it or in the components; "
            "give components=FOLDER with image_encoder/, or with "
            "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
        )


def configure(
    transformer: MV2VTransformer, config: EngineConfig, device: torch.device
) -> tuple[str, str]:
    """Set a transformer up as configured; the backend and the attention library that it runs on.

    Raises:
        RequestError: a process would have no attention head.
        KernelUnavailableError: an explicit request cannot be met.
    """
    shape, dtype = transformer.config, transformer.patch_embedding.weight.dtype
    backend = resolve(config.backend, device, dtype)
    attention = resolve_attention(
        config,
        device,
        dtype,
        num_heads=head_lengths(shape.num_attention_heads, config.parallel.context)[0],
        head_dim=shape.attention_head_dim,
    )
    # with "auto" a call whose shape that library does not take goes to the next one
    is_free = config.attention == "auto" and attention != "reference"
    transformer.set_backend(backend, "auto" if is_free else attention)
    transformer.responsiveness_heads = config.responsiveness_heads
    transformer.set_feed_forward_chunk(config.feed_forward_chunk)
    return backend, attention


def check_same_weights(own: EngineConfig, asked: EngineConfig) -> None:
    """Refuse settings that another engine on the same weights cannot have of its own."""
    arguments.instance("config", asked, EngineConfig, "an EngineConfig")
    for name in _OF_THE_WEIGHTS:
        one, other = getattr(own, name), getattr(asked, name)
        if one != other:
            raise RequestError(
                f"{name} is shared by all engines on these weights: it is {one!r}, asked was "
                f"{other!r}; load them again with from_pretrained"
            )


def default_memory(config: TransformerConfig, initialised: Iterable[str]) -> MemoryMode:
    """What a turn remembers unless it is told: nothing, on weights that never learned to."""
    return "retrieved" if is_trained_for_memory(config, initialised) else "none"


AnyParts = TypeVar("AnyParts", bound="Parts")


class Parts:
    """A checkpoint on a device, and what its sessions share.

    memory_mode: what a turn remembers unless it is told. merge: the mode of merging. sampling: the
    checkpoint's defaults at the configured size. ranker: of a learned ranking, else None. backend,
    attention: what the transformer runs on. cache: the memory. team: the other processes that share
    its steps.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        vae: VideoVAE,
        text: TextEncoder | None,
        image: ImageEncoder | None = None,
        *,
        device: torch.device,
        config: EngineConfig,
        team: Team | None = None,
    ) -> None:
        self.checkpoint, self.vae, self.text, self.image = checkpoint, vae, text, image
        self.device, self.config = device, config
        self._made_for = checkpoint.sampling.under(
            fast=config.fast, scheduler=config.scheduler, timesteps=config.timesteps
        )
        self.sampling = self._made_for.at(config.size, checkpoint.name)
        self.scheduler: SchedulerName = self.sampling.scheduler
        self.timesteps: Timesteps = self.sampling.timesteps
        self.transformer, self.team = checkpoint.transformer, team
        self.backend, self.attention = configure(self.transformer, config, device)
        by_default = default_memory(checkpoint.config, checkpoint.report.initialised)
        self.memory_mode = config.memory or (
            "retrieved" if config.history is not None else by_default
        )
        has_mergers = self.transformer.config.merger is not None
        self.merge: MergeMode = config.merge or ("conv" if has_mergers else "off")
        self._check()
        self.ranker: Ranker | None = None
        if config.memory_ranking == "learned":
            self.ranker = Ranker.read(checkpoint.report.path, checkpoint.config.latent_channels)
        self.graphs = open_graphs(config if team is None else replace(config, graphs="off"), device)
        self.cache = MemoryCache(
            config.cache_bytes,
            device,
            device_bytes=config.device_cache_bytes,
            page_bytes=self.video_bytes,
        )
        self.recent_frames = RecentFrames(config.frames_bytes)

    def __repr__(self) -> str:
        dtype = str(self.products).removeprefix("torch.")
        task = "edits" if self.is_editor else "novel views"
        return f"{type(self).__name__}({self.checkpoint.name!r}, {task}, {dtype} on {self.device})"

    def at(self: AnyParts, size: tuple[int, int] | None) -> AnyParts:
        """The same, with the same memory, for sessions of another size (height, width).

        Raises:
            RequestError: the weights were not made for it.
        """
        sampling = self._made_for.at(size or self.sampling.size, self.checkpoint.name)
        if sampling.size == self.sampling.size:
            return self
        other = copy(self)
        other.sampling = sampling
        other._check_history()
        return other

    @property
    def is_editor(self) -> bool:
        """Whether the model edits by instruction; else it renders novel views."""
        return self.transformer.config.is_editor

    @property
    def history(self) -> str | None:
        """The rate at which remembered videos are one history; None: each has its tokenizer."""
        asked, encoders = self.config.history, self.transformer.config.history
        if asked is None or encoders is None:
            return None
        rate = encoders.rates[0] if asked == "default" else asked
        return rate if rate in encoders.rates else None

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """The latents of one window: channels, frames, rows, columns."""
        return self.vae.latent_shape(self.sampling.num_frames, self.sampling.size)

    def _check_history(self) -> None:
        """Refuse a rate that videos of this size do not fit, which a first turn would not meet."""
        if self.history is not None:
            self.plan_of(1)

    def _check(self) -> None:
        """Refuse parts that do not fit each other before a turn has been paid for."""
        name, shape = self.checkpoint.name, self.transformer.config
        latents = self.latent_shape
        if latents[0] != shape.latent_channels:
            raise CheckpointError(
                f"the VAE has {latents[0]} latent channels, the transformer takes "
                f"{shape.latent_channels}; give the VAE that belongs to {name}"
            )
        if self.text is not None and self.text.dim != shape.text_dim:
            raise CheckpointError(
                f"the text encoder gives embeddings of {self.text.dim}, the transformer takes "
                f"{shape.text_dim}; give the text encoder that belongs to {name}"
            )
        if (0 if self.image is None else self.image.dim) != shape.image_dim:
            _require_image(name, None if self.image is None else Path())
            raise CheckpointError(
                f"the image encoder gives tokens of {self.image and self.image.dim}, the "
                f"transformer takes {shape.image_dim}; give the one that belongs to {name}"
            )
        if shape.vace_layers and self.config.parallel.context > 1:
            raise RequestError(
                f"{name} has VACE's blocks, whose tokens are not shared between processes: use "
                "context=1"
            )
        if self.config.history is not None and self.history is None:
            has = "" if shape.history is None else f" but of {' and '.join(shape.history.rates)}"
            raise RequestError(
                f"{name} has no history encoder{has}, got history={self.config.history!r}; leave "
                "it out, or use weights of `training.history`"
            )
        self._check_history()
        if self.scheduler == "flow_map" and not shape.has_end_time:
            raise RequestError(
                f"scheduler flow_map takes the long steps of a flow map, which {name} is not: it "
                'was never told where a step goes; use scheduler="euler", or weights of '
                "`training.dit --flow-map`"
            )
        if self.video_bytes > self.config.cache_bytes:
            raise MemoryBudgetError(
                f"one video of {name} is {self.video_bytes:,} bytes of latents, cache_bytes allows "
                f"{self.config.cache_bytes:,}; raise it"
            )
        on_device = self.config.device_cache_bytes
        if on_device is not None and self.video_bytes > on_device:
            raise MemoryBudgetError(
                f"one video of {name} is {self.video_bytes:,} bytes of latents, device_cache_bytes "
                f"allows {on_device:,}; raise it, or leave it out"
            )

    def plan(
        self,
        tokenizers: Sequence[int],
        *,
        has_source: bool = True,
        preceding: bool = True,
        references: Sequence[tuple[int, int]] = (),
    ) -> TokenPlan:
        """The plan of a window as configured; the arguments as `turn_plan` takes them."""
        config, (_, frames, rows, columns) = self.config, self.latent_shape
        return turn_plan(
            self.transformer.config,
            (frames, rows, columns),
            tokenizers,
            source=has_source,
            preceding=preceding,
            references=references,
            merge=self.merge,
            scope=config.merge_scope,
            fraction=config.merge_fraction,
            conditioning=config.conditioning,
            rope=config.rope,
            history=self.history,
            history_frames=config.history_frames,
            is_encoded=self.history is not None,
        )

    def plan_of(self, num_memory: int, references: Sequence[tuple[int, int]] = ()) -> TokenPlan:
        """The plan of a window that remembers so many videos. references: as `plan` has them."""
        if self.history is not None:
            return self.plan((2,) * num_memory, references=references)
        available, mode = self.transformer.config.tokenizers, self.config.memory_tokenizers
        ranked = memory_tokenizers(num_memory, available, mode=mode)
        return self.plan(ranked, references=references)

    def turn_settings(self) -> dict[str, Any]:
        """What a turn's latents depend on beside its request; windows of one edit share it.

        A view's turns are each their own: of theirs it is how they are sampled.
        """
        # exact ones stand in no folder of before there was a choice
        rounded = {} if self.timesteps == "exact" else {"timesteps": self.timesteps}
        own: dict[str, Any] = {"scheduler": self.scheduler}
        if self.is_editor:
            own |= {name: getattr(self.config, name) for name in _OF_AN_EDIT}
            own |= {**_EXACT, "merge": self.merge}
        if self.sampling.flow_shift != self.checkpoint.sampling.flow_shift:
            own["flow_shift"] = self.sampling.flow_shift
        if self.config.quantize_text is not None:
            own["quantize_text"] = self.config.quantize_text
        if self.history is not None:
            own |= {"history": self.history, "history_frames": self.config.history_frames}
        if self.products != self.dtype:
            own["products"] = str(self.products).removeprefix("torch.")
        return {**own, **rounded}

    def check_text(self, prompt: str, guidance_scale: float) -> None:
        """Refuse a prompt that nothing here could read, and guidance towards nothing."""
        arguments.text("prompt", prompt)
        arguments.number("guidance_scale", guidance_scale)
        check_text(self.checkpoint.name, prompt, guidance_scale, has_text=self.text is not None)

    @property
    def latent_kind(self) -> LatentKind:
        """The latents of this engine's turns: other ones in the cache are not candidates."""
        return LatentKind(self.vae.key, self.latent_shape, torch.float32)

    @functools.cached_property
    def describer(self) -> SegmentDescriber:
        """What compares the segments of a long edit."""
        return open_describer(self.config, self.device)

    @property
    def video_bytes(self) -> int:
        """Bytes of one turn's latents."""
        return math.prod(self.latent_shape) * torch.float32.itemsize

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the transformer's tokens."""
        return self.transformer.patch_embedding.weight.dtype

    @property
    def products(self) -> torch.dtype:
        """The dtype of the blocks' weights as their products take them."""
        return cast(Block, self.transformer.blocks[0]).attn1.to_q.bias.dtype

    def text_embedding(self, prompt: str) -> Tensor:
        """[1, S, text_dim]; zeros for a checkpoint without text."""
        return self.text_embeddings([prompt])[0]

    def text_embeddings(self, prompts: Sequence[str]) -> list[Tensor]:
        """`text_embedding` of several, for which an offloaded encoder travels once."""
        shape = self.transformer.config
        if self.text is None:
            size = (1, shape.text_len, shape.text_dim)
            nothing = torch.zeros(size, dtype=torch.float32, device=self.device)
            return [nothing] * len(prompts)
        return self.text.encode_all(prompts)

    def guidance_texts(
        self, prompt: str, guidance_scale: float, *, has_references: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings [1, S, text_dim] of the prompt and, with guidance, of the negative prompt."""
        prompts = [self.whole_prompt(prompt, has_references=has_references)]
        if needs_guidance(guidance_scale):
            prompts.append(self.sampling.negative_prompt)
        text, *negative = self.text_embeddings(prompts)
        return text, negative[0] if negative else None

    def whole_prompt(self, prompt: str, *, has_references: bool = False) -> str:
        """A prompt as the text encoder reads it."""
        prefix = self.sampling.prompt_prefix
        if has_references and self.sampling.reference_prefix:
            prefix = self.sampling.reference_prefix
        return f"{prefix} {prompt}".strip()

    def _decoder(self) -> dict[str, Any]:
        """What made the frames in place of the VAE's own decoder."""
        return {"name": Path(self.config.decoder or "").name, "digest": self.vae.decoder_key}

    def describe(self) -> dict[str, Any]:
        """What a report says of the engine."""
        loras = self.checkpoint.report.loras
        return {
            "checkpoint": self.checkpoint.name,
            **({"lora": [lora.to_dict() for lora in loras]} if loras else {}),
            **({"decoder": self._decoder()} if self.config.decoder else {}),
            "device": str(self.device),
            "dtype": str(self.products).removeprefix("torch."),
            **({"quantize": self.config.quantize} if self.config.quantize else {}),
            **({"quantize_text": self.config.quantize_text} if self.config.quantize_text else {}),
            **({"offload": self.config.offload} if self.config.offload else {}),
            "backend": self.backend,
            "attention": self.attention,
            "scheduler": self.scheduler,
            "timesteps": self.timesteps,
            **({"fast": self.config.fast} if self.config.fast else {}),
            **({"history": self.history} if self.history else {}),
            "torch": torch.__version__,
            # the library whose steps a turn is made of
            **({"diffusers": version("diffusers")} if self.scheduler == "unipc" else {}),
        }
