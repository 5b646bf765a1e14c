"""The latent cache on disk, and cameras relative to the source."""

from __future__ import annotations

from pathlib import Path

import torch

from mv2v_engine.camera.poses import compose, relative_to
from mv2v_engine.files import save_tensors
from mv2v_engine.synthetic.cameras import scene_cameras
from mv2v_engine.training.latents import LatentScene, load_latents


def _scene(seed: int) -> LatentScene:
    cameras = scene_cameras(seed, num_cameras=3, num_frames=9)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(3, 4, 3, 6, 10, generator=generator).half()
    return LatentScene(latents, torch.stack([camera.poses for camera in cameras]))


def test_scenes_come_back_in_order(tmp_path: Path) -> None:
    for seed in (2, 0, 1):
        scene = _scene(seed)
        tensors = {"latents": scene.latents, "poses": scene.poses}
        save_tensors(tmp_path / f"scene_{seed:07d}.safetensors", tensors)
    (tmp_path / "notes.txt").write_text("not a scene")
    loaded = load_latents(tmp_path)
    assert len(loaded) == 3
    for seed, scene in enumerate(loaded):
        assert torch.equal(scene.latents, _scene(seed).latents)
        assert torch.equal(scene.poses, _scene(seed).poses)
    assert load_latents(tmp_path / "nowhere") == []


def test_cameras_are_relative_to_the_sources_first_frame() -> None:
    scene = _scene(0)
    # as if the whole rig had been moved: relative poses do not notice
    moved = LatentScene(scene.latents, compose(scene.poses[1, 4], scene.poses))
    for rig in (scene, moved):
        vectors = rig.cameras([2, 1], 1)
        assert vectors.shape == (2, 3, 12)
        expected = relative_to(scene.poses[2], scene.poses[1, 0])[::4].flatten(1)
        torch.testing.assert_close(vectors[0], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(vectors[1, 0], torch.eye(3, 4).flatten(), rtol=0, atol=1e-5)
