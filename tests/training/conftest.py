"""Small training sets of both kinds: a latent cache, and a folder in MultiCamVideo's layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mv2v_engine.training.latents import LatentCache, save_latents
from mv2v_engine.video.io import write_video

_CAMERAS, _SCENES, _LATENT_FRAMES = 10, 4, 3
_FRAMES = 5


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents say which scene and camera they are: 20 * scene + camera, in every cell.

    A camera stands still, its number in metres to the right, its scene's number down.
    """
    folder = tmp_path_factory.mktemp("latents")
    for scene in range(_SCENES):
        number = 20 * scene + torch.arange(_CAMERAS)
        latents = number[:, None, None, None, None].expand(-1, 4, _LATENT_FRAMES, 12, 20)
        poses = torch.eye(3, 4).repeat(_CAMERAS, 4 * _LATENT_FRAMES - 3, 1, 1)
        poses[:, :, 0, 3] = torch.arange(_CAMERAS)[:, None].float()
        poses[:, :, 1, 3] = 100.0 * scene
        save_latents(folder / f"scene_{scene:07d}.safetensors", latents.float(), poses)
    return folder


@pytest.fixture(scope="session")
def cache(cache_folder: Path) -> LatentCache:
    return LatentCache(cache_folder, device=torch.device("cpu"))


def _matrix(right: float) -> str:
    """Unreal's text: row vectors, centimetres; x forward, y right, z up, turned by nothing."""
    return f"[1 0 0 0] [0 1 0 0] [0 0 1 0] [0 {right:g} 150 1] "


@pytest.fixture(scope="session")
def multicam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scenes of three cameras; camera i starts 10 i cm to the right and moves 4 cm a frame.

    Frames are grey, 40 i + 10 t, wider than the window; do not change them.
    """
    root = tmp_path_factory.mktemp("MultiCamVideo")
    for scene in ("scene2", "scene10"):
        folder = root / "train" / "f24_aperture5" / scene
        (folder / "cameras").mkdir(parents=True)
        for i in (1, 2, 3):
            grey = (40 * i + 10 * torch.arange(_FRAMES)).to(torch.uint8)
            frames = grey[:, None, None, None].expand(-1, 64, 128, 3).contiguous()
            write_video(folder / "videos" / f"cam{i:02d}.mp4", frames, 15)
        content = {
            f"frame{t}": {f"cam{i:02d}": _matrix(10 * i + 4 * t) for i in (1, 2, 3)}
            for t in range(_FRAMES)
        }
        (folder / "cameras" / "camera_extrinsics.json").write_text(json.dumps(content))
    return root
