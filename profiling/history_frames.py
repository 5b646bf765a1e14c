"""Can frames be asked back from a history? PSNR of random frames, by what encodes the history.

`python profiling/history_frames.py --edits LATENTS --work runs/history [--steps 150]
[--out profiling/results/history_frames.json]`

Stage 1 of `mv2v_engine.training.history` on tiny-edit, from the same weights, with the same
batches and as many tokens, for both branches of TinyHistory's encoder, each of them alone, and one
large trained patch embedding (the base's kernel repeated). Clips of the end of the folder are held
out; frames of theirs are asked back from noise and compared, decoded, with the true latents
decoded. "no history" is the both-branch model with latents of zeros. Intervals are bootstraps over
clips. A training that was cut off goes on.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import provenance
from torch import Tensor

from mv2v_engine.checkpoints import load_checkpoint
from mv2v_engine.config import HistoryConfig
from mv2v_engine.evaluation import bootstrap
from mv2v_engine.files import save_json
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.sampling.flow_match import EulerSolver
from mv2v_engine.training.edit_latents import EditLatents
from mv2v_engine.training.finetune import empty_text
from mv2v_engine.training.history import (
    HistoryRecipe,
    HistorySampler,
    add_history,
    make_optimizer,
    merge_low_rank,
    prepare,
)
from mv2v_engine.training.loop import LoopConfig, TrainingLoop
from mv2v_engine.training.losses import flow_step
from mv2v_engine.training.recipe import Batch
from mv2v_engine.vae import VideoVAE, load_vae

BASE, BRANCHES, CPU = "tiny-edit", ("both", "hr", "lr", "kernel"), torch.device("cpu")
# a full-size encoder's would be most of so small a model
CHANNELS, HEADS, RANK = (32, 64, 96, 128), 4, 32
SAMPLING_STEPS = 8


def vars_of(estimate: bootstrap.Estimate) -> dict[str, Any]:
    """The estimate as the result file has it."""
    ci = [estimate.low, estimate.high]
    return {"value": estimate.value, "ci": ci, "scenes": estimate.count}


def samplers(args: argparse.Namespace, base: Any) -> tuple[HistorySampler, HistorySampler]:
    """Samplers of the clips that are trained on, and of those held out, a clip a draw."""
    found = []
    text = empty_text(base, None)
    assert text is not None
    recipe = HistoryRecipe(
        batch=args.batch,
        max_memory=args.windows,
        static_conditioning=0.0,
        flow_shift=base.sampling.flow_shift,
        rate=args.rate,
    )
    shape = replace(base.config, history=HistoryConfig(rates=(args.rate,)))
    for part, batch in ((slice(-args.held_out), args.batch), (slice(-args.held_out, None), 1)):
        latents = EditLatents(args.edits, frames=args.frames)
        latents.pairs = latents.pairs[part]
        own = replace(recipe, batch=batch)
        found.append(HistorySampler(latents, shape, own, empty_text=text))
    return found[0], found[1]


def trained(args: argparse.Namespace, branches: Any, sampler: HistorySampler) -> dict[str, Any]:
    """A model after stage 1, its parameters, and what it took."""
    torch.manual_seed(0)
    model = load_checkpoint(BASE, device=CPU, dtype=torch.float32).transformer.train()
    history = HistoryConfig(rates=(args.rate,), channels=CHANNELS, heads=HEADS, branches=branches)
    add_history(model, history)
    parameters = prepare(model, RANK)
    model.gradient_checkpointing = False  # so few tokens fit
    config = LoopConfig(
        out=args.work / f"{branches}_{args.rate}",
        max_steps=args.steps,
        warmup_steps=20,
        ema_decay=0.98,
        batch=args.batch,
        save_seconds=60,
    )
    loop = TrainingLoop(model, [make_optimizer(parameters, args.learning_rate)], config)
    began = time.process_time()
    loop.run(flow_step(model, sampler, CPU))
    model.load_state_dict(loop.averaged())
    merge_low_rank(model)
    count = sum(p.numel() for p in model.history_encoders.parameters())
    seconds = round(time.process_time() - began, 1)
    return {"model": model.eval(), "encoder_parameters": count, "cpu_seconds": seconds}


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


def psnr(vae: VideoVAE, found: Tensor, batch: Batch, frames: int) -> float:
    """Decibels of the frames that were asked for, each decoded within its own true window.

    The batch's history is masked but for these frames, so that its other frames of their windows
    are noise: both sides are decoded with the same.
    """
    history, first = batch.latents[1][0], batch.plan.segments[1].tau
    asked = [tau - first for tau in batch.plan.target.taus]
    errors = []
    for window in sorted({number // frames for number in asked}):
        true = history[:, window * frames : (window + 1) * frames].clone()
        other = true.clone()
        places = [n - window * frames for n in asked if n // frames == window]
        for place in places:
            other[:, place] = found[:, asked.index(window * frames + place)]
        one, two = (vae.decode(latents).float() / 255 for latents in (true, other))
        for place in places:
            rows = slice(0, 1) if place == 0 else slice(4 * place - 3, 4 * place + 1)
            errors.append((one[rows] - two[rows]).pow(2).mean())
    return float(-10 * torch.stack(errors).mean().clamp_min(1e-8).log10())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--edits", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where trainings lie")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rate", default="2x2x2")
    parser.add_argument("--frames", type=int, default=2, help="latent frames of a window")
    parser.add_argument("--windows", type=int, default=6, help="of a history, at most")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--held-out", type=int, default=40, help="clips")
    parser.add_argument("--measured", type=int, default=24, help="of the held-out clips")
    parser.add_argument("--branches", nargs="+", default=BRANCHES)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = load_checkpoint(BASE, device=CPU, dtype=torch.float32)
    training, held_out = samplers(args, base)
    assert base.vae_path is not None
    vae = load_vae(base.vae_path, device=CPU, dtype=torch.float32)
    batches = [
        held_out.draw(torch.Generator().manual_seed(10**6 + clip)) for clip in range(args.measured)
    ]
    values: dict[str, list[float | None]] = {}
    rows: dict[str, Any] = {}
    for branches in args.branches:
        made = trained(args, branches, training)
        cases = {branches: batches}
        if branches == "both":
            cases["no history"] = [
                replace(b, latents=[b.latents[0], torch.zeros_like(b.latents[1])]) for b in batches
            ]
        for name, given in cases.items():
            values[name] = [
                psnr(
                    vae,
                    asked_back(made["model"], one, base.sampling.flow_shift, n),
                    true,
                    args.frames,
                )
                for n, (one, true) in enumerate(zip(given, batches, strict=True))
            ]
            estimate = bootstrap.mean(values[name])
            assert estimate is not None
            rows[name] = {
                "psnr": vars_of(estimate),
                "encoder_parameters": made["encoder_parameters"],
                "cpu_seconds_of_training": made["cpu_seconds"],
            }
            print(f"{name:12s} {estimate.value:.2f} dB [{estimate.low:.2f}, {estimate.high:.2f}]")
        for other in values:
            gains = [a - b for a, b in zip(values["both"], values[other], strict=True)]
            found = bootstrap.mean(gains) if other != "both" else None
            if found is not None:
                rows[other]["both_over_it"] = vars_of(found)
        if args.out is not None:
            tokens = [b.plan.segments[1].length for b in batches]
            settings = {n: str(v) if isinstance(v, Path) else v for n, v in vars(args).items()}
            del settings["edits"], settings["work"], settings["out"]
            save_json(
                args.out,
                {
                    "command": "python profiling/history_frames.py",
                    **settings,
                    "base": BASE,
                    "channels": CHANNELS,
                    "rank": RANK,
                    "sampling_steps": SAMPLING_STEPS,
                    "history_tokens": [min(tokens), max(tokens)],
                    "rows": rows,
                    **provenance(CPU),
                },
            )


if __name__ == "__main__":
    main()
