"""The latent cache: every clip of every scene encoded once, so that training never runs the VAE.

`python -m mv2v_engine.training.latents --scenes runs/scenes --vae runs/vae/vae --out runs/latents`

K cameras of a scene, F H W latent grid.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from mv2v_engine.camera.poses import pose_vectors, relative_to
from mv2v_engine.files import save_tensors
from mv2v_engine.training.scenes import load_scene
from mv2v_engine.vae import load_vae


@dataclass(frozen=True, eq=False)
class LatentScene:
    """latents [K, C, F, H, W] normalised, float16; poses [K, T, 3, 4] camera-to-world."""

    latents: Tensor
    poses: Tensor

    def cameras(self, tracks: list[int], source: int) -> Tensor:
        """12-vectors [V, F, 12] of the given cameras, relative to the source's first frame."""
        reference = self.poses[source, 0]
        return torch.stack(
            [pose_vectors(relative_to(self.poses[track], reference)) for track in tracks]
        )


def load_latents(folder: Path) -> list[LatentScene]:
    """Every scene of a latent cache, in order."""
    scenes = []
    for path in sorted(folder.glob("scene_*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            scenes.append(LatentScene(file.get_tensor("latents"), file.get_tensor("poses")))
    return scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scenes", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th scene from the i-th")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    vae = load_vae(args.vae, device=device, dtype=torch.float32)
    first, step = (int(part) for part in args.shard.split("/"))
    for path in tqdm(sorted(args.scenes.glob("scene_*.safetensors"))[first::step], unit="scene"):
        target = args.out / path.name
        if target.exists():
            continue
        scene = load_scene(path)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            latents = torch.stack([vae.encode(clip).cpu() for clip in scene.frames])
        save_tensors(target, {"latents": latents.half(), "poses": scene.poses})


if __name__ == "__main__":
    main()
