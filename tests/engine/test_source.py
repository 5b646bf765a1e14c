"""Sources: files and frames, brought to the model's window and size, or refused."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mv2v_engine.engine.source import Source, load_source
from mv2v_engine.errors import RequestError, VideoError
from mv2v_engine.video.io import read_video, write_video
from mv2v_engine.video.transforms import cover_and_crop


def load(source: Any, **changes: Any) -> Source:
    settings: dict[str, Any] = {
        "num_frames": 9,
        "size": (48, 64),
        "window": None,
        "fps": None,
        "max_pixels": 1 << 20,
    }
    return load_source(source, **settings | changes)


def test_a_file_is_scaled_frame_by_frame_as_a_whole_clip_is(tmp_path: Path) -> None:
    frames = torch.randint(0, 256, (9, 70, 90, 3), generator=torch.Generator().manual_seed(0))
    write_video(tmp_path / "clip.mp4", frames.to(torch.uint8), 10)
    whole, report = cover_and_crop(read_video(tmp_path / "clip.mp4").frames, (48, 64))
    source = load(tmp_path / "clip.mp4")
    assert torch.equal(source.frames, whole)
    assert source.description["crop"] == report.description


def numbered(num_frames: int) -> Tensor:
    """Frame i is grey of level 5 i."""
    levels = torch.arange(num_frames, dtype=torch.uint8) * 5
    return levels[:, None, None, None].expand(-1, 48, 64, 3).contiguous()


def shown(source: Source) -> list[int]:
    return [round(float(frame.float().mean()) / 5) for frame in source.frames]


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "long.mp4"
    write_video(path, numbered(25), 10)
    return path


@pytest.mark.parametrize(
    ("window", "frames"),
    [
        ("first", list(range(9))),
        ("middle", list(range(8, 17))),
        ("last", list(range(16, 25))),
        ("even", list(range(0, 25, 3))),
        ("5", list(range(5, 14))),
    ],
)
def test_windows_of_a_file_and_of_frames(long_clip: Path, window: str, frames: list[int]) -> None:
    assert shown(load(long_clip, window=window)) == frames
    assert shown(load(numbered(25), window=window)) == frames


def test_a_short_clip_is_padded_when_asked(tmp_path: Path) -> None:
    write_video(tmp_path / "short.mp4", numbered(6), 10)
    source = load(tmp_path / "short.mp4", window="pad")
    assert shown(source) == [0, 1, 2, 3, 4, 5, 5, 5, 5]
    assert source.description["window"] == "all 6 frames, the last repeated 3 times"


def test_nothing_is_cut_in_silence(long_clip: Path) -> None:
    with pytest.raises(VideoError, match="has 25 frames, the model's window is 9; choose window="):
        load(long_clip)


@pytest.mark.parametrize("window", [1.5, True, b"first", ["first"], 1 << 80])
def test_a_window_of_another_type_is_told_what_there_is(window: Any) -> None:
    words = "window must be first, middle, last, even, pad, the number of the frame to start at"
    with pytest.raises(RequestError, match=words):
        load(numbered(25), window=window)


def test_the_description_says_what_was_done(tmp_path: Path) -> None:
    write_video(tmp_path / "wide.mp4", torch.zeros(9, 48, 96, 3, dtype=torch.uint8), 12.5)
    source = load(tmp_path / "wide.mp4")
    assert source.frames.shape == (9, 48, 64, 3)
    assert source.description == {
        "name": "wide.mp4",
        "window": "all 9 frames",
        "crop": "96x48 to 64x48: unscaled, cropped by 16+16 columns and 0+0 rows",
        "fps": 12.5,
        "notes": [],
    }


def test_rates(long_clip: Path) -> None:
    assert load(long_clip, window="first").fps == 10
    assert load(long_clip, window="first", fps=24).fps == 24
    assert load(numbered(9)).fps == 16
    for fps in (0.0, -1.0, float("nan")):
        with pytest.raises(VideoError, match=r"fps must lie in 0\.01 to 1000"):
            load(numbered(9), fps=fps)


def test_numpy_frames_are_the_same_source() -> None:
    one, other = load(numbered(9)), load(numbered(9).numpy())
    assert torch.equal(one.frames, other.frames) and one.fingerprint == other.fingerprint
    changed = numbered(9)
    changed[4, 0, 0, 0] += 1
    assert load(changed).fingerprint != one.fingerprint


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(9, 48, 64, 3),
        torch.zeros(9, 3, 48, 64, dtype=torch.uint8),
        torch.zeros(1, 48, 64, 3, dtype=torch.uint8),
        np.zeros((48, 64, 3), np.uint8),
    ],
    ids=["float", "channels-first", "one-frame", "one-picture"],
)
def test_other_arrays_are_refused(frames: Tensor) -> None:
    with pytest.raises(VideoError, match=r"must be uint8 \[frames, height, width, 3\]"):
        load(frames, window="pad")


def test_one_frame_is_no_video(tmp_path: Path) -> None:
    write_video(tmp_path / "still.mp4", numbered(1), 10)
    for window in (None, "pad"):
        with pytest.raises(VideoError, match=r"still\.mp4 has 1 frame, at least 2 are needed"):
            load(tmp_path / "still.mp4", window=window)


def test_sources_of_every_kind_are_one(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", numbered(9), 10)
    expected = load(tmp_path / "clip.mp4")
    data = (tmp_path / "clip.mp4").read_bytes()
    with (tmp_path / "clip.mp4").open("rb") as file:
        file.seek(100)
        for source in (data, bytearray(data), io.BytesIO(data), file):
            read = load(source)
            assert torch.equal(read.frames, expected.frames) and read.fps == 10
    frames = numbered(9)
    pictures = [Image.fromarray(frame.numpy()) for frame in frames]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    for source in (pictures, tuple(pictures), list(frames.numpy()), [*frames]):
        assert torch.equal(load(source).frames, load(frames).frames)
    from_files = load(tmp_path / "%d.png")
    assert torch.equal(from_files.frames, load(frames).frames) and from_files.fps == 16
    assert from_files.description["notes"] == ["9 images were taken at 16 a second"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([], "source must be a video file .its path, bytes, or the open file., a folder of images"),
        (["a.png", "b.png"], "source must be a video file"),
        ([Image.new("RGB", (64, 48)), Image.new("RGB", (48, 64))], "give images of one size"),
        (b"no video", "bytes cannot be decoded as a video"),
        (io.BytesIO(), "file is empty"),
        (io.StringIO("text"), "must be open for bytes, as by open.path, 'rb'."),
        (3, "source must be a video file"),
    ],
    ids=["nothing", "names", "sizes", "bytes", "empty", "text", "number"],
)
def test_sources_that_are_none(
    source: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # of its own: other processes of the tests have temporary folders, too
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(VideoError, match=words) as caught:
        load(source)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
