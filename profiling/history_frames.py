"""Can frames be asked back from a history? PSNR of frames, by what encodes the history.

`python profiling/history_frames.py --edits LATENTS [LATENTS ...] --work runs/history
[--steps 600] [--out profiling/results/history_frames.json]`
`python profiling/history_frames.py --latents LATENTS [LATENTS ...] --work runs/encoders
[--steps 600] [--out profiling/results/memory_encoders.json] [--picture docs/memory_encoders.png]`

Of edits: stage 1 of `mv2v_engine.training.history` on tiny-edit, for both branches of TinyHistory's
encoder, each of them alone, and one large trained patch embedding (the base's kernel repeated).
Frames of held-out clips are asked back from noise. Of novel views: stage 2 on tiny-nvs, without a
source, for that embedding, which are the VAE's latents as tokens, both branches, and the two
encoders of `memory_encoders`. Another camera's frames of held-out worlds are asked for, and judged
where the remembered videos show what it sees, by true depth ("psnr"), and everywhere
("psnr_everywhere"); the worlds are those of `training.latents --worlds`.

All encoders of a study begin with the same weights of the model, and have the same batches and as
many tokens. Frames are compared, decoded, with the true latents decoded. "no history" is the first
encoder's model with latents of zeros. Intervals are bootstraps over clips or worlds, of one
training each. A run that was cut off goes on where it stood.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from measure import provenance
from memory_encoders import EncoderKind, MemoryEncoder, encoded, view_loss
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mv2v_engine.camera.poses import pose_vectors
from mv2v_engine.checkpoints import load_checkpoint
from mv2v_engine.checkpoints.load import Checkpoint
from mv2v_engine.config import HistoryConfig, TransformerConfig
from mv2v_engine.evaluation import bootstrap
from mv2v_engine.evaluation.figures import save_figure
from mv2v_engine.evaluation.visibility import project
from mv2v_engine.files import make_folder, save_json, save_tensors
from mv2v_engine.models.camera_encoder import POSE_DIM
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.history import HistoryEncoder, HistoryState
from mv2v_engine.sampling.flow_match import EulerSolver
from mv2v_engine.shapes import HistoryBranches
from mv2v_engine.synthetic.cameras import scene_cameras
from mv2v_engine.synthetic.render import render
from mv2v_engine.synthetic.worlds import Grade, make_world
from mv2v_engine.testing import cpu_flops
from mv2v_engine.tokens.flops import flop_table
from mv2v_engine.training.edit_latents import EditLatents, EncodedPair
from mv2v_engine.training.finetune import empty_text
from mv2v_engine.training.history import (
    HistoryRecipe,
    HistorySampler,
    ViewHistorySampler,
    add_history,
    make_optimizer,
    prepare,
)
from mv2v_engine.training.latents import LatentCache
from mv2v_engine.training.loop import LoopConfig, StepFn, TrainingLoop
from mv2v_engine.training.losses import flow_loss, flow_step
from mv2v_engine.training.low_rank import merge_low_rank
from mv2v_engine.training.recipe import Batch, Tracks
from mv2v_engine.training.stored import stored_in
from mv2v_engine.vae import VideoVAE, load_vae

EDITS, VIEWS, CPU = "tiny-edit", "tiny-nvs", torch.device("cpu")
# of each study; the first is what the others are compared with
BRANCHES, ENCODERS = ("both", "kernel", "lr", "hr"), ("kernel", "both", "state", "view")
# a full-size encoder's would be most of so small a model
CHANNELS, HEADS, RANK = (32, 64, 96, 128), 4, 32
SAMPLING_STEPS = 8
# videos that a view remembers, and the latent frames of each: the first ones are alike, since all
# cameras of a world begin at one place
REMEMBERED, FRAMES = 3, (2, 4)
SHOWN = 3  # worlds of the picture
LABELS = {
    "kernel": "the VAE's latents as tokens",
    "both": "TinyHistory",
    "state": "a recurrent state",
    "view": "a latent of views",
}


def as_json(estimate: bootstrap.Estimate | None) -> dict[str, Any]:
    """The estimate as the result file has it."""
    assert estimate is not None
    ci = [estimate.low, estimate.high]
    return {"value": estimate.value, "ci": ci, "scenes": estimate.count}


@dataclass(frozen=True, eq=False)
class Case:
    """A batch of one that asks for frames; `clip` [C, F, H, W] is the true video around them, of
    which they are the frames `asked`. seen: bool [T, height, width] of their pixels, those that are
    judged; None is all. remembered: the last video of the history, whole, as `clip`.
    """

    batch: Batch
    clip: Tensor
    asked: Sequence[int]
    seen: Tensor | None = None
    remembered: Tensor | None = None


class Part:
    """Some scenes of a cache."""

    def __init__(self, cache: LatentCache, scenes: range) -> None:
        self.cache, self.scenes, self.latent_shape = cache, scenes, cache.latent_shape

    def __len__(self) -> int:
        return len(self.scenes)

    def num_tracks(self, scene: int) -> int:
        """Videos of a scene."""
        return self.cache.num_tracks(self.scenes[scene])

    def still_track(self, scene: int) -> int | None:
        """The video whose camera does not move."""
        return self.cache.still_track(self.scenes[scene])

    def draw(self, scene: int, tracks: Sequence[int], source: int) -> Tracks:
        """The given videos."""
        return self.cache.draw(self.scenes[scene], tracks, source)


class EditStudy:
    """Frames of edited clips, which stage 1 asks for."""

    base, encoders = EDITS, BRANCHES

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


class ViewStudy:
    """Frames of another camera of a world, which stage 2 asks for without a source."""

    base, encoders = VIEWS, ENCODERS

    def __init__(self, args: argparse.Namespace, base: Checkpoint) -> None:
        self._cache = LatentCache(*args.latents, device=CPU)
        self._paths = [path for f in args.latents for path in stored_in(f, "scene", "latents")]
        self._args, self._base = args, base
        self.count, self.window = len(self._cache), self._cache.latent_shape[1]
        self._known = self.count - args.held_out
        self.sampler = self._sampler(range(self._known), args.batch)

    def _sampler(self, scenes: range, batch: int) -> ViewHistorySampler:
        recipe = HistoryRecipe(
            stage=2,
            batch=batch,
            min_memory=REMEMBERED,
            max_memory=REMEMBERED,
            source_dropped=1.0,
            frames=FRAMES,
            static_conditioning=0.0,
            flow_shift=self._base.sampling.flow_shift,
            rate=self._args.rate,
        )
        shape = with_history(self._base, self._args.rate)
        return ViewHistorySampler(Part(self._cache, scenes), shape, recipe)

    def cases(self) -> list[Case]:
        """One of each held-out world."""
        return [self._case(scene) for scene in range(self._known, self.count)]

    def _case(self, scene: int) -> Case:
        sampler = self._sampler(range(scene, scene + 1), 1)
        batch = sampler.draw(torch.Generator().manual_seed(10**6 + scene))
        tracks = self._cache.draw(scene, range(self._cache.num_tracks(scene)), 0)
        videos = tracks.latents
        parts = [batch.targets[0], *batch.latents[1][0].split(len(FRAMES), 1)]
        own = [
            next(n for n, video in enumerate(videos) if torch.equal(video[:, list(FRAMES)], part))
            for part in parts
        ]
        path, size = self._paths[scene], self._base.sampling.size
        found = re.fullmatch(r"scene_([a-z]+)_(\d+)", path.stem)
        advice = "give folders of training.latents --worlds, with its own --arcs"
        if found is None:
            raise SystemExit(f"{path} is named after no world; {advice}")
        seed, grade = int(found[2]), cast(Grade, found[1])
        cameras = scene_cameras(seed, num_cameras=len(videos), size=size)
        poses = torch.stack([pose_vectors(camera.poses) for camera in cameras])
        if not torch.allclose(poses, tracks.cameras[..., :POSE_DIM], atol=1e-4):
            raise SystemExit(f"{path} has other cameras than world {seed}; {advice}")
        world = make_world(seed, grade)
        target, *others = ((cameras[n], render(world, cameras[n], samples=1).depth) for n in own)
        seen = torch.stack([project(*target, *other).seen for other in others]).any(0)
        seen = torch.cat([seen[frames_of(place)] for place in FRAMES])
        return Case(batch, videos[own[0]], FRAMES, seen, videos[own[-1]])


def with_history(base: Checkpoint, rate: str) -> TransformerConfig:
    """The base's shape as plans of histories need it."""
    return replace(base.config, history=HistoryConfig(rates=(rate,)))


def vae_of(base: Checkpoint) -> VideoVAE:
    """The embedded base's own."""
    assert base.vae_path is not None
    return load_vae(base.vae_path, device=CPU, dtype=torch.float32)


@dataclass(frozen=True, eq=False)
class Trained:
    """A model after training, with its own encoder where the transformer has none."""

    transformer: MV2VTransformer
    encoder: MemoryEncoder | None
    took: dict[str, Any]

    def given(self, batch: Batch) -> Batch:
        """The batch as the transformer takes it."""
        return batch if self.encoder is None else encoded(self.encoder, batch)[0]


def trained(args: argparse.Namespace, name: str, study: EditStudy | ViewStudy) -> Trained:
    """A model after its steps, and what they took."""
    torch.manual_seed(0)
    checkpoint = load_checkpoint(study.base, device=CPU, dtype=torch.float32)
    model, encoder, sampler = checkpoint.transformer.train(), None, study.sampler
    if name in get_args(EncoderKind):
        kind = cast(EncoderKind, name)
        past = sampler.draw(torch.Generator()).plan.segments[1]
        encoder = MemoryEncoder(model.config, kind, past.length, len(FRAMES)).train()
    else:
        branches = cast(HistoryBranches, name)
        add_history(
            model,
            HistoryConfig(rates=(args.rate,), channels=CHANNELS, heads=HEADS, branches=branches),
        )
    parameters = prepare(model, RANK)
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
    own = model.history_encoders if encoder is None else encoder
    count = sum(p.numel() for n, p in own.named_parameters() if not n.startswith("reader"))
    took = {"encoder_parameters": count, "seconds_of_training": round(loop.elapsed, 1)}
    whole.eval()
    return Trained(model, encoder, took)


def encoder_step(
    model: MV2VTransformer, encoder: MemoryEncoder, sampler: ViewHistorySampler | HistorySampler
) -> StepFn:
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


def decibels(found: Tensor, true: Tensor, seen: Tensor | None) -> float:
    """PSNR of pixels [T, height, width, 3], of those that are seen."""
    error = (found - true).pow(2).mean(-1)
    error = error.mean() if seen is None else error[seen].mean()
    return float(-10 * error.clamp_min(1e-8).log10())


def measured(
    args: argparse.Namespace,
    name: str,
    study: EditStudy | ViewStudy,
    cases: list[Case],
    truth: list[Tensor],
    base: Checkpoint,
) -> dict[str, Any]:
    """Decibels of every case by measure and row, and what the training took; kept in the working
    folder, with the frames of the first cases."""
    path = args.work / name / "psnr.json"
    if path.exists():
        return cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
    model = trained(args, name, study)
    vae = vae_of(base)
    values: dict[str, dict[str, list[float]]] = {}
    pictures = {}
    rows = [name]
    if name == study.encoders[0]:
        rows.append("no history")
    if model.encoder is not None:
        rows.append(f"{name}, read")
    for row in rows:
        own = values.setdefault(row, {})
        for number, (one, true) in enumerate(zip(cases, truth, strict=True)):
            given = one.batch
            if row == "no history":
                given = replace(given, latents=[given.latents[0], 0 * given.latents[1]])
            if row == f"{name}, read":
                assert model.encoder is not None
                found = read_back(model.encoder, given)
            else:
                shift = base.sampling.flow_shift
                found = asked_back(model.transformer, model.given(given), shift, number)
            pixels = shown(vae, one, study.window, found)
            own.setdefault("psnr", []).append(decibels(pixels, true, one.seen))
            if one.seen is not None:
                own.setdefault("psnr_everywhere", []).append(decibels(pixels, true, None))
            if row == name and number < SHOWN:
                pictures[str(number)] = (255 * pixels).round().to(torch.uint8).contiguous()
    took = {**model.took, **costs(model, cases[0])}
    save_tensors(args.work / name / "pictures.safetensors", pictures)
    save_json(path, {"values": values, "took": took})
    return {"values": values, "took": took}


@torch.no_grad()
def read_back(encoder: MemoryEncoder, batch: Batch) -> Tensor:
    """The target [C, F, H, W] as the encoder's reader sees it, without the video model."""
    assert batch.cameras is not None
    past, grid = batch.plan.segments[1], batch.plan.target.grid
    assert past.camera is not None
    state = encoder.read(batch.latents[1], batch.cameras[:, past.camera, : past.grid[0]])
    return encoder.view(state, batch.cameras[:, 0, : grid[0]], grid[1:])[0]


@torch.no_grad()
def costs(model: Trained, case: Case) -> dict[str, Any]:
    """What a case's history takes: tokens, FLOPs of encoding all of it and of a forward beside,
    and the bytes that must be kept so that another video can join it."""
    batch, transformer = case.batch, model.transformer
    past, latents = batch.plan.segments[1], batch.latents[1]
    with FlopCounterMode(display=False, custom_mapping=cpu_flops()) as counter:
        if model.encoder is None:
            encoder = cast(HistoryEncoder, transformer.history_encoders[past.rate])
            found = encoder.append(latents, transformer.patch_embedding, HistoryState())
            kept = [found[0].tokens, *found[2].past]
        else:
            _, state = encoded(model.encoder, batch)
            kept = [state if model.encoder.kind == "state" else latents]
    segments = (batch.plan.target, replace(past, is_encoded=True))
    return {
        "tokens": past.length,
        "encode_flops": counter.get_total_flops(),
        "forward_flops": sum(flop_table(replace(batch.plan, segments=segments)).values()),
        "kept_bytes": sum(each.nbytes for each in kept),
    }


def command(args: argparse.Namespace) -> str:
    """The command with the options that its result depends on."""
    data = "--edits" if args.edits else "--latents"
    names = ["steps", "batch", "held_out", "learning_rate", "rate"]
    names += ["windows"] if args.edits else []
    options = " ".join(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in names)
    return f"python profiling/history_frames.py {data} LATENTS {options}"


def begin(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Settings into the working folder, or the refusal of a folder that began with others."""
    path = args.work / "settings.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != settings:
        raise SystemExit(f"{args.work} began with other settings ({path}); give another --work")
    make_folder(args.work)
    save_json(path, settings)


def draw_picture(
    args: argparse.Namespace,
    study: EditStudy | ViewStudy,
    cases: Sequence[Case],
    truth: Sequence[Tensor],
    vae: VideoVAE,
    rows: dict[str, Any],
) -> None:
    """The last frame of some worlds: the last remembered video's own, the truth, and what each
    encoder's model gave; under their names their decibels over all worlds, with intervals."""
    from matplotlib import pyplot

    columns: dict[str, list[Tensor]] = {"the last remembered\nvideo": [], "asked for": []}
    for one, true in zip(cases, truth, strict=False):
        assert one.remembered is not None
        remembered = vae.decode(one.remembered)[frames_of(one.asked[-1])]
        columns["the last remembered\nvideo"].append(remembered[-1])
        columns["asked for"].append(true[-1])
    for name in study.encoders:
        found = load_file(args.work / name / "pictures.safetensors")
        psnr = rows[name]["psnr"]
        low, high = psnr["ci"]
        title = f"{LABELS[name]}\n{psnr['value']:.2f} dB [{low:.2f}, {high:.2f}]"
        columns[title] = [found[str(number)][-1] for number in range(len(cases))]
    height, width = truth[0].shape[1:3]
    cell = 2.2
    size = (cell * len(columns), cell * len(cases) * height / width + 0.6)
    figure, axes = pyplot.subplots(
        len(cases), len(columns), figsize=size, squeeze=False, layout="constrained"
    )
    for column, (title, pictures) in enumerate(columns.items()):
        for row, picture in enumerate(pictures):
            axis = axes[row, column]
            axis.imshow(picture.numpy())
            axis.set_xticks([])
            axis.set_yticks([])
        axes[0, column].set_title(title, fontsize=8)
    save_figure(figure, args.picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--edits", type=Path, nargs="+")
    data.add_argument("--latents", type=Path, nargs="+")
    parser.add_argument("--work", type=Path, required=True, help="where trainings lie")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rate", help="2x2x2, of views 2x2x1")
    parser.add_argument("--frames", type=int, default=2, help="latent frames of an edit's window")
    parser.add_argument("--windows", type=int, default=6, help="of an edit's history, at most")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--held-out", type=int, default=40, help="clips or worlds")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path, help="of the views' frames")
    args = parser.parse_args()
    args.rate = args.rate or ("2x2x2" if args.edits else "2x2x1")
    torch.set_num_threads(1)
    kind = EditStudy if args.edits else ViewStudy
    base = load_checkpoint(kind.base, device=CPU, dtype=torch.float32)
    study = kind(args, base)
    names = ["steps", "rate", "batch", "learning_rate", "held_out"]
    names += ["frames", "windows"] if args.edits else []
    settings = {name: getattr(args, name) for name in names} | {"clips": study.count}
    begin(args, settings)
    cases = study.cases()
    vae = vae_of(base)
    truth = [shown(vae, one, study.window, one.batch.targets[0]) for one in cases]
    tokens = [one.batch.plan.segments[1].length for one in cases]
    values: dict[str, dict[str, list[float]]] = {}
    rows: dict[str, Any] = {}
    first = study.encoders[0]
    for encoder in study.encoders:
        found = measured(args, encoder, study, cases, truth, base)
        values |= found["values"]
        for name, own in found["values"].items():
            rows[name] = {key: as_json(bootstrap.mean(each)) for key, each in own.items()}
            rows[name] |= found["took"]
            if name != first:
                pairs = zip(values[first]["psnr"], own["psnr"], strict=True)
                gains = [a - b for a, b in pairs]
                rows[name][f"{first}_over_it"] = as_json(bootstrap.mean(gains))
            print(name, rows[name])
        if args.out is not None:
            record = {
                "command": command(args),
                **settings,
                "base": study.base,
                "channels": CHANNELS,
                "rank": RANK,
                "sampling_steps": SAMPLING_STEPS,
                "history_tokens": [min(tokens), max(tokens)],
                "rows": rows,
                **provenance(CPU),
            }
            save_json(args.out, record)
    if args.picture is not None:
        draw_picture(args, study, cases[:SHOWN], truth, vae, rows)


if __name__ == "__main__":
    main()
