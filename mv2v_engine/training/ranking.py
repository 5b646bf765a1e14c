"""Train the network of `memory_ranking="learned"` (METHOD 9) into a checkpoint's folder.

`python -m mv2v_engine.training.ranking --checkpoint FOLDER`

Labels come free from worlds: the share of the target's pixels that a video shows at the same moment
and neither the source nor some others do, by true depth. No video model runs, only the VAE, for
what a video shows. The default worlds take two minutes of a core.

K videos of a world, the source first; T moments, h w pixels of a small picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.checkpoints.detect import detect, embedded_names
from mv2v_engine.checkpoints.resolve import resolve
from mv2v_engine.errors import TrainingError
from mv2v_engine.evaluation.visibility import project
from mv2v_engine.memory.ranking import FILE, Known, Ranker, ends, moments, pooled, seen_volume
from mv2v_engine.parser import Parser, count, positive
from mv2v_engine.synthetic.cameras import scene_cameras
from mv2v_engine.synthetic.render import render
from mv2v_engine.synthetic.worlds import HELD_OUT, Grade, World, make_world
from mv2v_engine.training.command import run_command
from mv2v_engine.training.odds import number
from mv2v_engine.vae import VideoVAE, load_vae

_SMALL = (24, 40)  # pixels of the pictures by which videos are compared
_POSITIVE_WEIGHT = 3.0  # more than 1, because shares are small
_TARGETS = 8  # targets of a step


@dataclass(frozen=True, eq=False)
class Shown:
    """What the videos of a world show of each other.

    seen: bool [K, K, T, h, w], which pixels of the first video the second one shows. invented:
    bool [K, T, h, w], those that the source surely does not. volume: `seen_volume` of each before
    all, [K, K, T, D, H, W]. pooled: [K, 4 C].
    """

    cameras: Sequence[CameraTrajectory]
    seen: Tensor
    invented: Tensor
    volume: Tensor
    pooled: Tensor

    def left(self, target: int, before: Sequence[int]) -> Tensor:
        """Pixels of the target [T, h, w] that neither the source nor those before show."""
        return self.invented[target] & ~self.seen[target, before].any(0)

    def left_volume(self, target: int, before: Sequence[int]) -> Tensor:
        """The same as a ranking reckons it, [T, D, H, W]."""
        return ~self.volume[target, [0, *before]].any(0)

    def known(self, target: int, videos: Sequence[int]) -> Known:
        """What a network is told of some of the videos."""
        cameras = self.cameras
        own = [ends(cameras[target], cameras[0], cameras[video]) for video in videos]
        return Known(torch.stack(own), self.pooled[videos])


def shown(world: World, cameras: Sequence[CameraTrajectory], vae: VideoVAE) -> Shown:
    """Compare the videos that cameras take of a world, the source's camera first."""
    small = [
        replace(camera.resized(_SMALL), poses=camera.poses[moments(camera)]) for camera in cameras
    ]
    depths = [render(world, camera, samples=1).depth for camera in small]
    pairs = [
        [project(*one, *other) for other in zip(small, depths, strict=True)]
        for one in zip(small, depths, strict=True)
    ]
    # clips of the moments alone, at the model's size: a fifth of the work of whole ones
    clips = (replace(camera, poses=camera.poses[moments(camera)]) for camera in cameras)
    return Shown(
        cameras,
        torch.stack([torch.stack([pair.seen for pair in row]) for row in pairs]),
        torch.stack([row[0].unseen for row in pairs]),
        torch.stack([seen_volume(camera, cameras) for camera in cameras]),
        torch.stack([pooled(vae.encode(render(world, clip).frames)) for clip in clips]),
    )


def draw(scene: Shown, generator: torch.Generator) -> tuple[Known, Tensor, Tensor, Tensor]:
    """A target, some videos chosen before, and the labels [M] of all others.

    Returns:
        what the network is told of the others, what is left, what they see, and the share of the
        target's pixels that each adds.
    """
    count = len(scene.cameras)
    target = number(1, count - 1, generator)
    videos = [video for video in range(1, count) if video != target]
    drawn = torch.randperm(len(videos), generator=generator)[: number(0, 3, generator)]
    before = [videos[index] for index in drawn.tolist()]
    added = scene.seen[target, videos] & scene.left(target, before)
    left, volume = scene.left_volume(target, before), scene.volume[target, videos]
    share = added.flatten(1).float().mean(1)
    return scene.known(target, videos), left.expand_as(volume), volume, share


def train(scenes: Sequence[Shown], channels: int, steps: int, learning_rate: float) -> Ranker:
    """A network after binary cross-entropy with the labels."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    ranker, weight = Ranker(channels), torch.tensor(_POSITIVE_WEIGHT)
    optimizer = torch.optim.AdamW(ranker.parameters(), lr=learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    bar = tqdm(range(steps), unit="step")
    for _ in bar:
        drawn = [
            draw(scenes[number(0, len(scenes) - 1, generator)], generator) for _ in range(_TARGETS)
        ]
        known, left, seen, share = zip(*drawn, strict=True)
        told = Known(*(torch.cat([getattr(k, n) for k in known]) for n in ("ends", "pooled")))
        logits = ranker(told, torch.cat(left), torch.cat(seen))
        loss = F.binary_cross_entropy_with_logits(logits, torch.cat(share), pos_weight=weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{float(loss.detach()):.4f}")
    return ranker.eval()


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", required=True, metavar="NAME_OR_PATH")
    parser.add_argument("--out", type=Path, help="the folder that gets it; the checkpoint's if not")
    parser.add_argument("--worlds", type=count, default=60)
    parser.add_argument(
        "--grade", choices=get_args(Grade), default="furnished", help="grade of the worlds"
    )
    parser.add_argument("--cameras", type=count, default=10, help="of a world")
    parser.add_argument("--steps", type=count, default=1500)
    parser.add_argument("--learning-rate", type=positive, default=3e-3)
    args = parser.parse_args()
    if args.worlds > HELD_OUT:
        parser.error(f"worlds from {HELD_OUT} on are held out for measuring, got {args.worlds}")
    if args.cameras < 3:
        parser.error(f"--cameras must be at least 3, got {args.cameras}")
    found = resolve(detect(args.checkpoint))
    if not found.config.has_camera or found.vae_path is None:
        raise TrainingError(
            f"{args.checkpoint} has no {'VAE' if found.config.has_camera else 'cameras'}; a "
            "learned ranking is of novel views and reads latents: give such a checkpoint"
        )
    out = args.out or found.detected.path
    if args.out is None and args.checkpoint in embedded_names():
        parser.error(
            f"{args.checkpoint} is embedded in the package; copy its folder, {out}, and give the "
            "copy by a path that is not the bare name, or say by --out where the network goes"
        )
    if out.is_file():
        parser.error(f"{out} is a file, and the network lies in a folder; say by --out in which")
    vae = load_vae(found.vae_path, device=torch.device("cpu"), dtype=torch.float32)
    sampling = found.sampling
    scenes = [
        shown_world(seed, args.grade, args.cameras, sampling.num_frames, sampling.size, vae)
        for seed in tqdm(range(args.worlds), unit="world")
    ]
    ranker = train(scenes, found.config.latent_channels, args.steps, args.learning_rate)
    ranker.save(out)
    print(f'wrote {out / FILE}; use it with memory_ranking="learned"')


def shown_world(
    seed: int, grade: Grade, count: int, frames: int, size: tuple[int, int], vae: VideoVAE
) -> Shown:
    """`shown` of a world of training, with as many cameras as asked for, a static one first."""
    cameras = scene_cameras(seed, num_cameras=count, num_frames=frames, size=size)
    return shown(make_world(seed, grade), cameras, vae)


if __name__ == "__main__":
    run_command(main)
