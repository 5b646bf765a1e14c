"""How well a VAE reconstructs whole windows of worlds it never saw.

`python -m mv2v_engine.evaluation.reconstruction --worlds 8 --out profiling/results/vae.json`
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from mv2v_engine.checkpoints.detect import detect
from mv2v_engine.checkpoints.resolve import resolve
from mv2v_engine.errors import CheckpointError, MV2VError
from mv2v_engine.evaluation.images import masked_psnr
from mv2v_engine.files import save_json
from mv2v_engine.parser import Parser, count
from mv2v_engine.synthetic.cameras import scene_cameras
from mv2v_engine.synthetic.render import render
from mv2v_engine.synthetic.worlds import HELD_OUT, make_world
from mv2v_engine.vae import VideoVAE, load_vae


def reconstruction_psnr(vae: VideoVAE, num_worlds: int) -> list[float]:
    """PSNR in dB of a static and a moving clip of each of the first held-out worlds."""
    scores = []
    for seed in range(HELD_OUT, HELD_OUT + num_worlds):
        world = make_world(seed)
        for camera in scene_cameras(seed, num_cameras=2):
            frames = render(world, camera).frames
            scores.append(masked_psnr(vae.decode(vae.encode(frames)), frames))
    return scores


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", default="tiny-nvs")
    parser.add_argument("--worlds", type=count, default=8)
    parser.add_argument("--out", type=Path, required=True)
    try:
        args = parser.parse_args()
        found = resolve(detect(args.checkpoint))
        if found.vae_path is None:
            raise CheckpointError(
                f"{found.name} holds no VAE; give a checkpoint with one beside it"
            )
        vae = load_vae(found.vae_path, device=torch.device("cpu"), dtype=torch.float32)
    except MV2VError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    scores = reconstruction_psnr(vae, args.worlds)
    mean = sum(scores) / len(scores)
    result = {"checkpoint": found.name, "worlds": args.worlds, "psnr": round(mean, 3)}
    result |= {"psnr_lowest": round(min(scores), 3), "psnr_highest": round(max(scores), 3)}
    save_json(args.out, result)
    print(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
