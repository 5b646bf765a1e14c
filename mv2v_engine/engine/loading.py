"""The parts of an engine: read from their folders, and whether they belong together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mv2v_engine import arguments
from mv2v_engine.checkpoints.components import find_components
from mv2v_engine.checkpoints.load import Checkpoint, load_checkpoint
from mv2v_engine.config import EngineConfig
from mv2v_engine.engine.editing.descriptors import check_descriptor
from mv2v_engine.engine.graphs import open_graphs
from mv2v_engine.errors import CheckpointError, MemoryBudgetError, RequestError
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.ops.attention_backends import resolve_attention
from mv2v_engine.ops.backend import resolve
from mv2v_engine.parallel.context import head_lengths
from mv2v_engine.text import TextEncoder, load_text_encoder
from mv2v_engine.vae import VideoVAE, load_vae

if TYPE_CHECKING:
    from mv2v_engine.engine.engine import Engine

# settings that all engines on the same weights share
_OF_THE_WEIGHTS = (
    "backend",
    "attention",
    "responsiveness_heads",
    "feed_forward_chunk",
    "text_offload",
    "parallel",
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
) -> tuple[Checkpoint, VideoVAE, TextEncoder | None]:
    """As `Engine.from_pretrained`, up to the engine."""
    # refuse before anything large is read
    resolve(config.backend, place)
    resolve_attention(config, place, dtype)
    open_graphs(config, place)
    check_descriptor(config)
    given = None if components is None else find_components(components)
    if given is not None:
        given.require_all()
    is_checked = config.check_weights
    checkpoint = load_checkpoint(
        path_or_name, device=place, dtype=dtype, rename=rename, check_weights=is_checked
    )
    vae_path, text_path = checkpoint.vae_path, checkpoint.text_path
    tokenizer_path = checkpoint.tokenizer_path
    if given is not None:
        vae_path = given.vae(checkpoint.config.latent_channels)
        text_path, tokenizer_path = given.text_encoder, given.tokenizer
    if vae_path is None:
        raise CheckpointError(_lacks(checkpoint, "VAE"))
    # convolutions in half precision are slow or missing on a CPU
    vae_dtype = torch.float32 if place.type == "cpu" else dtype
    vae = load_vae(vae_path, device=place, dtype=vae_dtype, check_weights=is_checked)
    text = None
    if text_path is not None and tokenizer_path is not None:
        text = load_text_encoder(
            text_path,
            tokenizer_path,
            max_length=checkpoint.config.text_len,
            device=place,
            dtype=dtype,
            # on the host until it is known what else a turn needs
            is_offloaded=config.text_offload != "never" and place.type == "cuda",
            check_weights=is_checked,
        )
    elif checkpoint.format != "mv2v_engine":
        what = "text encoder" if text_path is None else "tokenizer"
        raise CheckpointError(_lacks(checkpoint, what))
    return checkpoint, vae, text


def _lacks(checkpoint: Checkpoint, what: str) -> str:
    return (
        f"{checkpoint.name} ({checkpoint.format}) holds no {what}; give a Wan diffusers folder "
        "with vae, text_encoder and tokenizer as components (--components), or one with "
        "Wan2.1_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth and google/umt5-xxl/"
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
    # under "auto" a call whose shape that library does not take goes to the next one
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


def check_parts(engine: Engine) -> None:
    """Refuse parts that do not fit each other before a turn has been paid for."""
    name, shape = engine.checkpoint.name, engine.transformer.config
    latents = engine.vae.latent_shape(engine.sampling.num_frames, engine.sampling.size)
    if latents[0] != shape.latent_channels:
        raise CheckpointError(
            f"the VAE has {latents[0]} latent channels, the transformer takes "
            f"{shape.latent_channels}; give the VAE that belongs to {name}"
        )
    if engine.text is not None and engine.text.dim != shape.text_dim:
        raise CheckpointError(
            f"the text encoder gives embeddings of {engine.text.dim}, the transformer takes "
            f"{shape.text_dim}; give the text encoder that belongs to {name}"
        )
    if engine.video_bytes > engine.config.cache_bytes:
        raise MemoryBudgetError(
            f"one video of {name} is {engine.video_bytes:,} bytes of latents, cache_bytes allows "
            f"{engine.config.cache_bytes:,}; raise it"
        )
    on_device = engine.config.device_cache_bytes
    if on_device is not None and engine.video_bytes > on_device:
        raise MemoryBudgetError(
            f"one video of {name} is {engine.video_bytes:,} bytes of latents, device_cache_bytes "
            f"allows {on_device:,}; raise it, or leave it out"
        )
