"""Can frames be asked back from a history? PSNR of random frames, by what encodes the history.

`python profiling/history_frames.py --edits LATENTS [LATENTS ...] --work runs/history
[--steps 600] [--out profiling/results/history_frames.json]`

Stage 1 of `mv2v_engine.training.history` on tiny-edit, from the same weights, with the same
batches and as many tokens, for both branches of TinyHistory's encoder, each of them alone, and one
large trained patch embedding (the base's kernel repeated). The last clips are held out; frames of
each are asked back from noise and compared, decoded, with the true latents decoded. "no history" is
the both-branch model with latents of zeros. Intervals are bootstraps over clips, of one training
each. A step takes 0.4 s of a core, a measured clip half a second: with the settings' own values 20
minutes in all. A run that was cut off goes on where it stood.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from measure import provenance
from torch import Tensor

from mv2v_engine.checkpoints import load_checkpoint
from mv2v_engine.config import HistoryConfig
from mv2v_engine.evaluation import bootstrap
from mv2v_engine.files import make_folder, save_json
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.sampling.flow_match import EulerSolver
from mv2v_engine.training.edit_latents import EditLatents, EncodedPair
from mv2v_engine.training.finetune import empty_text
from mv2v_engine.training.history import (
    HistoryRecipe,
    HistorySampler,
    add_history,
    make_optimizer,
    prepare,
)
from mv2v_engine.training.loop import LoopConfig, TrainingLoop
from mv2v_engine.training.losses import flow_step
from mv2v_engine.training.low_rank import merge_low_rank
from mv2v_engine.training.recipe import Batch
from mv2v_engine.vae import VideoVAE, load_vae

BASE, BRANCHES, CPU = "tiny-edit", ("both", "hr", "lr", "kernel"), torch.device("cpu")
# a full-size encoder's would be most of so small a model
CHANNELS, HEADS, RANK = (32, 64, 96, 128), 4, 32
SAMPLING_STEPS = 8


def as_json(estimate: bootstrap.Estimate | None) -> dict[str, Any]:
    """The estimate as the result file has it."""
    assert estimate is not None
    ci = [estimate.low, estimate.high]
    return {"value": estimate.value, "ci": ci, "scenes": estimate.count}


@dataclass(frozen=True, eq=False)
class Case:
    """A batch of one that asks a held-out clip for frames, and the clip's true history."""

    batch: Batch
    history: Tensor

    @property
    def asked(self) -> list[int]:
        """Numbers of the frames that are asked for, from the history's first."""
        segments = self.batch.plan.segments
        return [tau - segments[1].tau for tau in self.batch.plan.target.taus]


def sampler_of(args: argparse.Namespace, base: Any, latents: EditLatents, batch: int) -> Any:
    """Draws stage 1's batches."""
    text = empty_text(base, None)
    assert text is not None
    recipe = HistoryRecipe(
        batch=batch,
        max_memory=args.windows,
        static_conditioning=0.0,
        flow_shift=base.sampling.flow_shift,
        rate=args.rate,
    )
    shape = replace(base.config, history=HistoryConfig(rates=(args.rate,)))
    return HistorySampler(latents, shape, recipe, empty_text=text)


def some(latents: EditLatents, pairs: Sequence[EncodedPair]) -> EditLatents:
    """A few of the clips."""
    chosen = copy(latents)
    chosen.pairs = tuple(pairs)
    return chosen


def case(sampler: Any, seed: int) -> Case:
    """A case of the sampler's only clip."""
    batch = sampler.draw(torch.Generator().manual_seed(seed))
    (pair,), length = sampler.latents.pairs, batch.latents[1].shape[2]
    made = Case(batch, batch.latents[1][0])
    for windows in (pair.source, pair.edited):
        frames = windows.float().transpose(0, 1).flatten(1, 2)
        for first in range(0, frames.shape[1] - length + 1, windows.shape[2]):
            history = frames[:, first : first + length]
            if torch.equal(history[:, made.asked], batch.targets[0]):
                return Case(batch, history)
    raise AssertionError("the frames that are asked for are none of the clip's")


def trained(args: argparse.Namespace, branches: Any, sampler: Any) -> tuple[MV2VTransformer, Any]:
    """A model after stage 1, and what it took."""
    torch.manual_seed(0)
    model = load_checkpoint(BASE, device=CPU, dtype=torch.float32).transformer.train()
    history = HistoryConfig(rates=(args.rate,), channels=CHANNELS, heads=HEADS, branches=branches)
    add_history(model, history)
    parameters = prepare(model, RANK)
    model.gradient_checkpointing = False  # so few tokens fit
    config = LoopConfig(
        out=args.work / branches,
        max_steps=args.steps,
        warmup_steps=20,
        ema_decay=0.99,
        batch=args.batch,
        save_seconds=60,
    )
    loop = TrainingLoop(model, [make_optimizer(parameters, args.learning_rate)], config)
    loop.run(flow_step(model, sampler, CPU))
    model.load_state_dict(loop.averaged())
    merge_low_rank(model)
    count = sum(p.numel() for p in model.history_encoders.parameters())
    took = {"encoder_parameters": count, "seconds_of_training": round(loop.elapsed, 1)}
    return model.eval(), took


@torch.no_grad()
def asked_back(model: MV2VTransformer, batch: Batch, shift: float, seed: int) -> Tensor:
    """The frames [C, F, H, W] that a batch of one asks for, from noise."""
    solver = EulerSolver(SAMPLING_STEPS, shift)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch.targets.shape, generator=generator)
    for index, timestep in enumerate(solver.timesteps):
        noisy = x if batch.source is None else torch.cat([x, batch.source], 1)
        given = [noisy, *batch.latents[1:]]
        velocity = model(given, timestep[None].float(), batch.text, plan=batch.plan)
        x = solver.step(velocity, index, x)
    return x[0]


@torch.no_grad()
def shown(vae: VideoVAE, case: Case, frames: int, latents: Tensor) -> list[Tensor]:
    """Pixels of the frames that were asked for as `latents` has them, each decoded within its own
    window, whose other frames are the true ones."""
    history, asked = case.history.clone(), case.asked
    history[:, asked] = latents
    pixels = []
    for window in sorted({number // frames for number in asked}):
        first = window * frames
        decoded = vae.decode(history[:, first : first + frames]).float() / 255
        for place in (number - first for number in asked if number // frames == window):
            rows = slice(0, 1) if place == 0 else slice(4 * place - 3, 4 * place + 1)
            pixels.append(decoded[rows])
    return pixels


def measured(
    args: argparse.Namespace, branches: str, sampler: Any, cases: list[Case], base: Any
) -> dict[str, Any]:
    """Decibels of every case by row, and what the training took; kept in the working folder."""
    path = args.work / branches / "psnr.json"
    if path.exists():
        return cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
    model, took = trained(args, branches, sampler)
    vae = load_vae(base.vae_path, device=CPU, dtype=torch.float32)
    values: dict[str, list[float]] = {}
    for name in (branches, "no history")[: 1 + (branches == "both")]:
        values[name] = []
        for number, one in enumerate(cases):
            given = one.batch
            if name != branches:
                history = torch.zeros_like(given.latents[1])
                given = replace(given, latents=[given.latents[0], history])
            found = asked_back(model, given, base.sampling.flow_shift, number)
            true = shown(vae, one, args.frames, one.batch.targets[0])
            pixels = shown(vae, one, args.frames, found)
            errors = [(a - b).pow(2).mean() for a, b in zip(pixels, true, strict=True)]
            error = torch.stack(errors).mean().clamp_min(1e-8)
            values[name].append(float(-10 * error.log10()))
    save_json(path, {"values": values, "took": took})
    return {"values": values, "took": took}


def begin(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Settings into the working folder, or the refusal of a folder that began with others."""
    path = args.work / "settings.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != settings:
        raise SystemExit(f"{args.work} began with other settings ({path}); give another --work")
    make_folder(args.work)
    save_json(path, settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--edits", type=Path, nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True, help="where trainings lie")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rate", default="2x2x2")
    parser.add_argument("--frames", type=int, default=2, help="latent frames of a window")
    parser.add_argument("--windows", type=int, default=6, help="of a history, at most")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--held-out", type=int, default=40, help="clips")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = load_checkpoint(BASE, device=CPU, dtype=torch.float32)
    latents = EditLatents(*args.edits, frames=args.frames)
    names = ("steps", "rate", "frames", "windows", "batch", "learning_rate", "held_out")
    settings = {name: getattr(args, name) for name in names} | {"clips": len(latents)}
    begin(args, settings)
    known, held_out = latents.pairs[: -args.held_out], latents.pairs[-args.held_out :]
    training = sampler_of(args, base, some(latents, known), args.batch)
    cases = [
        case(sampler_of(args, base, some(latents, [pair]), 1), 10**6 + number)
        for number, pair in enumerate(held_out)
    ]
    tokens = [one.batch.plan.segments[1].length for one in cases]
    values: dict[str, list[float]] = {}
    rows: dict[str, Any] = {}
    for branches in BRANCHES:
        found = measured(args, branches, training, cases, base)
        values |= found["values"]
        for name in found["values"]:
            rows[name] = {"psnr": as_json(bootstrap.mean(values[name])), **found["took"]}
            if name != "both":
                gains = [a - b for a, b in zip(values["both"], values[name], strict=True)]
                rows[name]["both_over_it"] = as_json(bootstrap.mean(gains))
            print(name, rows[name])
        if args.out is not None:
            record = {
                "command": "python profiling/history_frames.py",
                **settings,
                "base": BASE,
                "channels": CHANNELS,
                "rank": RANK,
                "sampling_steps": SAMPLING_STEPS,
                "history_tokens": [min(tokens), max(tokens)],
                "rows": rows,
                **provenance(CPU),
            }
            save_json(args.out, record)


if __name__ == "__main__":
    main()
