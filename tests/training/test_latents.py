"""The latent cache: what scenes become, how tracks come back, and what a damaged one says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mv2v_engine
from mv2v_engine.camera.poses import compose, relative_to
from mv2v_engine.errors import RequestError, TrainingError
from mv2v_engine.files import save_tensors
from mv2v_engine.synthetic.cameras import scene_cameras
from mv2v_engine.synthetic.worlds import HELD_OUT
from mv2v_engine.text import load_text_encoder
from mv2v_engine.training import latents
from mv2v_engine.training.latents import LatentCache, encode_scenes, save_latents, trim_text
from mv2v_engine.training.multicam import MultiCamVideo
from mv2v_engine.training.scenes import RenderedScenes, Scene, scene_path
from mv2v_engine.vae import load_vae

CPU = torch.device("cpu")


def _poses(seed: int) -> Tensor:
    cameras = scene_cameras(seed, num_cameras=3, num_frames=9)
    return torch.stack([camera.poses for camera in cameras])


def _latents(seed: int) -> Tensor:
    return torch.randn(3, 4, 3, 6, 10, generator=torch.Generator().manual_seed(seed)).half()


def _write(folder: Path, *seeds: int, poses: Tensor | None = None) -> Path:
    for seed in seeds:
        save_latents(
            scene_path(folder, seed), _latents(seed), _poses(seed) if poses is None else poses
        )
    return folder


@pytest.mark.parametrize("device", [CPU, None], ids=["resident", "from-disk"])
def test_tracks_come_back_by_scene_and_number(tmp_path: Path, device: torch.device | None) -> None:
    (tmp_path / "notes.txt").write_text("not a scene")
    cache = LatentCache(_write(tmp_path, 2, 0, 1), device=device)
    assert len(cache) == 3 and cache.latent_shape == (4, 3, 6, 10)
    for seed in range(3):
        assert cache.num_tracks(seed) == 3 and cache.still_track(seed) == 0
        drawn = cache.draw(seed, [2, 0], 0)
        assert torch.equal(drawn.latents, _latents(seed)[[2, 0]].float())
        assert drawn.text is None


def test_the_target_brings_its_own_caption(tmp_path: Path) -> None:
    text = torch.arange(3).float()[:, None, None].expand(3, 2, 5)
    save_latents(scene_path(tmp_path, 0), _latents(0), _poses(0), text)
    for device in (CPU, None):
        drawn = LatentCache(tmp_path, device=device).draw(0, [2, 1], 1)
        assert drawn.text is not None and torch.equal(drawn.text.float(), text[2])


def test_cameras_are_relative_to_the_sources_first_frame(tmp_path: Path) -> None:
    poses = _poses(0)
    # as if the whole rig had been moved: relative poses do not notice
    for name, rig in (("here", poses), ("moved", compose(poses[1, 4], poses))):
        vectors = LatentCache(_write(tmp_path / name, 0, poses=rig)).draw(0, [2, 1], 1).cameras
        assert vectors.shape == (2, 3, 12)
        expected = relative_to(poses[2], poses[1, 0])[::4].flatten(1)
        torch.testing.assert_close(vectors[0], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(vectors[1, 0], torch.eye(3, 4).flatten(), rtol=0, atol=1e-5)


def test_lenses_come_with_their_cameras(tmp_path: Path) -> None:
    lenses = torch.arange(12.0).reshape(3, 4)
    save_latents(scene_path(tmp_path, 0), _latents(0), _poses(0), None, lenses)
    save_latents(scene_path(tmp_path, 1), _latents(1), _poses(1))
    cache = LatentCache(tmp_path)
    drawn = cache.draw(0, [2, 0], 0).cameras
    assert torch.equal(drawn[..., 12:], lenses[[2, 0], None].expand(2, 3, 4))
    assert cache.draw(1, [2, 0], 0).cameras.shape == (2, 3, 12)
    save_latents(scene_path(tmp_path, 1), _latents(1), _poses(1), None, lenses[:2])
    with pytest.raises(TrainingError, match=r"intrinsics \[2, 4\] are not \[3, 4\]"):
        LatentCache(tmp_path)


def test_where_every_camera_moves_none_stands_still(tmp_path: Path) -> None:
    assert LatentCache(_write(tmp_path, 0, poses=_poses(0)[[1, 2, 1]])).still_track(0) is None


def test_an_empty_cache_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"mv2v_engine\.training\.latents"):
        LatentCache(tmp_path)
    with pytest.raises(TrainingError, match=r"mv2v_engine\.training\.scenes"):
        RenderedScenes(tmp_path)


def test_a_damaged_scene_is_named(tmp_path: Path) -> None:
    path = scene_path(_write(tmp_path, 0, 1), 1)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not latents"):
        path.write_bytes(content)
        with pytest.raises(TrainingError, match=rf"{path.name} .*delete it"):
            LatentCache(tmp_path)


def test_poses_of_another_length_are_refused(tmp_path: Path) -> None:
    _write(tmp_path, 0, poses=_poses(0)[:, :5])
    with pytest.raises(TrainingError, match=r"poses \[3, 5, 3, 4\] do not belong together"):
        LatentCache(tmp_path)


def test_scenes_of_different_shapes_are_refused(tmp_path: Path) -> None:
    _write(tmp_path, 0)
    save_latents(scene_path(tmp_path, 1), _latents(1)[..., :8], _poses(1))
    with pytest.raises(TrainingError, match=r"scene_0000001.safetensors \[4, 3, 6, 8\]"):
        LatentCache(tmp_path)


class _Scenes:
    """Four scenes: whole, without one camera, broken, whole."""

    names: Sequence[str] = ("scene_a", "scene_b", "scene_c", "scene_d")
    broken = "scene_c"

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def load(self, name: str) -> Scene:
        self.loaded.append(name)
        if name == self.broken:
            raise TrainingError(f"{name} has no cameras")
        skipped = ("cam02: cam02.mp4 is missing",) if name == "scene_b" else ()
        frames = torch.zeros(3, 9, 48, 80, 3, dtype=torch.uint8)
        return Scene(frames, _poses(0), skipped=skipped)


def _encode(scene: Scene) -> tuple[Tensor, Tensor | None]:
    return torch.zeros(len(scene.frames), 4, 3, 6, 10), None


def test_what_is_left_out_is_reported_and_the_rest_encoded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, report = _Scenes(), tmp_path / "skipped_0_of_1.json"
    skipped = encode_scenes(source, source.names, tmp_path, _encode, report=report)
    assert skipped == {
        "scene_b": ["cam02: cam02.mp4 is missing"],
        "scene_c": ["scene_c has no cameras"],
    }
    assert json.loads(report.read_text()) == skipped
    assert "scene_c: left out scene_c has no cameras" in capsys.readouterr().out
    assert len(LatentCache(tmp_path)) == 3

    # again: what is there stays, what was broken is tried anew, and the report is kept up
    again = _Scenes()
    assert encode_scenes(again, again.names, tmp_path, _encode, report=report) == skipped
    assert again.loaded == ["scene_c"]
    mended = _Scenes()
    mended.broken = ""
    encode_scenes(mended, mended.names, tmp_path, _encode, report=report)
    assert len(LatentCache(tmp_path)) == 4
    assert list(json.loads(report.read_text())) == ["scene_b"]


@pytest.mark.parametrize(("first", "message"), [(1, "cam02.mp4 is missing"), (2, "no cameras")])
def test_strict_stops_at_the_first_thing_left_out(tmp_path: Path, first: int, message: str) -> None:
    source, report = _Scenes(), tmp_path / "skipped.json"
    with pytest.raises(TrainingError, match=message):
        encode_scenes(source, source.names[first:], tmp_path, _encode, report=report, strict=True)


def test_a_damaged_rendered_scene_is_named(tmp_path: Path) -> None:
    path = scene_path(tmp_path, 0)
    save_tensors(path, {"frames": torch.zeros(1, 1, 1, 1, 3, dtype=torch.uint8)})
    with pytest.raises(TrainingError, match=rf"{path.name} .*training.scenes again"):
        RenderedScenes(tmp_path).load(path.stem)


def test_text_is_kept_to_its_longest_prompt() -> None:
    text = torch.zeros(2, 6, 5)
    text[0, :2], text[1, :4] = 1, 1
    assert torch.equal(trim_text(text), text[:, :4])
    assert trim_text(torch.zeros(2, 6, 5)).shape == (2, 1, 5)


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["latents", *map(str, arguments)])
    latents.main()


def test_the_command_renders_and_encodes_worlds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = Path(mv2v_engine.__file__).parent / "assets" / "tiny-nvs" / "vae"
    out = tmp_path / "latents"
    arguments: list[object] = ["--vae", vae, "--out", out, "--grade", "furnished", "--cameras", 2]
    _main(monkeypatch, "--worlds", "3:4", *arguments)
    assert [path.name for path in out.glob("scene_*")] == ["scene_furnished_0000003.safetensors"]
    cache = LatentCache(out)
    assert cache.num_tracks(0) == 2 and cache.still_track(0) == 0
    with pytest.raises(RequestError, match="held out"):
        _main(monkeypatch, "--worlds", f"0:{HELD_OUT + 1}", *arguments)


def test_the_command_encodes_multicamvideo(
    multicam: Path,
    worded_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, out = tmp_path / "set", tmp_path / "latents"
    shutil.copytree(multicam, root)
    caption = "file_name,text\ntrain/f24_aperture5/scene2/videos/cam02.mp4,a red ball\n"
    (root / "metadata.csv").write_text(caption)
    (root / "train/f24_aperture5/scene10/cameras/camera_extrinsics.json").unlink()
    (root / "train/f24_aperture5/scene2/videos/cam03.mp4").unlink()
    arguments: list[object] = ["--multicam", root, "--vae", worded_checkpoint, "--out", out]
    arguments += ["--frames", 5, "--size", 48, 64, "--text", worded_checkpoint]
    arguments += ["--text-length", 8]
    _main(monkeypatch, *arguments)
    said = capsys.readouterr().out
    assert "1 of 2 scenes are encoded" in said
    assert "left out: 1 scenes, 1 cameras of the others" in said
    assert "1 videos have no caption" in said
    assert set(json.loads((out / "skipped_0_of_1.json").read_text())) == {
        "scene_f24_aperture5_scene2",
        "scene_f24_aperture5_scene10",
    }
    cache = LatentCache(out)
    assert len(cache) == 1 and cache.num_tracks(0) == 2 and cache.latent_shape == (16, 2, 6, 8)
    assert cache.still_track(0) is None
    drawn = cache.draw(0, [1, 0], 0)
    # 10 cm beside the source's first frame, and 4 cm a frame: 16 between latent frames
    torch.testing.assert_close(drawn.cameras[0, :, 3], torch.tensor([0.1, 0.26]), rtol=0, atol=1e-5)
    folders = worded_checkpoint / "text_encoder", worded_checkpoint / "tokenizer"
    encoder = load_text_encoder(*folders, max_length=8, device=CPU, dtype=torch.float32)
    words = encoder.encode("a red ball")[0, :4]  # and the end of the prompt
    assert drawn.text is not None and cache.has_captions
    torch.testing.assert_close(drawn.text.float(), words, rtol=1e-2, atol=1e-2)
    vae = load_vae(worded_checkpoint, device=CPU, dtype=torch.float32)
    scene = MultiCamVideo(root, num_frames=5, size=(48, 64)).load("scene_f24_aperture5_scene2")
    expected = torch.stack([vae.encode(scene.frames[1]), vae.encode(scene.frames[0])])
    torch.testing.assert_close(drawn.latents, expected, rtol=1e-2, atol=1e-2)

    with pytest.raises(TrainingError, match="no usable cameras"):
        _main(monkeypatch, *arguments, "--strict")
    shutil.rmtree(out)
    (root / "train/f24_aperture5/scene2/videos/cam02.mp4").unlink()
    with pytest.raises(TrainingError, match="none of 2 scenes could be encoded"):
        _main(monkeypatch, *arguments)
