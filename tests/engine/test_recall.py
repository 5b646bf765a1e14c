"""Cameras on their way to attention: intrinsics, one world a session, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mv2v_engine import CameraTrajectory, Engine, EngineConfig
from mv2v_engine.camera.files import save_trajectory
from mv2v_engine.camera.poses import default_intrinsics
from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.engine import graphs
from mv2v_engine.engine.request import Request
from mv2v_engine.errors import CameraError
from tests.engine.graph_stand_in import StandIn

FRAMES, SIZE = 9, (48, 64)
CAMERAS = ("pan_right", "arc_left", "zoom_in")


@pytest.fixture(scope="module")
def prope(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prope")
    return make_checkpoint(folder, camera_attention="prope_fused", camera_conditioning="none")


@pytest.fixture(scope="module")
def engine(prope: Path) -> Engine:
    return Engine.from_pretrained(prope, device="cpu")


def _zoomed(camera: CameraTrajectory, by: Tensor) -> CameraTrajectory:
    """The same path through longer lenses [T]."""
    lens = camera.intrinsics.expand(FRAMES, 3, 3).clone()
    lens[:, :2, :2] *= by[:, None, None]
    return replace(camera, intrinsics=lens)


def test_a_checkpoint_tells_its_camera_attention(engine: Engine, prope: Path) -> None:
    assert engine.transformer.config.camera_attention == "prope_fused"
    words = json.loads((prope / "mv2v.json").read_text())["transformer"]
    assert (words["camera_attention"], words["scene_scale"]) == ("prope_fused", 4.0)


def test_a_lens_is_seen_from_the_file_to_the_picture(
    engine: Engine, source_frames: Tensor, tmp_path: Path
) -> None:
    pan = named_trajectory("pan_right", FRAMES, SIZE)
    zoom = _zoomed(pan, torch.linspace(1, 1.5, FRAMES))
    latents = {}
    for name, camera in {"default": pan, "zoom": zoom}.items():
        save_trajectory(tmp_path / f"{name}.json", camera)
        content = json.loads((tmp_path / f"{name}.json").read_text())
        if name == "default":
            del content["intrinsics"], content["size"]
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        turn = engine.session(source_frames).render(tmp_path / f"{name}.json")
        latents[name] = turn.latents
        assert torch.equal(turn.latents, engine.session(source_frames).render(camera).latents)
    # a file without intrinsics is seen through the default lens, as a preset is
    preset = engine.session(source_frames).render("pan_right").latents
    assert torch.equal(latents["default"], preset)
    assert not torch.allclose(latents["zoom"], preset, rtol=1e-3, atol=1e-3)


def test_a_turn_remembers_through_the_lens_it_was_filmed_with(
    engine: Engine, source_frames: Tensor
) -> None:
    later = []
    for by in (1.0, 1.4):
        session = engine.session(source_frames)
        first = session.render("pan_right")
        lens = _zoomed(first.trajectory, torch.full((FRAMES,), by))
        other = engine.session(source_frames)
        other.adopt(replace(first, trajectory=lens))
        later.append(other.render("arc_left").latents)
    assert not torch.allclose(*later, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_the_world_is_the_sources_first_camera(
    prope: Path, source_frames: Tensor, conditioning: str
) -> None:
    config = EngineConfig(conditioning=conditioning)  # type: ignore[arg-type]
    engine = Engine.from_pretrained(prope, device="cpu", config=config)
    moving = named_trajectory("zoom_in", FRAMES, SIZE)
    away = moving.poses.clone()
    away[:, :, 3] += torch.tensor([3.0, -2.0, 5.0])
    turns = []
    for poses in (moving.poses, away):
        session = engine.session(source_frames, cameras=replace(moving, poses=poses))
        turns.append([session.render(camera).latents for camera in CAMERAS])
    for ours, theirs in zip(*turns, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_warm_plan_is_the_turns(
    prope: Path, source_frames: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = StandIn()
    monkeypatch.setattr(graphs, "open_recorder", lambda device: recorder)
    config = EngineConfig(graphs="on", merge="conv", memory="retrieved")
    engine = Engine.from_pretrained(prope, device="cpu", config=config)
    session = engine.session(source_frames)
    request = Request.view("pan_right", engine.sampling, memory="retrieved")
    (row,) = engine.warmup([session.plan_turn(request)[1]])
    assert row["captured_steps"] == recorder.captures == 1
    session.render("pan_right")
    assert recorder.captures == 1


def _far(metres: float) -> CameraTrajectory:
    return named_trajectory(f"translate:{metres},0,0", FRAMES, SIZE)


def _lens(by: float) -> CameraTrajectory:
    return _zoomed(named_trajectory("static", FRAMES, SIZE), torch.full((FRAMES,), by))


@pytest.mark.parametrize(
    ("camera", "words"),
    [
        (_far(401), r"is 401 metres from .* within 400, 100 times its scene_scale"),
        (_lens(30), r"focal lengths of 30\.3.* images .* takes 1/20 to 20"),
        (_lens(0.01), r"are the intrinsics pixels of `size`\?"),
        (
            replace(_lens(1), intrinsics=default_intrinsics(480 * 40, 640 * 40)),
            r"a principal point up to .* off the centre",
        ),
    ],
    ids=["far", "long", "short", "other pixels"],
)
def test_what_attention_cannot_place_is_refused_before_any_work(
    engine: Engine, source_frames: Tensor, camera: CameraTrajectory, words: str
) -> None:
    session = engine.session(source_frames)
    with pytest.raises(CameraError, match=words):
        session.render(camera)
    assert session._runner.source_latents is None and not session.turns
    with pytest.raises(CameraError, match=words):
        engine.session(source_frames, cameras=camera)
    assert session.render(_far(399)).latents.isfinite().all()


def test_without_camera_attention_nothing_is_refused(
    tiny_checkpoint: Path, source_frames: Tensor
) -> None:
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu")
    for camera in (_far(401), _lens(30)):
        assert engine.session(source_frames).render(camera).latents.isfinite().all()
