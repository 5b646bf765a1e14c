"""Unusable files and places: one clear error, nothing half-written."""

from __future__ import annotations

import wave
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mv2v_engine.errors import CancelledError, VideoError
from mv2v_engine.video.io import VideoReader, probe_video, read_video, write_video

Clips = Callable[..., Path]
STILL = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
TEXT = b"1\n00:00:01,000 --> 00:00:02,000\nnot a video\n" * 20


def expect_refused(path: Path, *words: str) -> None:
    """Both readers refuse with one line that names the file and says these words."""
    for reader in (probe_video, read_video):
        with pytest.raises(VideoError) as caught:
            reader(path)
        message = str(caught.value)
        assert path.name in message and "\n" not in message
        for word in words:
            assert word in message, message


def test_missing_file_and_folder(tmp_path: Path) -> None:
    expect_refused(tmp_path / "none.mp4", "does not exist", "give the path")
    expect_refused(tmp_path, "is a folder")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.mp4", b"", ["is empty"]),
        *(
            (name, TEXT, ["not a video", "give a whole video file"])
            for name in ("notes.txt", "notes.mp4", "clip.srt")
        ),
        ("noise.mp4", np.random.default_rng(0).bytes(20000), ["not a video"]),
    ],
    ids=["empty", "notes.txt", "notes.mp4", "clip.srt", "noise"],
)
def test_what_is_no_video(tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    expect_refused(tmp_path / name, *words)


def test_sound_only(tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    expect_refused(path, "no video stream", "audio")


@pytest.mark.parametrize(
    ("name", "options", "part", "words"),
    [
        # before the index
        ("clip.mp4", {}, 1 / 2, ["give a whole video file"]),
        ("clip.mov", {}, 1 / 2, ["give a whole video file"]),
        # and after it
        (
            "first.mp4",
            {"container_options": {"movflags": "faststart"}},
            3 / 4,
            ["truncated", "header promises 20"],
        ),
        # in containers without a count
        ("clip.mkv", {"codec": "mjpeg"}, 1 / 2, ["truncated", "promises 20"]),
        ("old.webm", {"codec": "libvpx"}, 1 / 2, ["truncated", "promises 20"]),
    ],
    ids=["mp4", "mov", "index first", "mkv", "webm"],
)
def test_cut_files(
    tmp_path: Path, clip: Clips, name: str, options: dict[str, Any], part: float, words: list[str]
) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (20, 48, 64, 3)).astype(np.uint8)
    path = clip(tmp_path / name, frames=frames, **options)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    expect_refused(path, *words)


def test_no_frames(tmp_path: Path, clip: Clips) -> None:
    with_frame = clip(tmp_path / "one.mp4", num_frames=1, codec="mjpeg").read_bytes()
    path = tmp_path / "none.mp4"
    # erase the picture, keep every header
    start = with_frame.index(b"\xff\xd8")
    stop = with_frame.index(b"\xff\xd9", start) + 2
    path.write_bytes(with_frame[:start] + bytes(stop - start) + with_frame[stop:])
    expect_refused(path, "give a whole video file")


def test_large_frames_are_refused_before_decoding(tmp_path: Path, clip: Clips) -> None:
    path = clip(
        tmp_path / "clip.mp4",
        num_frames=2,
        size=(4000, 4000),
        options={"preset": "ultrafast", "tune": "zerolatency"},
    )
    message = r"^clip.mp4 is 4000x4000 \(16.0 MP\); at most 8.3 MP; scale it down first$"
    with pytest.raises(VideoError, match=message):
        read_video(path)
    assert probe_video(path).num_frames == 2
    assert VideoReader(path, max_pixels=16_000_000).read([0]).shape == (1, 4000, 4000, 3)
    # the pictures are destroyed, so whoever decodes them fails otherwise
    content = bytearray(path.read_bytes())
    data = content.index(b"mdat")
    content[data + 4 : -2000] = bytes(len(content) - 2000 - data - 4)
    path.write_bytes(content)
    with pytest.raises(VideoError, match=message):
        read_video(path)


@pytest.mark.parametrize(
    ("size", "aspect"),
    [((2, 4096), None), ((4, 3840), None), ((1024, 32), None), ((48, 64), Fraction(20))],
    ids=["4096x2", "3840x4", "portrait", "wide pixels"],
)
def test_strips(
    tmp_path: Path, clip: Clips, size: tuple[int, int], aspect: Fraction | None
) -> None:
    path = clip(tmp_path / "strip.mp4", num_frames=2, size=size, aspect=aspect)
    expect_refused(path, "more than 16 times the other", "crop or pad it")


def test_frames_that_come_too_slowly_or_too_fast(tmp_path: Path, clip: Clips) -> None:
    for stamps in ((0, 200_000), (0, 300_000, 600_000)):
        path = clip(tmp_path / "slow.mkv", num_frames=len(stamps), stamps_ms=stamps)
        expect_refused(path, "fps", "must lie in 0.01 to 1000")
    path = clip(tmp_path / "fast.mp4", rate=1 << 20)
    expect_refused(path, "must lie in 0.01 to 1000", "1.04858e")


def test_more_frames_than_one_read_takes_are_refused_before_there_is_room_for_them(
    tmp_path: Path, clip: Clips
) -> None:
    reader = VideoReader(clip(tmp_path / "clip.mp4", num_frames=2))
    with pytest.raises(VideoError, match=r"clip.mp4 in parts"):
        reader.read(range(2), size=(60_000, 60_000))
    with pytest.raises(VideoError, match=r"take 18.4 GB, at most 17.2 GB are read at once"):
        reader.read([0, 1] * 1_000_000)


def test_reading_ends_where_it_is_told_to(tmp_path: Path, clip: Clips) -> None:
    path, calls = clip(tmp_path / "clip.mkv", codec="mjpeg"), []

    def check() -> None:
        calls.append(len(calls))
        if len(calls) == 5:
            calls.clear()
            raise CancelledError("enough")

    reader = VideoReader(path)
    for begin in (
        lambda: VideoReader(path, check=check),
        lambda: reader.read(range(20), check=check),
        lambda: list(reader.frames(10, check)),
    ):
        with pytest.raises(CancelledError, match="enough"):
            begin()
    # and a file goes on being readable
    assert len(reader.read(range(20))) == 20


@pytest.mark.parametrize(("start", "count"), [(5, 1), (-1, 2), (0, 6), (0, 0)])
def test_frames_that_do_not_exist(tmp_path: Path, clip: Clips, start: int, count: int) -> None:
    path = clip(tmp_path / "clip.mp4", num_frames=5)
    with pytest.raises(VideoError, match=r"has 5 frames \(0 to 4\)"):
        VideoReader(path).read(range(start, start + count))


@pytest.mark.parametrize(
    "frames",
    [
        STILL.float(),
        STILL.movedim(-1, 1),
        STILL[0],
        STILL[:0],
    ],
    ids=["float", "channels-first", "one-picture", "no-frames"],
)
def test_write_refuses_other_tensors(tmp_path: Path, frames: Tensor) -> None:
    with pytest.raises(VideoError, match=r"must be uint8 \[T, height, width, 3\]"):
        write_video(tmp_path / "out.mp4", frames, 25)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fps", [0, -25, float("nan"), float("inf")])
def test_write_refuses_impossible_rates(tmp_path: Path, fps: float) -> None:
    with pytest.raises(VideoError, match=r"fps must lie in 0.01 to 1000"):
        write_video(tmp_path / "out.mp4", STILL, fps)
