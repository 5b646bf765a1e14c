"""What two videos of eight show, by who chooses them: no video model runs.

`python profiling/rankings.py [--checkpoint tiny-nvs] [--ranking FOLDER] [--scenes 40]
[--out profiling/results/rankings.json]`

The scenes, eight turns and two last turns of `run evaluate --turns 9 --grade furnished`, with true
views for turns. Of every last turn: the share of its pixels that the source surely does not show
and the two chosen videos do. Random is the mean over all pairs. Intervals are bootstraps over
scenes; a scene takes three seconds of a core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from measure import provenance

from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.checkpoints.detect import detect
from mv2v_engine.checkpoints.resolve import resolve
from mv2v_engine.errors import CheckpointError
from mv2v_engine.evaluation import bootstrap
from mv2v_engine.evaluation.comparisons import described
from mv2v_engine.evaluation.protocol import FIRST_SCENE, Protocol, scene_trajectories
from mv2v_engine.files import save_json
from mv2v_engine.memory.ranking import Ranker, chosen, coverage
from mv2v_engine.memory.retrieval import video_fov_scores
from mv2v_engine.synthetic.worlds import make_world
from mv2v_engine.training.ranking import Shown, shown
from mv2v_engine.vae import load_vae

CHOSEN = 2


def covered(scene: Shown, target: int, videos: Sequence[int]) -> float:
    """The share of what a target must invent that some videos show."""
    invented = scene.invented[target]
    seen = scene.seen[target, list(videos)].any(0) & invented
    return float(seen.sum() / invented.sum().clamp_min(1))


def choices(
    scene: Shown, target: int, ranker: Ranker | None, count: int = CHOSEN
) -> dict[str, list[tuple[int, ...]]]:
    """The videos that each ranking chooses; of random, all sets of so many."""
    videos = list(range(1, 9))
    cameras = [scene.cameras[video] for video in videos]
    scores = video_fov_scores(scene.cameras[target], cameras).tolist()
    by_fov = sorted(range(8), key=lambda number: (-scores[number], -number))[:count]
    left, seen = scene.left_volume(target, []), scene.volume[target, videos]
    truly = scene.left(target, []), scene.seen[target, videos]
    found = {
        "fov": by_fov,
        "coverage": [number for number, _ in chosen(left, seen, coverage, count)],
        "oracle": [number for number, _ in chosen(*truly, coverage, count)],
    }
    if ranker is not None:
        gain = ranker.gain(scene.known(target, videos))
        found["learned"] = [number for number, _ in chosen(left, seen, gain, count)]
    of_videos = {name: [tuple(videos[n] for n in numbers)] for name, numbers in found.items()}
    return of_videos | {"random": list(combinations(videos, count))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", default="tiny-nvs")
    parser.add_argument("--ranking", type=Path, help="a folder with its weights, if another one")
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = resolve(detect(args.checkpoint))
    assert found.vae_path is not None
    vae = load_vae(found.vae_path, device=torch.device("cpu"), dtype=torch.float32)
    ranker, missing = None, ""
    try:
        ranker = Ranker.read(args.ranking or found.detected.path, found.config.latent_channels)
    except CheckpointError as error:
        if args.ranking is not None:
            raise
        missing = str(error)
    protocol = Protocol(scenes=args.scenes, turns=9, grade="furnished")
    values: dict[str, list[float]] = {}
    for number, seed in enumerate(protocol.seeds):
        source = named_trajectory("static", found.sampling.num_frames, found.sampling.size)
        turns = scene_trajectories(seed, found.sampling, protocol.turns)
        scene = shown(make_world(seed, protocol.grade), [source, *turns.values()], vae)
        names = list(turns)
        of_scene: dict[str, list[float]] = {}
        for last in protocol.last:
            target = 1 + names.index(last)
            for name, picks in choices(scene, target, ranker).items():
                shares = [covered(scene, target, videos) for videos in picks]
                of_scene.setdefault(name, []).append(sum(shares) / len(shares))
        for name, shares in of_scene.items():
            values.setdefault(name, []).append(sum(shares) / len(shares))
        print(f"{number + 1}/{args.scenes}", {n: round(v[-1], 3) for n, v in values.items()})
    rows: dict[str, Any] = {}
    for name, own in values.items():
        rows[name] = {"shown": described(bootstrap.mean(own))}
        for base in ("random", "fov"):
            if name != base:
                gain = bootstrap.share(values[base], own, values["oracle"])
                rows[name][f"of_the_oracles_gain_over_{base}"] = described(gain)
        print(name, rows[name])
    if args.out is not None:
        record = {
            "command": "python profiling/rankings.py",
            "checkpoint": found.name,
            "scenes": args.scenes,
            "first_scene": FIRST_SCENE,
            "chosen": CHOSEN,
            **({"learned": f"not measured: {missing}"} if missing else {}),
            "rows": rows,
            **provenance(torch.device("cpu")),
        }
        save_json(args.out, record)


if __name__ == "__main__":
    main()
