"""MultiCamVideo's layout, made here in small: videos, poses, captions, and what can be wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mv2v_engine.errors import TrainingError
from mv2v_engine.training.multicam import MultiCamVideo
from mv2v_engine.video.io import read_video, write_video

FRAMES, SIZE = 5, (32, 48)
CAMERAS = ("cam01", "cam02", "cam03")


def _open(root: Path, *, num_frames: int = FRAMES, captions: Path | None = None) -> MultiCamVideo:
    return MultiCamVideo(root, num_frames=num_frames, size=SIZE, captions=captions)


def test_scenes_are_found_in_natural_order(multicam: Path) -> None:
    assert _open(multicam).names == ("scene_f24_aperture5_scene2", "scene_f24_aperture5_scene10")


def test_a_scene_has_its_videos_and_their_poses_in_one_world(multicam: Path) -> None:
    scene = _open(multicam).load("scene_f24_aperture5_scene2")
    assert scene.frames.shape == (3, FRAMES, *SIZE, 3) and scene.skipped == ()
    grey = scene.frames.float().mean((2, 3, 4))
    expected = 40 * torch.arange(1, 4)[:, None] + 10 * torch.arange(FRAMES)
    torch.testing.assert_close(grey, expected.float(), rtol=0, atol=3)
    # metres to the right (OpenCV's x) of the first camera's first frame
    right = 0.1 * torch.arange(3)[:, None] + 0.04 * torch.arange(FRAMES)
    torch.testing.assert_close(scene.poses[..., 0, 3], right, rtol=0, atol=1e-5)
    assert not scene.poses[..., 1:, 3].any()
    torch.testing.assert_close(scene.poses[..., :3], torch.eye(3).expand(3, FRAMES, 3, 3))


def test_the_lens_is_in_the_folders_name(multicam: Path, tmp_path: Path) -> None:
    """In pixels as BASE_MODELS has it: 840.4 of 24 mm at 832x480, and 1,750.8 of 50 mm."""
    root = tmp_path / "dataset"
    shutil.copytree(multicam, root)
    (root / "train" / "f24_aperture5").rename(root / "train" / "f50_aperture2.4")
    for folder, focal in ((multicam, 840.4), (root, 1750.8)):
        source = MultiCamVideo(folder, num_frames=FRAMES, size=(480, 832))
        lens = source.load(source.names[0]).intrinsics
        assert lens is not None and lens.shape == (3, 4) and not lens[:, 2:].any()
        pixels = lens[:, :2] * torch.tensor([832.0, 480.0])
        torch.testing.assert_close(pixels, torch.full((3, 2), focal), rtol=0, atol=0.05)
    (root / "train" / "f50_aperture2.4").rename(root / "train" / "unknown")
    source = _open(root)
    assert source.load(source.names[0]).intrinsics is None


def test_a_window_is_the_first_frames_of_both(multicam: Path) -> None:
    scene = _open(multicam, num_frames=1).load("scene_f24_aperture5_scene2")
    assert scene.frames.shape[1] == scene.poses.shape[1] == 1
    with pytest.raises(TrainingError, match="poses of 5 frames, the window is 9"):
        _open(multicam, num_frames=9).load("scene_f24_aperture5_scene2")


def test_captions_belong_to_their_videos(multicam: Path, tmp_path: Path) -> None:
    table = tmp_path / "metadata.csv"
    table.write_text('file_name,text\ntrain/f24_aperture5/scene2/videos/cam02.mp4,"a room, grey"\n')
    scene = _open(multicam, captions=table).load("scene_f24_aperture5_scene2")
    assert scene.captions == ("", "a room, grey", "")
    table.write_text("video,caption\nx,y\n")
    with pytest.raises(TrainingError, match="columns file_name and text"):
        _open(multicam, captions=table)


@pytest.fixture
def copy(multicam: Path, tmp_path: Path) -> Path:
    """A dataset that may be damaged."""
    return Path(shutil.copytree(multicam, tmp_path / "copy"))


def _shorten_video(folder: Path) -> None:
    path = folder / "videos" / "cam02.mp4"
    write_video(path, read_video(path).frames[: FRAMES - 1], 15)


def _cut_video(folder: Path) -> None:
    path = folder / "videos" / "cam02.mp4"
    path.write_bytes(path.read_bytes()[:600])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "videos" / "cam02.mp4").unlink(), "cam02: cam02.mp4 is missing"),
        (_shorten_video, "cam02: cam02.mp4 has 4 frames, its camera 5 poses"),
        (_cut_video, "cam02: cam02.mp4"),
    ],
    ids=["missing", "short", "corrupt"],
)
def test_an_unusable_video_is_left_out_with_its_reason(
    copy: Path, damage: Callable[[Path], None], reason: str
) -> None:
    damage(copy / "train" / "f24_aperture5" / "scene2")
    source = _open(copy)
    scene = source.load("scene_f24_aperture5_scene2")
    assert len(scene.frames) == len(scene.poses) == len(scene.captions) == 2
    assert len(scene.skipped) == 1 and scene.skipped[0].startswith(reason)
    # the third camera kept its own poses
    torch.testing.assert_close(scene.poses[1, 0, 0, 3], torch.tensor(0.2))
    assert source.load("scene_f24_aperture5_scene10").skipped == ()


def test_a_video_without_poses_is_left_out_with_its_reason(copy: Path) -> None:
    videos = copy / "train" / "f24_aperture5" / "scene2" / "videos"
    shutil.copy(videos / "cam01.mp4", videos / "cam04.mp4")
    scene = _open(copy).load("scene_f24_aperture5_scene2")
    assert scene.skipped == ("cam04: camera_extrinsics.json has no such camera",)


def _cut_json(folder: Path) -> None:
    path = folder / "cameras" / "camera_extrinsics.json"
    path.write_text(path.read_text()[:100])


def _empty_videos(folder: Path) -> None:
    for camera in CAMERAS[1:]:
        (folder / "videos" / f"{camera}.mp4").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "cameras" / "camera_extrinsics.json").unlink(),
            "no usable cameras: cannot read camera file .*camera_extrinsics.json",
        ),
        (_cut_json, "no usable cameras: camera_extrinsics.json is not valid JSON"),
        (_empty_videos, "1 usable videos, at least 2 are needed: cam02.*cam03"),
    ],
    ids=["no-json", "cut-json", "one-video"],
)
def test_an_unusable_scene_is_an_error_of_its_own(
    copy: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(copy / "train" / "f24_aperture5" / "scene2")
    with pytest.raises(TrainingError, match=message):
        _open(copy).load("scene_f24_aperture5_scene2")


def test_another_folder_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"train/f24_aperture5/scene1/videos/cam01\.mp4"):
        _open(tmp_path)
