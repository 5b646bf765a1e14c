"""What skipping steps saves, and what it does to the picture: whole turns against exact ones.

`python profiling/bench_step_cache.py [--scenes 8] [--steps 20] [--out RESULTS.json]`

Held-out worlds of known geometry. Four exact turns are made once; the fifth, which remembers up to
four, is made with every setting from the same noise and memory, and compared with the exact one of
the same conditioning: PSNR and SSIM of the decoded frames, latents, and how well it agrees with the
turns that it remembers where the source shows nothing. Seconds are the process's own, of the
denoising alone; ratios are within a scene.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from measure import digits, provenance, table

from mv2v_engine import Engine, EngineConfig
from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.engine.request import Request
from mv2v_engine.engine.turn import Turn
from mv2v_engine.evaluation.consistency import Overlap, View, consistency, film, overlap
from mv2v_engine.evaluation.images import masked_psnr, structural_similarity
from mv2v_engine.evaluation.protocol import FIRST_SCENE, scene_trajectories, turn_seed
from mv2v_engine.files import save_json
from mv2v_engine.progress import Event, StageDone, StageStarted
from mv2v_engine.synthetic.worlds import make_world

TURNS = 5
COLUMNS = (
    "setting psnr worst_psnr ssim latents truth_psnr agreement computed whole flop_ratio time_ratio"
)


@dataclass(frozen=True)
class Setting:
    """A configuration by name, and the exact one that it is held against.

    steps: None are all; fewer are what skipping steps has to be better than.
    """

    name: str
    changes: dict[str, Any]
    against: str
    steps: int | None = None


def settings(steps: int) -> list[Setting]:
    """Exact turns, then fewer steps of them, then steps skipped."""
    found = [
        Setting("joint", {}, "joint"),
        Setting("static", {"conditioning": "static"}, "static"),
        Setting("unipc", {"scheduler": "unipc"}, "unipc"),
    ]
    found += [
        Setting(f"{count} steps", {}, "joint", count)
        for count in (max(1, share * steps // 20) for share in (13, 9, 6))
    ]
    for threshold in (0.1, 0.15, 0.2, 0.3):
        cache = {"step_cache": threshold}
        found.append(Setting(f"cache {threshold:g}", cache, "joint"))
        static = {"conditioning": "static", **cache}
        found.append(Setting(f"static, cache {threshold:g}", static, "static"))
    found.append(Setting("unipc, cache 0.15", {"scheduler": "unipc", "step_cache": 0.15}, "unipc"))
    return found


@dataclass(frozen=True, eq=False)
class Scene:
    """A world, its exact turns before the last, and where the last can be compared with them."""

    seed: int
    source: View
    views: list[View]
    turns: list[Turn]
    overlaps: dict[int, Overlap]
    source_latents: torch.Tensor

    @classmethod
    def made(cls, engine: Engine, seed: int, steps: int) -> Scene:
        world, sampling = make_world(seed), engine.sampling
        source = film(world, named_trajectory("static", sampling.num_frames, sampling.size))
        cameras = list(scene_trajectories(seed, sampling, TURNS).values())[:TURNS]
        views = [film(world, camera, source) for camera in cameras]
        shared = {i: overlap(views[-1], view) for i, view in enumerate(views[:-1])}
        scene = cls(
            seed,
            source,
            views,
            [],
            {i: pair for i, pair in shared.items() if pair.is_measurable},
            engine.vae.encode(source.truth.frames),
        )
        session = engine.session(source.truth.frames, fps=8.0, source_latents=scene.source_latents)
        for number in range(1, TURNS):
            scene.turns.append(session.ask(scene.request(engine, number, steps)))
        session.close()
        return scene

    def request(self, engine: Engine, number: int, steps: int) -> Request:
        return Request.view(
            self.views[number - 1].camera,
            engine.sampling,
            memory="retrieved",
            seed=turn_seed(self.seed, number),
            num_inference_steps=steps,
        )

    def last_turn(self, engine: Engine, steps: int) -> tuple[Turn, float]:
        """The last turn and the seconds of its denoising."""
        frames = self.source.truth.frames
        session = engine.session(frames, fps=8.0, source_latents=self.source_latents)
        for turn in self.turns:
            session.adopt(turn)
        marks: list[float] = []

        def watch(event: Event) -> None:
            if isinstance(event, StageStarted | StageDone) and event.stage == "sampling":
                marks.append(time.process_time())

        turn = session.ask(self.request(engine, TURNS, steps), watch)
        session.close()
        return turn, marks[1] - marks[0]

    def measure(self, turn: Turn, exact: Turn) -> dict[str, Any]:
        """A turn against the exact one, the truth, and the turns that it remembers."""
        pairs = [
            consistency(turn.frames, self.turns[i].frames, shared)[0]
            for i, shared in self.overlaps.items()
        ]
        change = (turn.latents - exact.latents).norm() / exact.latents.norm()
        report, is_exact = turn.report, turn is exact
        reuse = report.get("reuse", {})
        return {
            "psnr": None if is_exact else masked_psnr(turn.frames, exact.frames),
            "ssim": None if is_exact else structural_similarity(turn.frames, exact.frames),
            "latents": None if is_exact else float(change),
            "truth_psnr": masked_psnr(turn.frames, self.views[-1].truth.frames),
            "agreement": mean(pairs) if pairs else None,
            "computed": len(reuse.get("steps_computed", range(report["num_inference_steps"]))),
            "whole": report["work"].get("whole"),
            "flop_ratio": report["flops"] / exact.report["flops"],
            "memory": len(report["plan"]["memory_tokenizers"]),
            "reuse": reuse,
        }


def measure(
    engine: Engine, chosen: Sequence[Setting], seeds: range, steps: int
) -> list[dict[str, Any]]:
    """A row a setting: means over scenes, the worst PSNR, the median of time ratios."""
    found: dict[str, list[dict[str, Any]]] = {setting.name: [] for setting in chosen}
    engines = {s.name: engine.reconfigured(replace(engine.config, **s.changes)) for s in chosen}
    for seed in seeds:
        scene = Scene.made(engine, seed, steps)
        exact: dict[str, tuple[Turn, float]] = {}
        for setting in chosen:
            turn, seconds = scene.last_turn(engines[setting.name], setting.steps or steps)
            exact.setdefault(setting.name, (turn, seconds))
            reference, reference_seconds = exact[setting.against]
            measures = scene.measure(turn, reference)
            measures["time_ratio"] = seconds / reference_seconds
            found[setting.name].append(measures)
    return [_row(setting, found[setting.name]) for setting in chosen]


def _row(setting: Setting, scenes: list[dict[str, Any]]) -> dict[str, Any]:
    def average(name: str) -> float | None:
        found = [scene[name] for scene in scenes if scene[name] is not None]
        return digits(mean(found)) if found else None

    names = [*COLUMNS.split(), "memory"]
    values = {name: average(name) for name in names if name in scenes[0]}
    psnrs = [scene["psnr"] for scene in scenes if scene["psnr"] is not None]
    return {
        "setting": setting.name,
        "against": setting.against,
        **values,
        "worst_psnr": digits(min(psnrs)) if psnrs else None,
        "time_ratio": digits(median(scene["time_ratio"] for scene in scenes)),
        # which steps of the first scene were computed
        "first_scene": scenes[0]["reuse"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", default="tiny-nvs")
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    engine = Engine.from_pretrained(args.checkpoint, device="cpu", config=EngineConfig())
    seeds = range(FIRST_SCENE, FIRST_SCENE + args.scenes)
    rows = measure(engine, settings(args.steps), seeds, args.steps)
    print(table(rows, COLUMNS))
    if args.out:
        common = {
            "checkpoint": engine.checkpoint.name,
            "scenes": args.scenes,
            "turns": TURNS,
            "steps": args.steps,
            "merge": engine.merge,
            "threads": 1,
        }
        save_json(args.out, {**common, **provenance(torch.device("cpu")), "rows": rows})


if __name__ == "__main__":
    main()
