"""Two encoders of remembered videos that the paper compares, for `memory_study.py`.

Both give a fixed number of tokens in the place of a history's own, whatever its length, and both
are one small transformer over those tokens and the frames' patches, each with the Plücker rays of
its camera (CUT3R, arXiv 2501.12387, keeps such a state; LVSM, arXiv 2410.17242, such a latent):

"state"   the tokens are a recurrent state: frame after frame, state and frame attend to each other,
          and of what comes out the state alone is kept. A new frame never needs those before it.
"view"    all frames are read at once, in any order. A new frame needs all of them again.

A reader, trained beside the video model, asks either for a view by its rays alone. No checkpoint
carries these modules, so the engine does not know them: a plan takes their tokens as those of a
history that is encoded already.

B batch, C latent channels, F H W latent grid, P patches of a frame, L tokens, E width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mv2v_engine.camera.poses import default_intrinsics, normalised_intrinsics
from mv2v_engine.config import TransformerConfig
from mv2v_engine.models.attention import SelfAttention
from mv2v_engine.models.camera_encoder import POSE_DIM
from mv2v_engine.models.camera_rays import plucker_rays
from mv2v_engine.training.recipe import Batch

EncoderKind = Literal["state", "view"]
WIDTH, HEADS, LAYERS, READER_LAYERS, FEED_FORWARD = 96, 4, 4, 2, 4
_RAY, _PATCH = 6, 2


class Layer(nn.Module):
    """Attention and feed-forward, normalised before each, without positions."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps), nn.LayerNorm(WIDTH, eps)
        self.attention = SelfAttention(WIDTH, HEADS, eps)
        self.up = nn.Linear(WIDTH, FEED_FORWARD * WIDTH)
        self.down = nn.Linear(FEED_FORWARD * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        normed, attention = self.norm1(x), self.attention
        queries, pair = attention.queries(normed, None), attention.keys_values(normed, None)
        x = x + attention.out(attention.attend(queries, *pair))
        result: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return result


class MemoryEncoder(nn.Module):
    """A history's frames to `tokens` tokens. frames: of one of its videos, which tell the time."""

    def __init__(
        self, config: TransformerConfig, kind: EncoderKind, tokens: int, frames: int
    ) -> None:
        super().__init__()
        self.kind, self.frames, self.scale = kind, frames, config.scene_scale
        values = config.latent_channels * _PATCH**2
        self.patch = nn.Linear(values + _RAY + 1, WIDTH)
        self.begin = nn.Parameter(torch.randn(tokens, WIDTH))
        self.layers = nn.Sequential(*(Layer(config.eps) for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH, config.eps)
        self.proj = nn.Linear(WIDTH, config.dim)
        self.query = nn.Linear(_RAY + 1, WIDTH)
        self.reader = nn.Sequential(*(Layer(config.eps) for _ in range(READER_LAYERS)))
        self.reader_norm = nn.LayerNorm(WIDTH, config.eps)
        self.reader_proj = nn.Linear(WIDTH, values)

    def read(
        self, latents_BCFHW: Tensor, cameras_BFP: Tensor, state_BLE: Tensor | None = None
    ) -> Tensor:
        """The state [B, L, E] after whole videos, the latent of all of them at once.

        cameras: [B, F, 12] poses, or 16 with their lens. state: of the videos before, if any.

        Raises:
            ValueError: a latent of views was given the videos before as a state.
        """
        if self.kind == "view" and state_BLE is not None:
            raise ValueError("a latent of views has no state; give all videos at once")
        given = F.pixel_unshuffle(latents_BCFHW.transpose(1, 2).flatten(0, 1), _PATCH)
        patches = given.flatten(2).mT.unflatten(0, latents_BCFHW.shape[:3:2])
        where = self._where(cameras_BFP, (latents_BCFHW.shape[3], latents_BCFHW.shape[4]))
        tokens = self.patch(torch.cat([patches, where], -1))
        state = self.begin.expand(len(tokens), -1, -1) if state_BLE is None else state_BLE
        parts = tokens.unbind(1) if self.kind == "state" else [tokens.flatten(1, 2)]
        for part in parts:
            state = self.norm(self.layers(torch.cat([state, part], 1))[:, : state.shape[1]])
        return state

    def view(self, state_BLE: Tensor, cameras_BFP: Tensor, size: tuple[int, int]) -> Tensor:
        """Latents [B, C, F, H, W] of a video as the reader sees it from cameras [B, F, 12 or 16].

        size: its latent rows and columns.
        """
        where = self._where(cameras_BFP, size)
        queries = self.query(where).flatten(1, 2)
        seen = self.reader(torch.cat([state_BLE, queries], 1))[:, state_BLE.shape[1] :]
        patches = self.reader_proj(self.reader_norm(seen)).unflatten(1, where.shape[1:3])
        rows, columns = size[0] // _PATCH, size[1] // _PATCH
        images = patches.mT.unflatten(3, (rows, columns)).flatten(0, 1)
        video: Tensor = F.pixel_shuffle(images, _PATCH).unflatten(0, where.shape[:2])
        return video.transpose(1, 2)

    def _where(self, cameras_BFP: Tensor, size: tuple[int, int]) -> Tensor:
        """Ray and time of every patch [B, F, P, 7]."""
        if cameras_BFP.shape[-1] == POSE_DIM:
            lens = normalised_intrinsics(default_intrinsics(*size), size)
            cameras_BFP = torch.cat([cameras_BFP, lens.expand(*cameras_BFP.shape[:2], -1)], -1)
        cells = (size[0] // _PATCH, size[1] // _PATCH)
        # the same camera for a latent frame's four; moments in scenes, as directions are O(1)
        rays = plucker_rays(cameras_BFP.repeat(1, 1, 4), cells)[:, :, :_RAY].flatten(3).mT
        rays = torch.cat([rays[..., :3] / self.scale, rays[..., 3:]], -1)
        numbers = torch.arange(rays.shape[1]) % self.frames / self.frames
        where = torch.cat([rays, numbers[:, None, None].expand(*rays.shape[:3], 1)], -1)
        return where.to(self.begin.dtype)


def encoded(encoder: MemoryEncoder, batch: Batch) -> tuple[Batch, Tensor]:
    """The batch with an encoder's tokens in its history's place, and the state that they are of.

    A token is of no one frame, so that its camera is the world's.
    """
    *others, past = batch.plan.segments
    cameras, latents = batch.cameras, batch.latents[-1]
    assert past.camera is not None and cameras is not None
    state = encoder.read(latents, cameras[:, past.camera, : past.grid[0]])
    cameras = cameras.clone()
    cameras[:, past.camera, :, :POSE_DIM] = torch.eye(3, 4).flatten()
    plan = replace(batch.plan, segments=(*others, replace(past, is_encoded=True)))
    tokens = [*batch.latents[:-1], encoder.proj(state)]
    return replace(batch, plan=plan, latents=tokens, cameras=cameras), state


def view_loss(encoder: MemoryEncoder, batch: Batch, state: Tensor) -> Tensor:
    """Mean squared error of the target as the reader sees it. batch: as it was drawn."""
    assert batch.cameras is not None
    grid = batch.plan.target.grid
    found = encoder.view(state, batch.cameras[:, 0, : grid[0]], grid[1:])
    return (found - batch.targets).pow(2).mean()
