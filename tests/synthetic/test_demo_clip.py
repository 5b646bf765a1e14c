"""The demo's clip: the embedded model's window, of a world that it never saw."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.synthetic import demo_clip
from mv2v_engine.synthetic.edit_worlds import edit_camera, make_edit_world, target_in_view
from mv2v_engine.synthetic.instructions import all_prompts
from mv2v_engine.synthetic.render import render
from mv2v_engine.synthetic.worlds import BOX, CYLINDER, NUM_WALLS, SPHERE, make_world
from mv2v_engine.video.io import probe_video, read_video


def test_the_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / "made" / f"{name}.mp4" for name in ("one", "again", "other")]
    seeds: list[list[str]] = [[], [], ["--seed", "1000034"]]
    for path, more in zip(paths, seeds, strict=True):
        monkeypatch.setattr("sys.argv", ["demo_clip", "--out", str(path), *more])
        assert demo_clip.main() == 0
    clip = read_video(paths[0])
    assert clip.frames.shape == (17, 96, 160, 3) and clip.fps == 8
    assert demo_clip.DEMO_WORLD >= 1_000_000
    # something moves while the camera stands still
    assert (clip.frames[0].float() - clip.frames[8].float()).abs().max() > 60
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert not torch.equal(read_video(paths[2]).frames, clip.frames)


def test_an_unwritable_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["demo_clip", "--out", str(tmp_path / "file" / "clip.mp4")])
    assert demo_clip.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot write") and error.count("\n") == 1


def test_the_clip_to_edit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "long.mp4"
    monkeypatch.setattr("sys.argv", ["demo_clip", "--edit", "--out", str(path)])
    assert demo_clip.main() == 0
    assert probe_video(path).num_frames == 5 * 17 and probe_video(path).fps == 8
    words = shlex.split(capsys.readouterr().out)
    assert words[3:5] == ["edit", str(path)] and words[words.index("--prompt") + 1] in all_prompts()
    # the prompt names one thing, which is of another colour and is gone for two windows
    world = make_edit_world(demo_clip.EDIT_WORLD, num_frames=85)
    assert "sphere" in world.target_phrases and world.looks[0].colour != "red"
    camera = edit_camera(world, demo_clip.EDIT_WORLD, num_frames=85, size=(96, 160))
    seen = target_in_view(world.world, camera)
    assert bool(seen[0]) and not bool(seen[15:49].any()) and bool(seen[60])


def test_the_views_clip_shows_what_it_was_chosen_for() -> None:
    """A sphere, a box and a cylinder; and both cameras uncover a thing that the source hides."""
    world = make_world(demo_clip.DEMO_WORLD, "plain")

    def shares(camera: str, frame: int) -> Tensor:
        path = named_trajectory(camera, 17, (96, 160))
        moment = replace(path, poses=path.poses[frame : frame + 1])
        surface = render(world, moment, samples=1).surface.flatten()
        counts = torch.bincount(surface, minlength=NUM_WALLS + len(world.kind_N))
        return counts[NUM_WALLS:] / len(surface)

    first = shares("static", 0)
    assert set(world.kind_N[first >= 0.02].tolist()) == {SPHERE, BOX, CYLINDER}
    for camera in ("pan_right", "arc_left"):
        assert bool((shares(camera, 16)[first < 0.001] >= 0.02).any()), camera
