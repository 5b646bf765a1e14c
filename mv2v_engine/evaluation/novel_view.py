"""How near a checkpoint's novel views come to the truth, on worlds it never saw.

`python -m mv2v_engine.evaluation.novel_view --worlds 8 --out profiling/results/novel_view.json`

For each held-out world a static source is re-rendered by some presets in one session, and each
turn is compared with the true view: the whole frame, where the source sees the point, and where
it does not. Three references stand beside it: the source's own frames (a camera that ignores
the request), the true view through the VAE (the best any denoiser could do), and the same turn
without memory. Numbers are PSNR in dB, means over worlds and turns.
"""

from __future__ import annotations

import argparse
import platform
from collections import defaultdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mv2v_engine.camera.trajectories import CameraTrajectory, named_trajectory
from mv2v_engine.config import MemoryMode
from mv2v_engine.engine.engine import Engine
from mv2v_engine.engine.session import Session
from mv2v_engine.evaluation.images import masked_psnr
from mv2v_engine.evaluation.visibility import seen_by
from mv2v_engine.files import save_json
from mv2v_engine.synthetic.render import Rendering, render
from mv2v_engine.synthetic.worlds import HELD_OUT, World, make_world

FIRST_WORLD = HELD_OUT + 1_000_000  # apart from the worlds that the VAE is measured on
CAMERAS = ("pan_right", "arc_left", "zoom_in", "pan_right")


def _film(world: World, spec: str, engine: Engine) -> tuple[CameraTrajectory, Rendering]:
    sampling = engine.sampling
    camera = named_trajectory(spec, sampling.num_frames, sampling.size)
    return camera, render(world, camera)


def _scores(
    session: Session, world: World, source: Rendering, memory: MemoryMode, steps: int | None
) -> list[dict[str, Any]]:
    engine, rows = session.engine, []
    still = named_trajectory("static", engine.sampling.num_frames, engine.sampling.size)
    for spec in CAMERAS:
        camera, truth = _film(world, spec, engine)
        turn = session.render(spec, memory=memory, num_inference_steps=steps)
        seen = seen_by(camera, truth.depth, still, source.depth)
        decoded = engine.vae.decode(engine.vae.encode(truth.frames))
        rows.append(
            {
                "camera": spec,
                "psnr": masked_psnr(turn.frames, truth.frames),
                "psnr_seen": masked_psnr(turn.frames, truth.frames, seen),
                "psnr_unseen": masked_psnr(turn.frames, truth.frames, ~seen),
                "source_psnr": masked_psnr(source.frames, truth.frames),
                "vae_psnr": masked_psnr(decoded, truth.frames),
                "seen_fraction": float(seen.float().mean()),
                "retrieved": len(turn.report["memory"]["retrieved"]),
                "seconds": sum(turn.report["seconds"].values()),
            }
        )
    return rows


def evaluate(engine: Engine, *, num_worlds: int, steps: int | None = None) -> dict[str, Any]:
    """Rows per memory mode: means over worlds and turns, and the same by camera."""
    collected: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for seed in tqdm(range(FIRST_WORLD, FIRST_WORLD + num_worlds), unit="world"):
        world = make_world(seed)
        _, source = _film(world, "static", engine)
        modes: tuple[MemoryMode, ...] = ("retrieved", "none")
        for memory in modes:
            session = engine.session(source.frames, fps=8.0)
            collected[memory] += _scores(session, world, source, memory, steps)
            session.close()
    return {
        "worlds": num_worlds,
        "cameras": list(CAMERAS),
        "engine": engine.describe(),
        "machine": platform.machine(),
        "rows": {memory: _summary(rows) for memory, rows in collected.items()},
    }


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def means(chosen: list[dict[str, Any]]) -> dict[str, float]:
        names = [name for name, value in chosen[0].items() if isinstance(value, (int, float))]
        return {name: round(sum(row[name] for row in chosen) / len(chosen), 3) for name in names}

    cameras = dict.fromkeys(row["camera"] for row in rows)
    by_camera = {camera: means([r for r in rows if r["camera"] == camera]) for camera in cameras}
    return {**means(rows), "by_camera": by_camera}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", default="tiny-nvs")
    parser.add_argument("--worlds", type=int, default=8)
    parser.add_argument("--steps", type=int, help="denoising steps; the checkpoint's if left out")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    engine = Engine.from_pretrained(args.checkpoint)
    result = evaluate(engine, num_worlds=args.worlds, steps=args.steps)
    save_json(args.out, result)
    for memory, row in result["rows"].items():
        print(memory, {name: value for name, value in row.items() if name != "by_camera"})


if __name__ == "__main__":
    main()
