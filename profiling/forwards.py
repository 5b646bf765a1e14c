"""Forwards of whole turns on random inputs: what several benchmarks time and count.

The embedded model, or the 1.3B shape with random weights: time does not depend on their values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mv2v_engine.checkpoints import load_checkpoint
from mv2v_engine.config import WAN_1_3B, SamplingConfig
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.kept import ConditioningCache
from mv2v_engine.ops.backend import resolve
from mv2v_engine.tokens.flops import flop_table, kept_flop_table
from mv2v_engine.tokens.plan import TokenPlan, novel_view_plan

# how memory is tokenized and conditioned; "static" is one step over kept K and V
KINDS: dict[str, dict[str, Any]] = {
    "uniform": {"tokenizers": "uniform", "merge": "off"},
    "dynamic": {"merge": "off"},
    "merged": {"merge": "conv"},
    "static": {"merge": "off", "conditioning": "static"},
}


@dataclass(frozen=True, eq=False)
class Setting:
    """A transformer on its device, and what its turns are like."""

    name: str
    transformer: MV2VTransformer
    sampling: SamplingConfig

    @property
    def device(self) -> torch.device:
        return self.transformer.patch_embedding.weight.device

    def plan(self, kind: str, memory: int) -> TokenPlan:
        sampling = self.sampling
        return novel_view_plan(
            memory=memory,
            frames=sampling.num_frames,
            size=sampling.size,
            shape=self.transformer.config,
            **KINDS[kind],
        )


def chosen(device: torch.device, model: str | None) -> Setting:
    """The model of this name, or the one that suits the device."""
    if (model or ("full" if device.type == "cuda" else "tiny")) == "tiny":
        return embedded(device)
    if device.type != "cuda":
        raise SystemExit("the full-size model needs --device cuda; on a CPU use --model tiny")
    return full_size(device)


def embedded(device: torch.device) -> Setting:
    """`tiny-nvs`: float32 on a CPU, bfloat16 on CUDA."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    checkpoint = load_checkpoint("tiny-nvs", device=device, dtype=dtype)
    checkpoint.transformer.set_backend(resolve("auto", device))
    return Setting("tiny-nvs", checkpoint.transformer, checkpoint.sampling)


def full_size(device: torch.device) -> Setting:
    """Random weights of the 1.3B shape, bfloat16."""
    with torch.device(device):
        model = MV2VTransformer(WAN_1_3B)
    half_precision(model).eval().requires_grad_(False)
    model.set_backend(resolve("auto", device))
    return Setting("1.3B, random weights", model, SamplingConfig())


def half_precision(module: nn.Module) -> nn.Module:
    """bfloat16 but for what the transformer keeps in float32."""
    module.to(torch.bfloat16)
    for name, parameter in module.named_parameters():
        if any(kept in name for kept in MV2VTransformer.keep_in_fp32_modules):
            parameter.data = parameter.data.float()
    return module


class Inputs:
    """Random inputs of a plan, the same in every run; `first` and `later` are its forwards."""

    def __init__(self, setting: Setting, plan: TokenPlan) -> None:
        model, shape = setting.transformer, plan.shape
        generator = torch.Generator(setting.device).manual_seed(0)

        def new(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=setting.device)

        self.model, self.plan = model, plan
        dtype = model.patch_embedding.weight.dtype
        self.latents = [new(1, shape.in_channels, *segment.grid) for segment in plan.segments]
        self.text = new(1, shape.text_len, shape.text_dim).to(dtype)
        self.cameras = None
        if shape.has_camera:
            self.cameras = new(1, len(plan.segments), plan.target.num_frames, 12)
        self.timestep = torch.full((1,), 500.0, device=setting.device)
        self.kept: ConditioningCache | None = None

    def first(self) -> Tensor:
        """The whole plan's forward; with static conditioning it keeps K and V as it goes."""
        kept = ConditioningCache(self.plan) if self.plan.conditioning == "static" else None
        velocity: Tensor = self.model(
            self.latents,
            self.timestep,
            self.text,
            plan=self.plan,
            cameras=self.cameras,
            kept=kept,
        )
        self.kept = kept
        return velocity

    def later(self) -> Tensor:
        """What every step after the first runs: the target alone, where K and V are kept."""
        if self.plan.conditioning == "joint":
            return self.first()
        if self.kept is None:
            self.first()
        assert self.kept is not None
        velocity: Tensor = self.model(
            self.latents[:1], self.timestep, self.text, plan=self.plan, kept=self.kept
        )
        return velocity


def flops(plan: TokenPlan, *, later: bool) -> int:
    """The FLOPs of the first forward of a turn, or of each later one."""
    table = kept_flop_table if later and plan.conditioning == "static" else flop_table
    return sum(table(plan).values())


def attention_flops(plan: TokenPlan, *, later: bool) -> int:
    """The part of `flops` that is softmax(q k) v; all the rest are products with weights."""
    shape, target = plan.shape, plan.target.length
    total = 0
    for length in plan.lengths_by_block():
        if plan.conditioning == "joint":
            pairs = length * (length + shape.text_len)
        else:
            pairs = target * (length + shape.text_len)
            pairs += 0 if later else (length - target) ** 2
        total += 4 * pairs * shape.dim
    return total
