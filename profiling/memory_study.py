"""What is the best use of so many tokens of memory? Encoders and rankings of views, on one task.

`python profiling/memory_study.py --latents LATENTS [LATENTS ...] --work runs/memory
[--out profiling/results/memory_study.json] [--picture docs/memory_encoders.png]`

Of every encoder a model: `tiny-nvs` after as many steps of the same recipe, with two videos of
other cameras beside the source, in as many tokens. LATENTS are folders of `training.latents`.

Eight turns of held-out worlds, those of `run evaluate --turns 9 --grade furnished`, are made once
by `tiny-nvs` as it is. Two of them, chosen by a ranking, become tokens, and a camera comes back:

"psnr"    on the very path of one of the turns: decibels of its frames against that turn's;
"return"  over the way of the first turn: the consistency of `run evaluate` with it, by true depth.
          L1 of 0..1.

Both are of pixels where the source surely shows nothing of what is seen. Rankings are those of
`rankings.py`, and responsiveness by the model of patches. "nothing" is that model without memory,
"all" the same with eight turns by rank. Intervals are bootstraps over worlds, of one training each.
A run that was cut off goes on where it stood.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from measure import provenance
from memory_models import (
    CHANNELS,
    CPU,
    RANK,
    SAMPLING_STEPS,
    Trained,
    as_json,
    asked_back,
    begin,
    encoding,
    trained,
    with_history,
)
from rankings import CHOSEN, choices
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mv2v_engine import Engine
from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.checkpoints import load_checkpoint
from mv2v_engine.checkpoints.load import Checkpoint
from mv2v_engine.config import EngineConfig, TransformerConfig
from mv2v_engine.engine.request import Request
from mv2v_engine.evaluation import bootstrap
from mv2v_engine.evaluation.consistency import consistency, film, overlap
from mv2v_engine.evaluation.figures import save_figure
from mv2v_engine.evaluation.images import masked_psnr
from mv2v_engine.evaluation.protocol import (
    FIRST_SCENE,
    Protocol,
    scene_trajectories,
    turn_seed,
)
from mv2v_engine.evaluation.responsiveness import recorded_responsiveness
from mv2v_engine.files import save_json, save_tensors
from mv2v_engine.memory.ranking import Ranker, pooled
from mv2v_engine.synthetic.worlds import make_world
from mv2v_engine.tokens.flops import flop_table
from mv2v_engine.tokens.plan import TokenPlan, memory_tokenizers, turn_plan
from mv2v_engine.training.history import HistoryRecipe, ViewHistorySampler
from mv2v_engine.training.latents import LatentCache
from mv2v_engine.training.ranking import shown
from mv2v_engine.training.recipe import Batch, SceneSampler

BASE, TURNS = "tiny-nvs", Protocol(turns=9, grade="furnished")
ENCODERS = ("patches", "kernel", "both", "lr", "hr", "state", "view")
LABELS = {
    "patches": "patches by rank",
    "kernel": "one kernel, the base's repeated",
    "both": "TinyHistory",
    "lr": "its low-resolution branch alone",
    "hr": "its full-resolution branch alone",
    "state": "a recurrent state",
    "view": "a latent of views",
}
# two videos take as many tokens in patches of the first ranks as in a history of this rate
RATE, TOKENIZER = "2x2x1", 4
PICTURED, SHOWN = ("patches", "both", "state", "view"), 3
# what the others are compared with: the default, and patches that begin as a history does
_COMPARED = ("patches", "kernel")
_CROSSED = ("patches", "kernel", "both")  # measured by every ranking, the others by VideoFOV
_BACK = ("1", "2", "4")  # turns that leave what the source shows; a world asks for one of them
_FEWEST_PIXELS = 64
Value = float | None
Measures = Mapping[str, list[Value]]


class PatchSampler(SceneSampler):
    """Batches of the recipe whose memory is two videos in patches."""

    def draw_plan(self, generator: torch.Generator) -> TokenPlan:
        """The same plan for all."""
        return plan_of("patches", self.shape, self._grid, CHOSEN)


def plan_of(
    encoder: str,
    shape: TransformerConfig,
    grid: tuple[int, int, int],
    count: int,
    *,
    by_rank: bool = False,
) -> TokenPlan:
    """The plan of a turn that remembers some videos. by_rank: as many as there are ranks for."""
    if encoder != "patches":
        return turn_plan(shape, grid, (TOKENIZER,) * count, merge="off", history=RATE)
    tokenizers = memory_tokenizers(count) if by_rank else (TOKENIZER,) * count
    return turn_plan(shape, grid, tokenizers, merge="off")


def sampler_of(encoder: str, latents: LatentCache, base: Checkpoint, batch: int) -> SceneSampler:
    """Training's batches for an encoder: two videos beside the source, in as many tokens."""
    recipe = HistoryRecipe(
        stage=2,
        batch=batch,
        min_memory=CHOSEN,
        max_memory=CHOSEN,
        source_dropped=0.0,
        static_source=0.5,
        revisited=0.25,
        static_conditioning=0.0,
        flow_shift=base.sampling.flow_shift,
        rate=RATE,
    )
    kind = PatchSampler if encoder == "patches" else ViewHistorySampler
    return kind(latents, with_history(base, RATE), recipe)


@dataclass(frozen=True, eq=False)
class Task:
    """A camera that comes back. number: its place among the cameras, the source's first."""

    measure: Literal["psnr", "return"]
    number: int
    seed: int


class World:
    """A held-out world with eight turns of the base, and what comes back in it."""

    def __init__(self, seed: int, engine: Engine, work: Path) -> None:
        self.seed, self.vae, sampling = seed, engine.vae, engine.sampling
        world = make_world(seed, TURNS.grade)
        source = film(world, named_trajectory("static", sampling.num_frames, sampling.size))
        again = TURNS.last[0]
        cameras = scene_trajectories(seed, sampling, TURNS.turns)
        cameras = {name: cameras[name] for name in (*TURNS.before, again)}
        self.views = [source, *(film(world, camera, source) for camera in cameras.values())]
        self.cameras = [view.camera for view in self.views]
        self.shown = shown(world, self.cameras, self.vae)
        names, back = list(cameras), _BACK[seed % len(_BACK)]
        self.tasks = [
            Task("psnr" if name == back else "return", 1 + names.index(name), turn_seed(seed, n))
            for n, name in enumerate((back, again), len(names))
        ]
        self.source = self.vae.encode(source.truth.frames)
        path = work / "worlds" / f"world_{seed}.safetensors"
        if not path.exists():
            session = engine.session(source.truth.frames, fps=8.0, source_latents=self.source)
            for number, name in enumerate(TURNS.before, 1):
                request = Request.view(
                    cameras[name],
                    sampling,
                    memory="retrieved",
                    seed=turn_seed(seed, number),
                    num_inference_steps=SAMPLING_STEPS,
                )
                session.ask(request)
            turns = torch.stack([turn.latents for turn in session.turns])
            session.close()
            save_tensors(path, {"turns": turns.float().contiguous()})
        self.turns = load_file(path)["turns"]
        # a learned ranking is told what the turns show, as in a session, not what is truly there
        known = torch.stack([pooled(latents) for latents in (self.source, *self.turns)])
        self.shown = replace(self.shown, pooled=known)
        self.frames = [self.vae.decode(latents) for latents in self.turns]

    def batch(self, plan: TokenPlan, task: Task, videos: Sequence[int]) -> Batch:
        """A batch of one. videos: those that are remembered, 1 to 8."""
        shape, is_history = plan.shape, any(s.encoder == "history" for s in plan.segments)
        numbers = (task.number, 0, *(sorted(videos) if is_history else videos))
        tracks = [self.cameras[number].vectors(shape.camera_dim) for number in numbers]
        remembered = [self.turns[number - 1][None] for number in numbers[2:]]
        if is_history:
            tracks = [*tracks[:2], torch.cat(tracks[2:])]
            remembered = [torch.cat(remembered, 2)]
        source = self.source[None].float()
        return Batch(
            plan,
            [torch.zeros_like(source), source, *remembered],
            pad_sequence(tracks, batch_first=True)[None],
            torch.zeros(1, shape.text_len, shape.text_dim),
        )

    def measure(self, task: Task, frames: Tensor) -> Value:
        """What a task is judged by; None where there is too little to see."""
        view = self.views[task.number]
        if task.measure == "psnr":
            if int(view.invented.sum()) < _FEWEST_PIXELS:
                return None
            return masked_psnr(frames, self.frames[task.number - 1], view.invented)
        shared = overlap(view, self.views[1])
        if not shared.is_measurable:
            return None
        return consistency(frames, self.frames[0], shared)[0]


class Measured:
    """One encoder's model on all worlds: values and costs by ranking."""

    def __init__(
        self, encoder: str, model: Trained, base: Checkpoint, ranker: Ranker | None
    ) -> None:
        self.encoder, self.model, self.base, self.ranker = encoder, model, base, ranker
        self.values: dict[str, dict[str, list[Value]]] = {}
        self.costs: dict[str, list[tuple[int, int]]] = {}
        self.pictures: dict[str, Tensor] = {}
        self.encoding: dict[str, int] = {}

    def add(self, world: World) -> None:
        """Measure a world."""
        own: dict[tuple[str, str], list[float]] = {}
        for task in world.tasks:
            made: dict[tuple[int, ...], tuple[Value, TokenPlan]] = {}
            for ranking, videos in self._chosen(world, task).items():
                if videos not in made:
                    made[videos] = self._answer(world, task, videos, ranking)
                value, plan = made[videos]
                values = own.setdefault((ranking, task.measure), [])
                values += [] if value is None else [value]
                cost = plan.lengths_by_kind.get("memory", 0), sum(flop_table(plan).values())
                self.costs.setdefault(ranking, []).append(cost)
        for (ranking, measure), values in own.items():
            mean = sum(values) / len(values) if values else None
            self.values.setdefault(ranking, {}).setdefault(measure, []).append(mean)

    def _chosen(self, world: World, task: Task) -> dict[str, tuple[int, ...]]:
        """The videos of each ranking, the best first; of random, one pair. Rankings that leave out
        what adds nothing are filled up by VideoFOV, so that all have as many tokens.
        """
        draw, found = torch.Generator().manual_seed(task.seed), {}
        sets = choices(world.shown, task.number, self.ranker)
        for name, own in sets.items():
            videos = own[int(torch.randint(len(own), (), generator=draw))]
            found[name] = tuple(dict.fromkeys((*videos, *sets["fov"][0])))[:CHOSEN]
        if self.encoder not in _CROSSED:
            return {"fov": found["fov"]}
        if self.encoder == "patches":
            (everything,) = choices(world.shown, task.number, None, count=len(world.turns))["fov"]
            responsive = self._most_responsive(world, task, everything)
            found |= {"nothing": (), "all": everything, "responsiveness": responsive}
        return found

    def _most_responsive(
        self, world: World, task: Task, videos: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Those whose frames the blocks respond to most, where all are remembered."""
        batch = world.batch(self._plan(world, videos, by_rank=True), task, videos)
        with recorded_responsiveness(self.model.transformer) as forwards:
            self._sampled(batch, task)
        scores = torch.stack(forwards).sum((0, 1))
        spans = [span.segment for span in batch.plan.frame_table if span.segment]
        totals = torch.zeros(len(batch.plan.segments))
        totals.index_add_(0, torch.tensor(spans), scores.float())
        order = totals[2:].argsort(descending=True).tolist()  # target and source come first
        return tuple(videos[n] for n in order[:CHOSEN])

    def _plan(self, world: World, videos: Sequence[int], *, by_rank: bool) -> TokenPlan:
        _, frames, rows, columns = world.source.shape
        is_history = self.encoder != "patches"
        shape = with_history(self.base, RATE) if is_history else self.base.config
        grid = (frames, rows, columns)
        return plan_of(self.encoder, shape, grid, len(videos), by_rank=by_rank)

    def _answer(
        self, world: World, task: Task, videos: tuple[int, ...], ranking: str
    ) -> tuple[Value, TokenPlan]:
        """What a task is judged by, and the plan as it is counted."""
        batch = world.batch(self._plan(world, videos, by_rank=ranking == "all"), task, videos)
        frames = world.vae.decode(self._sampled(batch, task))
        if task.measure == "psnr" and ranking in ("fov", "nothing"):
            name = ranking if ranking == "nothing" else self.encoder
            self.pictures[f"{world.seed}.{name}"] = frames[-1].contiguous()
            before = world.frames[task.number - 1][-1]
            self.pictures[f"{world.seed}.before"] = before.contiguous()
        if ranking == "fov":
            self.encoding = self.encoding or encoding(self.model, batch)
        encoded = [replace(s, is_encoded=s.encoder == "history") for s in batch.plan.segments]
        return world.measure(task, frames), replace(batch.plan, segments=tuple(encoded))

    def _sampled(self, batch: Batch, task: Task) -> Tensor:
        shift, given = self.base.sampling.flow_shift, self.model.given(batch)
        return asked_back(self.model.transformer, given, shift, task.seed)


def measured(
    args: argparse.Namespace, encoder: str, base: Checkpoint, filmed: Callable[[], list[World]]
) -> dict[str, Any]:
    """Values and costs by ranking, and what training took; kept in the working folder."""
    path = args.work / encoder / "values.json"
    if path.exists():
        return cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
    latents = LatentCache(*args.latents, device=CPU)
    sampler = sampler_of(encoder, latents, base, args.batch)
    model = trained(args, encoder, BASE, RATE, sampler)
    ranker = Ranker.read(base.report.path, base.config.latent_channels)
    own, worlds = Measured(encoder, model, base, ranker), filmed()
    for number, world in enumerate(worlds, 1):
        own.add(world)
        print(f"{encoder}: {number}/{len(worlds)}", flush=True)
    found = {
        "values": own.values,
        "costs": own.costs,
        "took": {
            **model.took,
            "encode_flops": own.encoding["encode_flops"],
            "kept_bytes": worlds[0].turns.nbytes + own.encoding["encoded_bytes"],
        },
    }
    save_tensors(args.work / encoder / "pictures.safetensors", own.pictures)
    save_json(path, found)
    return found


def row_of(
    own: Measures, others: Mapping[str, Measures], costs: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """A row: both measures, how they differ from other rows' by the name, and the mean costs."""
    row: dict[str, Any] = {}
    for measure, values in own.items():
        row[measure] = as_json(bootstrap.mean(values))
        for name, other in others.items():
            if other is own:
                continue
            if measure == "return":
                row[f"return_of_{name}"] = as_json(bootstrap.ratio(values, other[measure]))
            else:
                below = bootstrap.difference(other[measure], values)
                row[f"psnr_below_{name}"] = as_json(below)
    for name, column in zip(("tokens", "flops"), zip(*costs, strict=True), strict=True):
        row[name] = sum(column) / len(column)
    row["flops"] *= SAMPLING_STEPS
    return row


def draw_picture(args: argparse.Namespace, rows: Mapping[str, Any]) -> None:
    """The last frames of some worlds: the turn's own, whose path is taken again, and what each
    encoder's model gave; under their names their decibels over all worlds, with intervals."""
    from matplotlib import pyplot

    found = {
        key: picture
        for name in PICTURED
        for key, picture in load_file(args.work / name / "pictures.safetensors").items()
    }
    seeds = range(args.first_world, args.first_world + min(SHOWN, args.worlds))
    columns = {"what is remembered\n": "before", "nothing remembered": "nothing"}
    columns |= {LABELS[name]: name for name in PICTURED}
    cell, (height, width, _) = 2.0, next(iter(found.values())).shape
    size = (cell * len(columns), cell * len(seeds) * height / width + 0.6)
    figure, axes = pyplot.subplots(
        len(seeds), len(columns), figsize=size, squeeze=False, layout="constrained"
    )
    for column, (title, name) in enumerate(columns.items()):
        for row, seed in enumerate(seeds):
            axis = axes[row, column]
            axis.imshow(found[f"{seed}.{name}"].numpy())
            axis.set_xticks([])
            axis.set_yticks([])
        if name != "before":
            is_model = name in PICTURED
            psnr = rows[name if is_model else ENCODERS[0]]["fov" if is_model else name]["psnr"]
            low, high = psnr["ci"]
            title += f"\n{psnr['value']:.2f} dB [{low:.2f}, {high:.2f}]"
        axes[0, column].set_title(title, fontsize=8)
    save_figure(figure, args.picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--latents", type=Path, nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True, help="where trainings lie")
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=ENCODERS)
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--worlds", type=int, default=16)
    parser.add_argument("--first-world", type=int, default=FIRST_SCENE)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = load_checkpoint(BASE, device=CPU, dtype=torch.float32)
    names = ["steps", "batch", "learning_rate", "worlds", "first_world"]
    settings = {name: getattr(args, name) for name in names}
    begin(args.work, settings)

    @functools.cache
    def filmed() -> list[World]:
        engine = Engine.from_pretrained(BASE, device="cpu")
        engine = engine.reconfigured(EngineConfig(merge="off"))
        seeds = range(args.first_world, args.first_world + args.worlds)
        return [World(seed, engine, args.work) for seed in seeds]

    options = " ".join(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in names)
    rows: dict[str, Any] = {}
    compared: dict[str, Measures] = {}
    for encoder in sorted(args.encoders, key=ENCODERS.index):
        found = measured(args, encoder, base, filmed)
        if encoder in _COMPARED:
            compared[encoder] = found["values"]["fov"]
        rows[encoder] = {
            ranking: row_of(own, compared, found["costs"][ranking])
            for ranking, own in found["values"].items()
        } | {"took": found["took"]}
        print(encoder, rows[encoder])
        if args.out is not None:
            record = {
                "command": f"python profiling/memory_study.py --latents LATENTS {options}",
                **settings,
                "base": BASE,
                "grade": TURNS.grade,
                "rate": RATE,
                "channels": CHANNELS,
                "rank": RANK,
                "sampling_steps": SAMPLING_STEPS,
                "rows": rows,
                **provenance(CPU),
            }
            save_json(args.out, record)
    if args.picture is not None:
        draw_picture(args, rows)


if __name__ == "__main__":
    main()
