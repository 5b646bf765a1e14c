"""Crops, figures and statistics of the VAE's training."""

from __future__ import annotations

from pathlib import Path

import torch

from mv2v_engine.files import save_tensors
from mv2v_engine.training.scenes import scene_path
from mv2v_engine.training.vae import (
    TINY_VAE,
    ClipPool,
    latent_statistics,
    to_model_range,
)


def _write(folder: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (2, 9, 24, 40, 3), generator=generator, dtype=torch.uint8)
    save_tensors(scene_path(folder, seed), {"frames": frames, "poses": torch.zeros(2, 9, 3, 4)})


def test_frames_to_the_models_range() -> None:
    frames = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 4, 6, 3)
    video = to_model_range(frames)
    assert video.shape == (3, 2, 4, 6)
    assert float(video[:, 0].unique()) == -1 and float(video[:, 1].unique()) == 1


def test_crops_are_pieces_of_the_clips_and_follow_the_generator(tmp_path: Path) -> None:
    _write(tmp_path, 0)
    pool = ClipPool(tmp_path, limit=8)
    crops = pool.crops(torch.Generator().manual_seed(1), 6, 5, 16)
    assert crops.shape == (6, 3, 5, 16, 16)
    assert torch.equal(crops, pool.crops(torch.Generator().manual_seed(1), 6, 5, 16))
    clips = [to_model_range(clip) for clip in pool.clips]
    for crop in crops:
        # every crop lies in a clip, as it is or mirrored
        found = any(
            torch.equal(clip[:, t : t + 5, y : y + 16, x : x + 16], piece)
            for clip in clips
            for piece in (crop, crop.flip(-1))
            for t in range(5)
            for y in range(9)
            for x in range(25)
        )
        assert found


def test_the_pool_takes_up_new_scenes_to_its_limit(tmp_path: Path) -> None:
    _write(tmp_path, 0)
    pool = ClipPool(tmp_path, limit=2)
    assert len(pool.clips) == 2
    _write(tmp_path, 1)
    _write(tmp_path, 2)
    pool.refresh()
    pool.refresh()
    assert len(pool.clips) == 4


@torch.no_grad()
def test_statistics_standardise_the_latents() -> None:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(**TINY_VAE).eval()
    clips = list(torch.randint(0, 256, (3, 5, 16, 16, 3), dtype=torch.uint8))
    mean, std = latent_statistics(vae, clips)
    assert len(mean) == len(std) == 16
    latents = torch.cat(
        [vae.encode(to_model_range(clip)[None]).latent_dist.mode() for clip in clips]
    )
    normal = (latents - torch.tensor(mean).view(-1, 1, 1, 1)) / torch.tensor(std).view(-1, 1, 1, 1)
    per_channel = normal.movedim(1, 0).flatten(1)
    torch.testing.assert_close(per_channel.mean(1), torch.zeros(16), rtol=0, atol=1e-4)
    torch.testing.assert_close(per_channel.std(1), torch.ones(16), rtol=0, atol=1e-3)
