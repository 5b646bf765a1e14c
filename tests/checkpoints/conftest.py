"""Small random checkpoints, named by hand from BASE_MODELS so that no table of ours is assumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mv2v_engine.config import TransformerConfig

State = dict[str, Tensor]

# one head of 128: the number of heads then follows from the width
SMALL = TransformerConfig(
    num_layers=3,
    num_attention_heads=1,
    attention_head_dim=128,
    ffn_dim=96,
    in_channels=4,
    out_channels=4,
    text_dim=24,
    freq_dim=32,
    camera_conditioning="none",
    merger=None,
)

# BASE_MODELS 3.4, substring replacements in this order
REPLACEMENTS = [
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
    ("modulation", "scale_shift_table"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("norm2", "norm__placeholder"),
    ("norm3", "norm2"),
    ("norm__placeholder", "norm3"),
    *((f"self_attn.{p}", f"attn1.to_{p}") for p in "qkv"),
    ("self_attn.o", "attn1.to_out.0"),
    ("self_attn.norm_q", "attn1.norm_q"),
    ("self_attn.norm_k", "attn1.norm_k"),
    *((f"cross_attn.{p}", f"attn2.to_{p}") for p in "qkv"),
    ("cross_attn.o", "attn2.to_out.0"),
    ("cross_attn.norm_q", "attn2.norm_q"),
    ("cross_attn.norm_k", "attn2.norm_k"),
]


def by_replacement(key: str) -> str:
    for old, new in REPLACEMENTS:
        key = key.replace(old, new)
    return key


def original_shapes(config: TransformerConfig, *, camera: bool) -> dict[str, tuple[int, ...]]:
    """Original Wan names and shapes, ReCamMaster's modules included when `camera`."""
    c, ffn = config.dim, config.ffn_dim
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (c, config.in_channels, 1, 2, 2),
        "patch_embedding.bias": (c,),
        "head.modulation": (1, 2, c),
    }

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    linear("text_embedding.0", c, config.text_dim)
    linear("text_embedding.2", c, c)
    linear("time_embedding.0", c, config.freq_dim)
    linear("time_embedding.2", c, c)
    linear("time_projection.1", 6 * c, c)
    linear("head.head", 4 * config.out_channels, c)
    for n in range(config.num_layers):
        block = f"blocks.{n}"
        for attention in ("self_attn", "cross_attn"):
            for p in "qkvo":
                linear(f"{block}.{attention}.{p}", c, c)
            shapes[f"{block}.{attention}.norm_q.weight"] = (c,)
            shapes[f"{block}.{attention}.norm_k.weight"] = (c,)
        shapes[f"{block}.norm3.weight"] = shapes[f"{block}.norm3.bias"] = (c,)
        linear(f"{block}.ffn.0", ffn, c)
        linear(f"{block}.ffn.2", c, ffn)
        shapes[f"{block}.modulation"] = (1, 6, c)
        if camera:
            linear(f"{block}.cam_encoder", c, 12)
            linear(f"{block}.projector", c, c)
    return shapes


def fill(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def memory_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Tokenizers and one dense 2x2 merger under names that nobody knows."""
    c, channels = config.dim, config.in_channels
    shapes: dict[str, tuple[int, ...]] = {}
    for i, k in enumerate((2, 4, 8)):
        shapes[f"cond_embedders.{i}.proj.weight"] = (c, channels, 1, k, k)
        shapes[f"cond_embedders.{i}.proj.bias"] = (c,)
    shapes["downsampler.weight"], shapes["downsampler.bias"] = (c, c, 2, 2), (c,)
    return shapes


def write(path: Path, state: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(state, str(path))
    else:
        torch.save(state, path)
    return path


def diffusers_wan(**changes: int) -> Any:
    """diffusers' own model, of SMALL's shapes where not told otherwise."""
    from diffusers import WanTransformer3DModel

    names = ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim")
    names += ("in_channels", "out_channels", "text_dim", "freq_dim")
    torch.manual_seed(0)
    return WanTransformer3DModel(**{name: getattr(SMALL, name) for name in names} | changes)


@pytest.fixture
def small() -> TransformerConfig:
    return SMALL


@pytest.fixture
def wan() -> State:
    """A plain Wan text-to-video transformer under original names."""
    return fill(original_shapes(SMALL, camera=False))


@pytest.fixture
def recammaster() -> State:
    return fill(original_shapes(SMALL, camera=True))


@pytest.fixture
def memory() -> State:
    return fill(original_shapes(SMALL, camera=True) | memory_shapes(SMALL))


@pytest.fixture
def with_layers() -> Callable[[int], State]:
    """A memory checkpoint's base of another depth."""

    def make(num_layers: int) -> State:
        return fill(original_shapes(replace(SMALL, num_layers=num_layers), camera=True))

    return make


@pytest.fixture
def renamed() -> Callable[[str], str]:
    """BASE_MODELS 3.4 by its own words: substring replacements, one after the other."""
    return by_replacement
