"""Rays of cameras as tokens, and the phases by which they turn attention (ReDirector, 2511.19827).

Every pixel of every frame has the six Plücker numbers of its ray. A convolution, `control_adapter`
of Wan-Fun's camera control, makes of them what is added to a video's tokens before the first block.
Each block makes two sets of phases of the same: one turns q and k beside their positions, the
other turns v back, and the result forth. Time is left as it is, so that phases tell videos apart
that share their temporal ids.

B batch, F latent frames, H W pixels, L tokens, N heads, D head dim, C width, P phases of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mv2v_engine.tokens.plan import Segment

# frames of a latent frame, numbers of a ray, pixels along a side of a latent cell
_FRAMES, _RAY, _CELL = 4, 6, 8
# latent frames whose rays are there at once: 480x832 pixels of one take 38 MB
_AT_ONCE = 4


def plucker_rays(cameras_BFP: Tensor, size: tuple[int, int]) -> Tensor:
    """Rays float32 [B, F, 24, H, W] of cameras [B, F, 64], as `CameraTrajectory.vectors` has them.

    Six numbers, o x d and d of unit length, of each pixel's centre in the world of the poses; each
    number of a latent frame's four frames side by side.
    """
    height, width = size
    pose, lens = cameras_BFP.float().unflatten(-1, (_FRAMES, 16)).split([12, 4], -1)
    rotation, place = pose.unflatten(-1, (3, 4)).split([3, 1], -1)  # camera to world
    fx, fy, cx, cy = (each[..., None, None] for each in lens.unbind(-1))
    rows = (torch.arange(height, device=pose.device) + 0.5)[:, None] / height - 0.5
    columns = (torch.arange(width, device=pose.device) + 0.5) / width - 0.5
    x, y = torch.broadcast_tensors((columns - cx) / fx, (rows - cy) / fy)
    direction = F.normalize(torch.stack([x, y, torch.ones_like(x)], -1), dim=-1)
    # sums written out: a product on a GPU may round to fewer digits
    direction = (direction[..., None, :] * rotation[..., None, None, :, :]).sum(-1)
    origin = place[..., 0][..., None, None, :].expand_as(direction)
    rays = torch.cat([torch.linalg.cross(origin, direction), direction], -1)
    return rays.permute(0, 1, 5, 2, 3, 4).flatten(2, 3)


class _ResidualBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.conv2(F.relu(self.conv1(x)))
        return result


class CameraAdapter(nn.Module):
    """`control_adapter`: rays to what is added to a video's tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(_FRAMES * _RAY * _CELL**2, dim, 2, stride=2)
        self.residual_blocks = nn.ModuleList([_ResidualBlock(dim)])

    def forward(self, cameras_BFP: Tensor, segment: Segment) -> Tensor:
        """Tokens [B, L, C] of a segment from the cameras [B, F, 64] of its frames.

        A token of a coarser tokenizer has the mean over the cells that it covers, as its video has
        under weights that were made of the patch embedding.
        """
        size = (segment.grid[1] * _CELL, segment.grid[2] * _CELL)
        chunks = [self._tokens(part, size) for part in cameras_BFP.split(_AT_ONCE, 1)]
        cells, covered = torch.cat(chunks, 1), segment.tokenizer // 2
        if covered > 1:
            images = cells.flatten(0, 1)
            pad = (0, -images.shape[-1] % covered, 0, -images.shape[-2] % covered)
            images = F.avg_pool2d(F.pad(images, pad, mode="replicate"), covered)
            cells = images.unflatten(0, cells.shape[:2])
        return cells.flatten(3).transpose(2, 3).flatten(1, 2)

    def _tokens(self, cameras_BFP: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, F, C, rows, columns] of 1x2x2 patches."""
        rays = plucker_rays(cameras_BFP, size).to(self.conv.weight.dtype)
        images = self.conv(F.pixel_unshuffle(rays.flatten(0, 1), _CELL))
        for block in self.residual_blocks:
            images = block(images)
        result: Tensor = images.unflatten(0, rays.shape[:2])
        return result


def phase_layer(dim: int, num_phases: int) -> nn.Sequential:
    """Makes the phases of all heads; zero at the start, as ReDirector's code has it."""
    linear = nn.Linear(dim, num_phases, bias=False)
    nn.init.zeros_(linear.weight)
    return nn.Sequential(nn.SiLU(), linear)


def turned(x_BLND: Tensor, phases_BLNP: Tensor) -> Tensor:
    """The last P pairs of channels of every head turned by their phases, in float32."""
    count = 2 * phases_BLNP.shape[-1]
    still, moved = x_BLND.split([x_BLND.shape[-1] - count, count], -1)
    even, odd = moved.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = phases_BLNP.float().cos(), phases_BLNP.float().sin()
    pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    return torch.cat([still, pairs.to(x_BLND.dtype)], -1)
