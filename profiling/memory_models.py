"""A small model with an encoder of memory, after so many steps: what the studies of memory share.

`history_frames.py` and `memory_study.py` give the batches and say what is measured.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from memory_encoders import EncoderKind, MemoryEncoder, encoded, view_loss
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mv2v_engine.checkpoints import load_checkpoint
from mv2v_engine.checkpoints.load import Checkpoint
from mv2v_engine.config import HistoryConfig, TransformerConfig
from mv2v_engine.evaluation import bootstrap
from mv2v_engine.files import make_folder, save_json
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.history import HistoryEncoder, HistoryState
from mv2v_engine.sampling.flow_match import EulerSolver
from mv2v_engine.shapes import HistoryBranches
from mv2v_engine.testing import cpu_flops
from mv2v_engine.training.history import add_history, make_optimizer, prepare
from mv2v_engine.training.loop import LoopConfig, StepFn, TrainingLoop
from mv2v_engine.training.losses import Sampler, flow_loss, flow_step
from mv2v_engine.training.low_rank import merge_low_rank
from mv2v_engine.training.recipe import Batch

CPU, SAMPLING_STEPS = torch.device("cpu"), 8
# a full-size encoder's would be most of so small a model
CHANNELS, HEADS, RANK = (32, 64, 96, 128), 4, 32


def as_json(estimate: bootstrap.Estimate | None) -> dict[str, Any]:
    """The estimate as the result file has it."""
    assert estimate is not None
    ci = [estimate.low, estimate.high]
    return {"value": estimate.value, "ci": ci, "scenes": estimate.count}


def begin(work: Path, settings: dict[str, Any]) -> None:
    """Settings into the working folder, or the refusal of a folder that began with others."""
    path = work / "settings.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != settings:
        raise SystemExit(f"{work} began with other settings ({path}); give another --work")
    make_folder(work)
    save_json(path, settings)


def with_history(base: Checkpoint, rate: str) -> TransformerConfig:
    """The base's shape as plans of histories need it."""
    return replace(base.config, history=HistoryConfig(rates=(rate,)))


@dataclass(frozen=True, eq=False)
class Trained:
    """A model after training, with its own encoder where the transformer has none."""

    transformer: MV2VTransformer
    encoder: MemoryEncoder | None
    took: dict[str, Any]

    def given(self, batch: Batch) -> Batch:
        """The batch as the transformer takes it."""
        return batch if self.encoder is None else encoded(self.encoder, batch)[0]


def trained(args: argparse.Namespace, name: str, base: str, rate: str, sampler: Sampler) -> Trained:
    """A model after its steps, and what they took.

    name: "patches" for the base's own tokenizers, a history's branches, or an encoder of
    `memory_encoders`. args: work, steps, batch and learning_rate.
    """
    torch.manual_seed(0)
    checkpoint = load_checkpoint(base, device=CPU, dtype=torch.float32)
    model, encoder = checkpoint.transformer.train(), None
    if name in get_args(EncoderKind):
        plan = sampler.draw(torch.Generator()).plan
        frames, tokens = plan.target.grid[0], plan.segments[-1].length
        encoder = MemoryEncoder(model.config, cast(EncoderKind, name), tokens, frames).train()
    elif name != "patches":
        branches = cast(HistoryBranches, name)
        add_history(
            model, HistoryConfig(rates=(rate,), channels=CHANNELS, heads=HEADS, branches=branches)
        )
    parameters = prepare(model, RANK)
    own: nn.Module = encoder or (model.tokenizers if name == "patches" else model.history_encoders)
    if name == "patches":
        parameters += own.requires_grad_(True).parameters()
    model.gradient_checkpointing = False  # so few tokens fit
    whole: nn.Module = model
    step: StepFn = flow_step(model, sampler, CPU)
    if encoder is not None:
        whole = nn.ModuleDict({"transformer": model, "encoder": encoder})
        parameters += encoder.parameters()
        step = encoder_step(model, encoder, sampler)
    config = LoopConfig(
        out=args.work / name,
        max_steps=args.steps,
        warmup_steps=20,
        ema_decay=0.99,
        batch=args.batch,
        save_seconds=60,
    )
    loop = TrainingLoop(whole, [make_optimizer(parameters, args.learning_rate)], config)
    loop.run(step)
    whole.load_state_dict(loop.averaged())
    merge_low_rank(model)
    count = sum(p.numel() for n, p in own.named_parameters() if not n.startswith("reader"))
    took = {"encoder_parameters": count, "seconds_of_training": round(loop.elapsed, 1)}
    whole.eval()
    return Trained(model, encoder, took)


def encoder_step(model: MV2VTransformer, encoder: MemoryEncoder, sampler: Sampler) -> StepFn:
    """A step of the loop, as `flow_step` of the same generator, with the reader's error beside."""

    def step(generator: torch.Generator) -> dict[str, Tensor]:
        batch = sampler.draw(generator)
        given, state = encoded(encoder, batch)
        flow = flow_loss(model, given, generator, flow_shift=sampler.recipe.flow_shift, device=CPU)
        view = view_loss(encoder, batch, state)
        return {"loss": flow + view, "loss_joint": flow, "loss_view": view}

    return step


@torch.no_grad()
def asked_back(model: MV2VTransformer, batch: Batch, shift: float, seed: int) -> Tensor:
    """The frames [C, F, H, W] that a batch of one asks for, from noise."""
    solver = EulerSolver(SAMPLING_STEPS, shift)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch.targets.shape, generator=generator)
    for index, timestep in enumerate(solver.timesteps):
        noisy = x if batch.source is None else torch.cat([x, batch.source], 1)
        given = [noisy, *batch.latents[1:]]
        velocity = model(
            given, timestep[None].float(), batch.text, plan=batch.plan, cameras=batch.cameras
        )
        x = solver.step(velocity, index, x)
    return x[0]


@torch.no_grad()
def encoding(model: Trained, batch: Batch) -> dict[str, int]:
    """FLOPs of encoding all that a batch of one remembers, and the bytes that are kept of it, so
    that it is encoded once and another video can join it. Patches are made in the forward.
    """
    past, latents, transformer = batch.plan.segments[-1], batch.latents[-1], model.transformer
    if model.encoder is None and past.encoder != "history":
        return {"encode_flops": 0, "encoded_bytes": 0}
    with FlopCounterMode(display=False, custom_mapping=cpu_flops()) as counter:
        if model.encoder is None:
            encoder = cast(HistoryEncoder, transformer.history_encoders[past.rate])
            found = encoder.append(latents, transformer.patch_embedding, HistoryState())
            kept = [found[0].tokens, *found[2].past]
        else:
            kept = [encoded(model.encoder, batch)[1]]
    return {
        "encode_flops": counter.get_total_flops(),
        "encoded_bytes": sum(each.nbytes for each in kept),
    }
