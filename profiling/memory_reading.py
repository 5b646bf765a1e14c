"""Does the model read its memory? What true memory videos take off one forward's error.

`python profiling/memory_reading.py [--checkpoint tiny-nvs] [--out profiling/results/NAME.json]`

No sampling, so no turn's mistake is passed on: a held-out target's own latents are noised, the
true view of another turn is the memory, and the clean latents that one forward predicts are
compared with the target's, in the cells that the source never shows and that memory does. "same"
memory is the target itself, which only needs to be copied; "other" is another camera's view, which
needs to be warped; by tokenizer of the memory video.

F H W latent frames, rows, columns.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from mv2v_engine import Engine
from mv2v_engine.camera.poses import relative_to
from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.evaluation.consistency import film, overlap
from mv2v_engine.evaluation.protocol import FIRST_SCENE, scene_trajectories
from mv2v_engine.files import save_json
from mv2v_engine.synthetic.worlds import make_world
from mv2v_engine.tokens.plan import turn_plan

PAIRS = ((1, 0), (2, 0), (2, 1))  # target and memory among a scene's turns
FEWEST_CELLS = 8


def covered_cells(mask_Thw: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Latent cells [F, H, W] most of whose pixels [T, height, width] are in the mask."""
    frames, rows, columns = grid
    first = mask_Thw[:1].expand(4, -1, -1)  # the first latent frame holds one pixel frame
    cells = torch.cat([first, mask_Thw[1:]]).float().unflatten(0, (frames, 4))
    cells = cells.unflatten(2, (rows, -1)).unflatten(4, (columns, -1))
    covered: Tensor = cells.mean((1, 3, 5)) > 0.75
    return covered


class Scene:
    """The source and the first three turns' true views of a held-out world, encoded."""

    def __init__(self, engine: Engine, seed: int) -> None:
        sampling, world = engine.sampling, make_world(seed)
        source = film(world, named_trajectory("static", sampling.num_frames, sampling.size))
        asked = scene_trajectories(seed, sampling).values()
        turns = [film(world, camera, source) for camera in asked]
        views = [source, *turns]
        self.latents = [engine.vae.encode(view.truth.frames) for view in views]
        reference = source.camera.poses[0]
        cameras = [replace(v.camera, poses=relative_to(v.camera.poses, reference)) for v in views]
        self.cameras = [c.vectors(engine.transformer.config.camera_dim) for c in cameras]
        _, *sides = self.latents[0].shape
        self.grid = (sides[0], sides[1], sides[2])
        self.cells = {
            pair: covered_cells(overlap(turns[pair[0]], turns[pair[1]]).mask, self.grid)
            for pair in PAIRS
        }


@torch.inference_mode()
def error(
    engine: Engine,
    scene: Scene,
    pair: tuple[int, int],
    *,
    memory: list[tuple[int, int]],
    sigma: float,
) -> float:
    """Mean squared error of the predicted latents where memory alone can know them.

    memory: (turn, tokenizer) of each video.
    """
    target = scene.latents[1 + pair[0]]
    plan = turn_plan(engine.transformer.config, scene.grid, [k for _, k in memory], merge="off")
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(pair[0]))
    noisy = (1 - sigma) * target + sigma * noise
    shown = [0, *(1 + turn for turn, _ in memory)]
    velocity = engine.transformer(
        [noisy[None], *(scene.latents[index][None] for index in shown)],
        torch.tensor([1000 * sigma]),
        engine.text_embedding(""),
        plan=plan,
        cameras=torch.stack([scene.cameras[i] for i in (1 + pair[0], *shown)])[None],
    )[0]
    difference = (noisy - sigma * velocity - target).square().mean(0)
    return float(difference[scene.cells[pair]].mean())


def measure(engine: Engine, seeds: range, sigma: float) -> dict[str, Any]:
    """Mean errors over scenes and pairs, by what is in memory."""
    errors: dict[str, list[float]] = {}
    for seed in seeds:
        scene = Scene(engine, seed)
        for pair in PAIRS:
            if int(scene.cells[pair].sum()) < FEWEST_CELLS:
                continue
            cases: dict[str, list[tuple[int, int]]] = {"none": []}
            for k in engine.transformer.config.tokenizers:
                cases[f"same 1x{k}x{k}"] = [(pair[0], k)]
                cases[f"other 1x{k}x{k}"] = [(pair[1], k)]
            for name, memory in cases.items():
                value = error(engine, scene, pair, memory=memory, sigma=sigma)
                errors.setdefault(name, []).append(value)
    return {
        "error": {name: round(mean(values), 5) for name, values in errors.items()},
        "pairs": len(errors["none"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", default="tiny-nvs")
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--sigma", type=float, default=0.8, help="noise level, 0 to 1")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    engine = Engine.from_pretrained(args.checkpoint)
    seeds = range(FIRST_SCENE, FIRST_SCENE + args.scenes)
    result = {
        "checkpoint": engine.checkpoint.name,
        "scenes": args.scenes,
        "sigma": args.sigma,
        **measure(engine, seeds, args.sigma),
    }
    for name, value in result["error"].items():
        print(f"{name:14s} {value:.4f}  {value / result['error']['none']:.2f} of none")
    if args.out:
        save_json(args.out, result)


if __name__ == "__main__":
    main()
