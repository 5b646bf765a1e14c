"""Small random models and inputs that fit a plan, the same each time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mv2v_engine.config import TransformerConfig
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.testing import as_cameras, randomise
from mv2v_engine.tokens.plan import TokenPlan

Inputs = tuple[list[Tensor], Tensor, Tensor, Tensor | None]


def random_model(config: TransformerConfig, *, seed: int = 0) -> MV2VTransformer:
    model = MV2VTransformer(config).eval().requires_grad_(False)
    randomise(model, seed=seed)
    return model


def in_diffusers_words(config: TransformerConfig) -> dict[str, Any]:
    """What its `WanTransformer3DModel` of the same shape is made of."""
    same = ("num_attention_heads", "attention_head_dim", "out_channels", "text_dim", "freq_dim")
    same += ("ffn_dim", "num_layers", "eps")
    return {name: getattr(config, name) for name in same} | {"rope_max_seq_len": 64}


def random_inputs(plan: TokenPlan, batch: int = 1, seed: int = 0) -> Inputs:
    """Latents, timestep, text, and cameras with a track more than the plan has videos."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    latents = [draw(batch, plan.shape.channels_of(s.role), *s.grid) for s in plan.segments]
    text = draw(batch, plan.shape.text_len, plan.shape.text_dim)
    # drawn in any case, so that the timestep is the same with cameras and without
    drawn = draw(batch, len(plan.segments) + 1, plan.target.num_frames, 12)
    cameras = as_cameras(drawn, plan.shape) if plan.shape.has_camera else None
    timestep = 100 + 800 * torch.rand(batch, generator=generator)
    return latents, timestep, text, cameras
