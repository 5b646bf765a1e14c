"""Can frames be asked back from a history? PSNR of frames, by what encodes the history.

`python profiling/history_frames.py --edits LATENTS [LATENTS ...] --work runs/history
[--steps 600] [--out profiling/results/history_frames.json]`

Stage 1 of `mv2v_engine.training.history` on tiny-edit, for both branches of TinyHistory's encoder,
each of them alone, and one large trained patch embedding (the base's kernel repeated). Frames of
held-out clips are asked back from noise.

All encoders begin with the same weights of the model, and have the same batches and as many tokens.
Frames are compared, decoded, with the true latents decoded. "no history" is the first encoder's
model with latents of zeros. Intervals are bootstraps over clips, of one training each. A run that
was cut off goes on where it stood.
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
from memory_models import (
    CHANNELS,
    CPU,
    RANK,
    SAMPLING_STEPS,
    as_json,
    asked_back,
    begin,
    encoding,
    trained,
    with_history,
)
from torch import Tensor

from mv2v_engine.checkpoints import load_checkpoint
from mv2v_engine.checkpoints.load import Checkpoint
from mv2v_engine.evaluation import bootstrap
from mv2v_engine.files import save_json
from mv2v_engine.training.edit_latents import EditLatents, EncodedPair
from mv2v_engine.training.finetune import empty_text
from mv2v_engine.training.history import HistoryRecipe, HistorySampler
from mv2v_engine.training.recipe import Batch
from mv2v_engine.vae import VideoVAE, load_vae

BASE = "tiny-edit"
# the first is what the others are compared with
ENCODERS = ("both", "kernel", "lr", "hr")


@dataclass(frozen=True, eq=False)
class Case:
    """A batch of one that asks for frames; `clip` [C, F, H, W] is the true video around them, of
    which they are the frames `asked`.
    """

    batch: Batch
    clip: Tensor
    asked: Sequence[int]


class EditStudy:
    """Frames of edited clips, which stage 1 asks for."""

    def __init__(self, args: argparse.Namespace, base: Checkpoint) -> None:
        self._latents = EditLatents(*args.edits, frames=args.frames)
        self._args, self._base, self.window = args, base, args.frames
        self.count = len(self._latents)
        self.sampler = self._sampler(self._latents.pairs[: -args.held_out], args.batch)

    def _sampler(self, pairs: Sequence[EncodedPair], batch: int) -> HistorySampler:
        latents, args = copy(self._latents), self._args
        latents.pairs = tuple(pairs)
        text = empty_text(self._base, None)
        assert text is not None
        recipe = HistoryRecipe(
            batch=batch,
            max_memory=args.windows,
            static_conditioning=0.0,
            flow_shift=self._base.sampling.flow_shift,
            rate=args.rate,
        )
        shape = with_history(self._base, args.rate)
        return HistorySampler(latents, shape, recipe, empty_text=text)

    def cases(self) -> list[Case]:
        """One of each held-out clip."""
        pairs = self._latents.pairs[-self._args.held_out :]
        return [self._case(pair, 10**6 + number) for number, pair in enumerate(pairs)]

    def _case(self, pair: EncodedPair, seed: int) -> Case:
        batch = self._sampler([pair], 1).draw(torch.Generator().manual_seed(seed))
        segments, length = batch.plan.segments, batch.latents[1].shape[2]
        asked = [tau - segments[1].tau for tau in batch.plan.target.taus]
        for windows in (pair.source, pair.edited):
            frames = windows.float().transpose(0, 1).flatten(1, 2)
            for first in range(0, frames.shape[1] - length + 1, windows.shape[2]):
                history = frames[:, first : first + length]
                if torch.equal(history[:, asked], batch.targets[0]):
                    return Case(batch, history, asked)
        raise AssertionError("the frames that are asked for are none of the clip's")


def vae_of(base: Checkpoint) -> VideoVAE:
    """The embedded base's own."""
    assert base.vae_path is not None
    return load_vae(base.vae_path, device=CPU, dtype=torch.float32)


@torch.no_grad()
def shown(vae: VideoVAE, case: Case, window: int, latents: Tensor) -> Tensor:
    """Pixels [T, height, width, 3] of the frames that were asked for as `latents` has them, each
    decoded within its own window, whose other frames are the true ones."""
    clip, asked = case.clip.clone(), list(case.asked)
    clip[:, asked] = latents
    pixels = []
    for number in sorted({place // window for place in asked}):
        first = number * window
        decoded = vae.decode(clip[:, first : first + window]).float() / 255
        of_window = [place - first for place in asked if place // window == number]
        pixels += [decoded[frames_of(place)] for place in of_window]
    return torch.cat(pixels)


def frames_of(place: int) -> slice:
    """The video's frames that a latent one stands for."""
    return slice(0, 1) if place == 0 else slice(4 * place - 3, 4 * place + 1)


def decibels(found: Tensor, true: Tensor) -> float:
    """PSNR of pixels [T, height, width, 3] of 0..1."""
    return float(-10 * (found - true).pow(2).mean().clamp_min(1e-8).log10())


def measured(
    args: argparse.Namespace,
    name: str,
    study: EditStudy,
    cases: list[Case],
    truth: list[Tensor],
    base: Checkpoint,
) -> dict[str, Any]:
    """Decibels of every case by row, and what the training took; kept in the working folder."""
    path = args.work / name / "psnr.json"
    if path.exists():
        return cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
    model = trained(args, name, BASE, args.rate, study.sampler)
    vae, shift = vae_of(base), base.sampling.flow_shift
    values: dict[str, list[float]] = {}
    for row in (name, "no history") if name == ENCODERS[0] else (name,):
        for number, (one, true) in enumerate(zip(cases, truth, strict=True)):
            given = one.batch
            if row == "no history":
                given = replace(given, latents=[given.latents[0], 0 * given.latents[1]])
            found = asked_back(model.transformer, given, shift, number)
            values.setdefault(row, []).append(decibels(shown(vae, one, study.window, found), true))
    took = {**model.took, **encoding(model, cases[0].batch)}
    save_json(path, {"values": values, "took": took})
    return {"values": values, "took": took}


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
    study = EditStudy(args, base)
    names = ["steps", "rate", "batch", "learning_rate", "held_out", "frames", "windows"]
    settings = {name: getattr(args, name) for name in names} | {"clips": study.count}
    begin(args.work, settings)
    cases, vae = study.cases(), vae_of(base)
    truth = [shown(vae, one, study.window, one.batch.targets[0]) for one in cases]
    tokens = [one.batch.plan.segments[1].length for one in cases]
    options = " ".join(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in names)
    values: dict[str, list[float]] = {}
    rows: dict[str, Any] = {}
    for encoder in ENCODERS:
        found = measured(args, encoder, study, cases, truth, base)
        for name, own in found["values"].items():
            values[name] = own
            rows[name] = {"psnr": as_json(bootstrap.mean(own)), **found["took"]}
            if name != ENCODERS[0]:
                over = bootstrap.difference(values[ENCODERS[0]], own)
                rows[name][f"{ENCODERS[0]}_over_it"] = as_json(over)
            print(name, rows[name])
        if args.out is not None:
            record = {
                "command": f"python profiling/history_frames.py --edits LATENTS {options}",
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
