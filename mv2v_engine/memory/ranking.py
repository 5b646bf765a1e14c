"""Rankings that choose one video after the other, each by what it adds to those before (METHOD 9).

Rays through cells of the target's image are followed to a few depths, and from there into every
other camera at the same moment. "coverage" takes the video that sees most of what neither the
source nor those already chosen see. "learned" asks a small network what a video adds, which is told
that share by depth, where the cameras end and what the video shows: it was trained on worlds whose
true depth says what hides what (`mv2v_engine.training.ranking`).

M videos, T moments, D depths, H W cells of the target's image, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mv2v_engine.camera.poses import compose, invert
from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.errors import CheckpointError
from mv2v_engine.files import save_tensors

# a network's weights, in the checkpoint's folder
FILE = "ranking.safetensors"
_DEPTHS = (1.5, 2.5, 4.0, 6.5)  # metres along the target's optical axis
_MOMENTS, _CELLS, _POOLED, _WIDTH = 5, (12, 20), (2, 2), 48

# what each video adds [M], by what is left [T, D, H, W] and what each sees [M, T, D, H, W], bool
Gain = Callable[[Tensor, Tensor], Tensor]


def moments(trajectory: CameraTrajectory) -> Tensor:
    """Numbers of the frames that are compared, the first and the last among them: [T]."""
    last = trajectory.num_frames - 1
    places = torch.linspace(0, last, _MOMENTS, dtype=torch.float32, device="cpu")
    return places.round().long()


def seen_volume(target: CameraTrajectory, videos: Sequence[CameraTrajectory]) -> Tensor:
    """Which points before the target's camera each video would see if nothing were hidden.

    Returns:
        bool [M, T, D, H, W].
    """
    (rows, columns), (height, width) = _CELLS, target.size
    frames = moments(target)
    k = _intrinsics(target, frames)
    y = (torch.arange(rows, device="cpu")[:, None] + 0.5) * height / rows
    x = (torch.arange(columns, device="cpu") + 0.5) * width / columns
    across, down = (x - k[..., 0, 2]) / k[..., 0, 0], (y - k[..., 1, 2]) / k[..., 1, 1]
    rays = torch.stack(torch.broadcast_tensors(across, down, torch.ones_like(x)), -1)
    points = rays * torch.tensor(_DEPTHS, device="cpu")[:, None, None, None]
    seen = []
    for video in videos:
        own = moments(video)
        move = compose(invert(video.poses[own]), target.poses[frames])[:, None, None, None]
        there = move[..., :3] @ points[..., None] + move[..., 3:]
        u, v, z = (_intrinsics(video, own) @ there)[..., 0].unbind(-1)
        inside = (u >= 0) & (v >= 0) & (u < video.size[1] * z) & (v < video.size[0] * z)
        seen.append(inside & (z > 0))
    return torch.stack(seen)


def _intrinsics(trajectory: CameraTrajectory, frames: Tensor) -> Tensor:
    """A trajectory's intrinsics at the moments, [T, 1, 1, 1, 3, 3]."""
    every = trajectory.intrinsics.expand(trajectory.num_frames, 3, 3)
    return every[frames][:, None, None, None]


def chosen(left: Tensor, seen: Tensor, gain: Gain, count: int) -> list[tuple[int, float]]:
    """Numbers and gains of at most `count` videos, one after the other, the best first.

    left: bool [T, D, H, W], what the source does not see. Of equal gains the last video comes
    first; one that sees nothing of what is left is left out.
    """
    found: list[tuple[int, float]] = []
    while len(found) < count:
        gains = gain(left, seen).masked_fill(~(seen & left).flatten(1).any(1), -1)
        order = [(float(value), number) for number, value in enumerate(gains)]
        value, best = max(order, default=(-1.0, 0))
        if value < 0:
            break
        found.append((best, value))
        left = left & ~seen[best]
    return found


def coverage(left: Tensor, seen: Tensor) -> Tensor:
    """Share of the target's points that each video sees of what is left: a `Gain`."""
    return (seen & left).flatten(1).float().mean(1)


def pooled(latents_CFHW: Tensor) -> Tensor:
    """What a video's last latent frame shows in few numbers, float32 [4 C] on the CPU."""
    return F.adaptive_avg_pool2d(latents_CFHW[:, -1].detach().float().cpu(), _POOLED).flatten()


def ends(target: CameraTrajectory, source: CameraTrajectory, video: CameraTrajectory) -> Tensor:
    """Where a video ends as seen from the target's end, and that from the source's: [24]."""
    last = target.poses[-1]
    own = compose(invert(last), video.poses[-1])
    return torch.cat([own.flatten(), compose(invert(source.poses[-1]), last).flatten()])


@dataclass(frozen=True, eq=False)
class Known:
    """What the network is told of videos beside what is left: `ends` [M, 24], `pooled` [M, 4 C]."""

    ends: Tensor
    pooled: Tensor


class Ranker(nn.Module):
    """Reckons which share of the target's pixels a video adds. channels: the latents' C."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        shares = 3 * len(_DEPTHS)
        self.latents = nn.Linear(channels * _POOLED[0] * _POOLED[1], _WIDTH // 2)
        self.hidden = nn.Linear(shares + 24 + _WIDTH // 2, _WIDTH)
        self.middle = nn.Linear(_WIDTH, _WIDTH)
        self.out = nn.Linear(_WIDTH, 1)

    def forward(self, known: Known, left: Tensor, seen: Tensor) -> Tensor:
        """Logits [M]. left: bool [T, D, H, W], or one a video."""
        masks = torch.stack([seen & left, seen, left.expand_as(seen)])
        shares = masks.float().mean((2, 4, 5)).transpose(0, 1).flatten(1)
        told = [shares, known.ends, F.silu(self.latents(known.pooled))]
        x = F.silu(self.hidden(torch.cat(told, 1)))
        logits: Tensor = self.out(x + F.silu(self.middle(x)))[:, 0]
        return logits

    def gain(self, known: Known) -> Gain:
        """The share that each video adds, as the network reckons it: a `Gain`."""

        @torch.no_grad()
        def gain(left: Tensor, seen: Tensor) -> Tensor:
            logits: Tensor = self(known, left, seen)
            return logits.sigmoid()

        return gain

    def save(self, folder: Path) -> None:
        """Write the weights in float16 into a checkpoint's folder."""
        half = {name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}
        save_tensors(folder / FILE, half, {"format": "pt"})

    @staticmethod
    def read(folder: Path, channels: int) -> Ranker:
        """What `save` has written.

        Raises:
            CheckpointError: there is none, it cannot be read, or it is of other latents.
        """
        path, made = folder / FILE, Ranker(channels)
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no {FILE}, which a learned ranking needs; use another "
                "memory_ranking, or train one with `python -m mv2v_engine.training.ranking`"
            )
        try:
            state = safetensors.torch.load_file(path)
            made.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            raise CheckpointError(
                f"{path} is no ranking of latents with {channels} channels ({error}); train it "
                "again with `python -m mv2v_engine.training.ranking`"
            ) from error
        if not all(bool(tensor.isfinite().all()) for tensor in made.state_dict().values()):
            raise CheckpointError(f"{path} holds numbers that are not finite; train it again")
        return made.eval()
