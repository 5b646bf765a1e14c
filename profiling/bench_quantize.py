"""What weights of eight bits do to a turn: latents, picture, time and bytes, whole turns.

`python profiling/bench_quantize.py [--checkpoint tiny-edit] [--scenes 4] [--steps 20] [--out FILE]`

Of novel views, the scenes and the last turn of `bench_step_cache`: held-out worlds, four turns made
by the float32 engine, the fifth by each from the same noise and memory. Of edits, held-out clips of
three windows. `latents_psnr` is of the denoised latents
against float32's, with their own range as the peak; `agreement` with the remembered turns where the
source shows nothing. Seconds are the process's own, of the denoising alone; the float32 turn is
made twice, and the ratio of the two is the noise of the others.
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

COLUMNS = "weights megabytes latents_psnr worst_latents_psnr psnr agreement truth_psnr time_ratio"
# twice as they are: how far two runs of the same differ in time
EXACT: dict[str, dict[str, Any]] = {"float32": {}, "float32 again": {}}
_WEIGHTS = EXACT | {kind: {"config": EngineConfig(quantize=kind)} for kind in ("int8", "fp8")}


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
    """In dB; the peak is the exact latents' range."""
    error = (latents - exact).square().mean()
    return float(10 * torch.log10((exact.max() - exact.min()) ** 2 / error))


def measure(
    name: str, seeds: range, steps: int, weights: Mapping[str, dict[str, Any]] = _WEIGHTS
) -> list[dict[str, Any]]:
    """A row a kind of weights: means over scenes, the worst latents, the median of time ratios."""
    given = {"device": "cpu", "dtype": torch.float32}
    engines = {label: Engine.from_pretrained(name, **given | own) for label, own in weights.items()}
    found: dict[str, list[dict[str, Any]]] = {label: [] for label in engines}
    for seed in seeds:
        whole = engines["float32"]
        scene: Scene | Clip
        if whole.is_editor:
            frames, size = whole.sampling.num_frames, whole.sampling.size
            scene = Clip(make_edit_clip(seed, num_frames=3 * frames, size=size))
        else:
            scene = Scene.made(whole, seed, steps)
        exact, exact_seconds = scene.last_turn(whole, steps)
        for label, engine in engines.items():
            turn, seconds = exact, exact_seconds
            if label != "float32":
                turn, seconds = scene.last_turn(engine, steps)
            measures = scene.measure(turn, exact) | {"time_ratio": seconds / exact_seconds}
            if label not in EXACT:
                measures["latents_psnr"] = latents_psnr(turn.latents, exact.latents)
            found[label].append(measures)
    return [_row(label, engines[label], scenes) for label, scenes in found.items()]


def _row(label: str, engine: Engine, scenes: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"weights": label}
    row["megabytes"] = digits(module_bytes(engine.transformer) / 1e6)
    for name in ("latents_psnr", "psnr", "agreement", "truth_psnr"):
        values = [scene[name] for scene in scenes if scene.get(name) is not None]
        is_known = label not in EXACT or name in ("agreement", "truth_psnr")
        row[name] = digits(mean(values)) if values and is_known else None
    psnrs = [scene["latents_psnr"] for scene in scenes if "latents_psnr" in scene]
    row["worst_latents_psnr"] = digits(min(psnrs)) if psnrs else None
    row["time_ratio"] = digits(median(scene["time_ratio"] for scene in scenes))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", default="tiny-nvs")
    parser.add_argument("--scenes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(args.checkpoint, range(FIRST_SCENE, FIRST_SCENE + args.scenes), args.steps)
    print(table(rows, COLUMNS))
    if args.out:
        common = {"checkpoint": args.checkpoint, "scenes": args.scenes, "turns": TURNS}
        common |= {"steps": args.steps, "threads": 1}
        save_json(args.out, {**common, **provenance(torch.device("cpu")), "rows": rows})


if __name__ == "__main__":
    main()
