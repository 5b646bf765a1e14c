"""ReDirector's two files, small: its trained tensors, and the Wan-Fun base that they lie on."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mv2v_engine.config import TransformerConfig
from tests.checkpoints.conftest import SMALL, State, original_shapes

# three blocks of two heads of 128; the base takes 16 channels more, a first frame's
SHAPE: TransformerConfig = replace(
    SMALL,
    num_attention_heads=2,
    in_channels=16,
    out_channels=16,
    text_dim=16,
    camera_attention="phases",
    shared_time=True,
    image_dim=80,
)
# 42 of a head's 64 pairs of channels
PHASES = 2 * 42


def _filled(shapes: dict[str, tuple[int, ...]], seed: int) -> State:
    """Norms around one, matrices that keep the size of what they are given."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        is_norm = name.endswith("weight") and len(shape) == 1
        size = 0.2 if len(shape) < 2 or "modulation" in name else noise[0].numel() ** -0.5
        state[name] = size * noise + is_norm
    return state


def base_state(config: TransformerConfig = SHAPE) -> State:
    """`Wan2.1-Fun-V1.1-1.3B-Control-Camera` under its own keys."""
    c, image = config.dim, config.image_dim
    wide = replace(config, in_channels=32, source_channels=16)
    shapes = original_shapes(wide, camera=False)

    def linear(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    linear("img_emb.proj.0", image)
    linear("img_emb.proj.1", image, image)
    linear("img_emb.proj.3", c, image)
    linear("img_emb.proj.4", c)
    for n in range(config.num_layers):
        attention = f"blocks.{n}.cross_attn"
        linear(f"{attention}.k_img", c, c)
        linear(f"{attention}.v_img", c, c)
        shapes[f"{attention}.norm_k_img.weight"] = (c,)
    linear("control_adapter.conv", c, 24 * 64, 2, 2)
    for name in ("conv1", "conv2"):
        linear(f"control_adapter.residual_blocks.0.{name}", c, c, 3, 3)
    return _filled(shapes, 1)


def trained_state(config: TransformerConfig = SHAPE) -> State:
    """`step20000.safetensors`: self-attention whole, and two layers of phases beside it."""
    c = config.dim
    shapes: dict[str, tuple[int, ...]] = {}
    for n in range(config.num_layers):
        attention = f"blocks.{n}.self_attn"
        for p in "qkvo":
            shapes[f"{attention}.{p}.weight"], shapes[f"{attention}.{p}.bias"] = (c, c), (c,)
        shapes[f"{attention}.norm_q.weight"] = shapes[f"{attention}.norm_k.weight"] = (c,)
        for kind in ("qk", "vo"):
            shapes[f"{attention}.rope_phase_{kind}.1.weight"] = (PHASES, c)
    return _filled(shapes, 2)
