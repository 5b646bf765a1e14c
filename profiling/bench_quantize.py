"""What eight bits do to a turn, of weights or in attention: latents, picture, time and bytes.

`python profiling/bench_quantize.py [--of attention] [--checkpoint tiny-edit] [--scenes 4]
[--steps 20] [--out FILE]`

Of novel views, the scenes and the last turn of `bench_step_cache`: held-out worlds, four turns made
by the float32 engine, the fifth by each from the same noise and memory. Of edits, held-out clips of
three windows. `latents_psnr` is of the denoised latents
against float32's, with their own range as the peak; `agreement` with the remembered turns where the
source shows nothing. Seconds are the process's own, of the denoising alone; the float32 turn is
made twice, and the ratio of the two is the noise of the others. Attention is computed as its
libraries do, by their references in plain torch: their seconds say nothing of the libraries.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from bench_step_cache import TURNS, Scene
from measure import digits, provenance, table

from mv2v_engine import Engine, EngineConfig
from mv2v_engine.engine.budget import module_bytes
from mv2v_engine.engine.turn import Turn
from mv2v_engine.evaluation.images import masked_psnr
from mv2v_engine.evaluation.protocol import FIRST_SCENE
from mv2v_engine.files import save_json
from mv2v_engine.synthetic.edit_clips import EditClip, make_edit_clip

COLUMNS = "megabytes latents_psnr worst_latents_psnr psnr agreement truth_psnr time_ratio"
# what an engine is loaded with, by the row's name; twice nothing: how far two runs differ in time
Settings = Mapping[str, dict[str, Any]]
EXACT: Settings = {"float32": {}, "float32 again": {}}
SETTINGS: dict[str, Settings] = {
    "weights": {
        **EXACT,
        "int8": {"config": EngineConfig(quantize="int8")},
        "fp8": {"config": EngineConfig(quantize="fp8")},
    },
    "attention": {
        "exact": {},
        "exact again": {},
        "sage-reference": {"config": EngineConfig(attention="sage-reference")},
        "sparge-reference": {"config": EngineConfig(attention="sparge-reference")},
    },
}


@dataclass(frozen=True, eq=False)
class Clip:
    """A held-out clip and its instruction, edited whole, as `Scene` is seen for the last time."""

    clip: EditClip

    def last_turn(self, engine: Engine, steps: int) -> tuple[Turn, float]:
        """The edit and the seconds of all of it but its source."""
        session = engine.session(self.clip.source.frames, fps=8.0, cuts=())
        start = time.process_time()
        turn = session.edit(self.clip.prompt, seed=self.clip.seed, num_inference_steps=steps)
        seconds = time.process_time() - start
        session.close()
        return turn, seconds

    def measure(self, turn: Turn, exact: Turn) -> dict[str, Any]:
        """An edit against the exact one and the truth."""
        return {
            "psnr": masked_psnr(turn.frames, exact.frames),
            "truth_psnr": masked_psnr(turn.frames, self.clip.edited.frames),
        }


def latents_psnr(latents: torch.Tensor, exact: torch.Tensor) -> float:
    """PSNR in dB; the peak is the exact latents' range."""
    error = (latents - exact).square().mean()
    return float(10 * torch.log10((exact.max() - exact.min()) ** 2 / error))


def measure(
    name: str,
    seeds: range,
    steps: int,
    settings: Settings = SETTINGS["weights"],
    of: str = "weights",
) -> list[dict[str, Any]]:
    """A row a setting: means over scenes, the worst latents, the median of time ratios."""
    given: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
    engines = {
        label: Engine.from_pretrained(name, **given | own) for label, own in settings.items()
    }
    first = next(iter(settings))
    found: dict[str, list[dict[str, Any]]] = {label: [] for label in engines}
    for seed in seeds:
        whole = engines[first]
        scene: Scene | Clip
        if whole.is_editor:
            frames, size = whole.sampling.num_frames, whole.sampling.size
            scene = Clip(make_edit_clip(seed, num_frames=3 * frames, size=size))
        else:
            scene = Scene.made(whole, seed, steps)
        exact, exact_seconds = scene.last_turn(whole, steps)
        for label, engine in engines.items():
            turn, seconds = exact, exact_seconds
            if label != first:
                turn, seconds = scene.last_turn(engine, steps)
            measures = scene.measure(turn, exact) | {"time_ratio": seconds / exact_seconds}
            if settings[label]:
                measures["latents_psnr"] = latents_psnr(turn.latents, exact.latents)
            found[label].append(measures)
    return [
        {of: label, **_row(engines[label], scenes, is_changed=bool(settings[label]))}
        for label, scenes in found.items()
    ]


def _row(engine: Engine, scenes: list[dict[str, Any]], *, is_changed: bool) -> dict[str, Any]:
    row: dict[str, Any] = {}
    row["megabytes"] = digits(module_bytes(engine.transformer) / 1e6)
    for name in ("latents_psnr", "psnr", "agreement", "truth_psnr"):
        values = [scene[name] for scene in scenes if scene.get(name) is not None]
        is_known = is_changed or name in ("agreement", "truth_psnr")
        row[name] = digits(mean(values)) if values and is_known else None
    psnrs = [scene["latents_psnr"] for scene in scenes if "latents_psnr" in scene]
    row["worst_latents_psnr"] = digits(min(psnrs)) if psnrs else None
    row["time_ratio"] = digits(median(scene["time_ratio"] for scene in scenes))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--of", choices=SETTINGS, default="weights")
    parser.add_argument("--checkpoint", default="tiny-nvs")
    parser.add_argument("--scenes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(FIRST_SCENE, FIRST_SCENE + args.scenes)
    rows = measure(args.checkpoint, seeds, args.steps, SETTINGS[args.of], args.of)
    print(table(rows, f"{args.of} {COLUMNS}"))
    if args.out:
        common = {"checkpoint": args.checkpoint, "scenes": args.scenes, "turns": TURNS}
        common |= {"steps": args.steps, "threads": 1}
        save_json(args.out, {**common, **provenance(torch.device("cpu")), "rows": rows})


if __name__ == "__main__":
    main()
