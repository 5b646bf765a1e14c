"""Latent caches whose videos say which scene and camera they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mv2v_engine.training.latents import LatentCache, save_latents

CAMERAS, SCENES, FRAMES = 10, 4, 3


def write_cache(
    folder: Path, *, cameras: int = CAMERAS, scenes: int = SCENES, text: Tensor | None = None
) -> Path:
    """Latents are 20 * scene + camera in every cell.

    A camera stands still, its number in metres to the right, its scene's number down.
    """
    for scene in range(scenes):
        number = 20 * scene + torch.arange(cameras)
        latents = number[:, None, None, None, None].expand(-1, 4, FRAMES, 12, 20).float()
        poses = torch.eye(3, 4).repeat(cameras, 4 * FRAMES - 3, 1, 1)
        poses[:, :, 0, 3] = torch.arange(cameras)[:, None].float()
        poses[:, :, 1, 3] = 100.0 * scene
        save_latents(folder / f"scene_{scene:07d}.safetensors", latents, poses, text)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    return LatentCache(write_cache(tmp_path_factory.mktemp("latents")), torch.device("cpu"))
