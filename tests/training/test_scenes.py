"""Scenes on disk: what a seed renders, and that files give it back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.files import save_tensors
from mv2v_engine.synthetic.render import Rendering, render
from mv2v_engine.synthetic.worlds import HELD_OUT, World
from mv2v_engine.training import scenes
from mv2v_engine.training.scenes import WorldScenes, load_scene, render_scene, scene_path


def test_a_seed_is_a_scene(tmp_path: Path) -> None:
    scene = render_scene(HELD_OUT, num_cameras=2)
    assert scene.frames.shape == (2, 17, 96, 160, 3) and scene.frames.dtype == torch.uint8
    assert scene.poses.shape == (2, 17, 3, 4)
    # synchronised cameras: the same first frame, then views that part
    assert torch.equal(scene.frames[0, 0], scene.frames[1, 0])
    assert not torch.equal(scene.frames[0, -1], scene.frames[1, -1])
    path = scene_path(tmp_path, HELD_OUT)
    save_tensors(path, {"frames": scene.frames, "poses": scene.poses})
    again = load_scene(path)
    assert torch.equal(again.frames, scene.frames) and torch.equal(again.poses, scene.poses)


def test_worlds_are_rendered_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[str] = []

    def rendered(world: World, camera: CameraTrajectory, *, device: str) -> Rendering:
        devices.append(device)
        return render(world, camera)

    monkeypatch.setattr(scenes, "render", rendered)
    WorldScenes([3], "plain", 2, device="cuda").load("scene_plain_0000003")
    assert devices == ["cuda", "cuda"]


def test_paths_sort_by_seed(tmp_path: Path) -> None:
    seeds = [0, 9, 10, 299, HELD_OUT]
    assert sorted(scene_path(tmp_path, s) for s in seeds) == [
        scene_path(tmp_path, s) for s in seeds
    ]
