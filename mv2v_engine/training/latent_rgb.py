"""Fit the linear colours of a VAE's latents to worlds, into the VAE's folder: what previews use.

`python -m mv2v_engine.training.latent_rgb --vae runs/vae/vae`
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mv2v_engine.evaluation.images import masked_psnr
from mv2v_engine.models.latent_rgb import FILE, LatentRGB, cell_colours
from mv2v_engine.parser import Parser, count
from mv2v_engine.synthetic.cameras import scene_cameras
from mv2v_engine.synthetic.render import render
from mv2v_engine.synthetic.worlds import HELD_OUT, make_world
from mv2v_engine.training.command import run_command
from mv2v_engine.vae import VideoVAE, load_vae


def encoded_worlds(vae: VideoVAE, seeds: range) -> Iterator[tuple[Tensor, Tensor]]:
    """Latents and frames of a static and a moving clip of each world."""
    for seed in seeds:
        world = make_world(seed)
        for camera in scene_cameras(seed, num_cameras=2):
            frames = render(world, camera).frames
            yield vae.encode(frames), frames


def psnr(colours: LatentRGB, vae: VideoVAE, seeds: range) -> float:
    """dB of the pictures against the cells' mean colours, the mean over clips."""
    scores = []
    for latents, frames in encoded_worlds(vae, seeds):
        shown = torch.stack([colours.picture(frame) for frame in latents.unbind(1)])
        expected = (cell_colours(frames, latents.shape[1:]) + 1) * 127.5
        scores.append(masked_psnr(shown, expected.permute(1, 2, 3, 0).round().to(torch.uint8)))
    return sum(scores) / len(scores)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--vae", type=Path, required=True, help="the VAE's folder")
    parser.add_argument("--worlds", type=count, default=32, help="rendered to fit to")
    args = parser.parse_args()
    vae = load_vae(args.vae, device=torch.device("cpu"), dtype=torch.float32)
    LatentRGB.fitted(encoded_worlds(vae, range(args.worlds))).save(args.vae / FILE)
    stored = LatentRGB.read(args.vae / FILE, vae.latent_channels)
    score = psnr(stored, vae, range(HELD_OUT, HELD_OUT + 4))
    print(f"{args.vae / FILE}: {score:.2f} dB against the cells' mean colours in held-out worlds")


if __name__ == "__main__":
    run_command(main)
