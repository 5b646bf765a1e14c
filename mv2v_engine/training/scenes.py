"""Scenes on disk: rendered clips of procedural worlds, one safetensors file a world.

`python -m mv2v_engine.training.scenes --out runs/scenes --worlds 0:300`

K cameras, T frames.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from mv2v_engine.files import save_tensors
from mv2v_engine.synthetic.cameras import scene_cameras
from mv2v_engine.synthetic.render import render
from mv2v_engine.synthetic.worlds import HELD_OUT, make_world


@dataclass(frozen=True, eq=False)
class Scene:
    """frames uint8 [K, T, height, width, 3], poses [K, T, 3, 4] camera-to-world."""

    frames: Tensor
    poses: Tensor


def render_scene(seed: int, *, num_cameras: int, device: str = "cpu") -> Scene:
    """All cameras of one world."""
    world = make_world(seed)
    cameras = scene_cameras(seed, num_cameras=num_cameras)
    frames = torch.stack([render(world, camera, device=device).frames for camera in cameras])
    return Scene(frames.cpu(), torch.stack([camera.poses for camera in cameras]))


def scene_path(folder: Path, seed: int) -> Path:
    return folder / f"scene_{seed:07d}.safetensors"


def load_scene(path: Path) -> Scene:
    """A scene written by this module."""
    with safe_open(str(path), framework="pt") as file:
        return Scene(file.get_tensor("frames"), file.get_tensor("poses"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--worlds", default="0:300", help="first:last seed")
    parser.add_argument("--cameras", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    first, last = (int(part) for part in args.worlds.split(":"))
    if last > HELD_OUT:
        parser.error(f"worlds from {HELD_OUT} on are held out for measuring, got {args.worlds}")
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in tqdm(range(first, last), unit="world"):
        path = scene_path(args.out, seed)
        if not path.exists():
            scene = render_scene(seed, num_cameras=args.cameras, device=args.device)
            save_tensors(path, {"frames": scene.frames, "poses": scene.poses})


if __name__ == "__main__":
    main()
