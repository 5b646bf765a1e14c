"""Every frame of every rate is accounted for, and a video starts where it can be decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from mv2v_engine.serving.config import Limits
from mv2v_engine.serving.work.probe import examine
from mv2v_engine.video.io import VideoReader, probe_video

Clips = Callable[..., Path]


def stamps_of(*runs: tuple[float, int]) -> list[int]:
    """Milliseconds of runs of (gap in ms, frames) one after the other, rounded as muxers do."""
    times = np.cumsum([0.0, *(gap for gap, count in runs for _ in range(count))])
    return [round(time) for time in times]


THIRTY, SIXTY = 1000 / 30, 1000 / 60
VARIABLE: dict[str, tuple[list[int], Fraction]] = {
    "a pause at 30": (stamps_of((THIRTY, 19), (500, 1), (THIRTY, 19)), Fraction(30)),
    "a pause at 25": (stamps_of((40, 4), (1000, 1), (40, 5)), Fraction(25)),
    "a pause at NTSC": (
        stamps_of((1001 / 30, 29), (1001 / 2, 1), (1001 / 30, 70)),
        Fraction(30000, 1001),
    ),
    "one frame dropped": (stamps_of((THIRTY, 20), (2 * THIRTY, 1), (THIRTY, 18)), Fraction(30)),
    "a screen": (stamps_of((THIRTY, 13), (SIXTY, 13), (100, 13)), Fraction(60)),
    "two holds at 10": (stamps_of((100, 5), (700, 1), (100, 5), (1300, 1), (100, 3)), Fraction(10)),
}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("name", VARIABLE)
def test_held_frames_are_repeated_and_none_is_lost(
    tmp_path: Path, clip: Clips, name: str, suffix: str
) -> None:
    stamps, rate = VARIABLE[name]
    levels = np.arange(len(stamps)) % 40 * 6
    frames = np.broadcast_to(levels[:, None, None, None], (len(stamps), 48, 64, 3))
    path = clip(
        tmp_path / f"clip{suffix}",
        num_frames=len(stamps),
        stamps_ms=stamps,
        frames=frames.astype(np.uint8),
    )
    reader = VideoReader(path)
    ticks = [round(stamp * rate / 1000) for stamp in stamps]
    expected = [max(i for i, at in enumerate(ticks) if at <= tick) for tick in range(ticks[-1] + 1)]
    read = [round(frame.float().mean().item() / 6) for frame in reader.frames()]
    assert reader.info.fps == pytest.approx(float(rate), rel=1e-3)
    assert read == [index % 40 for index in expected]
    assert set(expected) == set(range(len(stamps)))
    assert f"held frames are repeated ({len(stamps)} became {len(expected)})" in reader.notes[0]
    assert torch.equal(reader.read(range(len(read)))[::5], torch.stack([*reader.frames()])[::5])


def test_two_stamps_that_nearly_meet_are_no_rate(tmp_path: Path, clip: Clips) -> None:
    stamps = [*stamps_of((THIRTY, 19)), 634, 1134, *(1134 + s for s in stamps_of((THIRTY, 9))[1:])]
    frames = np.zeros((len(stamps), 48, 64, 3), np.uint8)
    path = clip(tmp_path / "a.mkv", num_frames=len(stamps), stamps_ms=stamps, frames=frames)
    reader = VideoReader(path)
    assert reader.info.fps <= 121
    assert reader.notes[0].startswith("its frame rate varies")
    assert len(list(reader.frames())) == reader.info.num_frames


def test_holds_without_end_take_no_memory(tmp_path: Path, clip: Clips) -> None:
    # at its own rate it would have 360 million frames
    stamps = [0, 1, 2, 3, 60_000, 360_000]
    info = probe_video(clip(tmp_path / "clip.mkv", num_frames=6, stamps_ms=stamps))
    assert info.num_frames == 360_001
    stamps = [0, 1, 2, 3, 60_000, 3_600_000]
    reader = VideoReader(clip(tmp_path / "longer.mkv", num_frames=6, stamps_ms=stamps))
    assert reader.info.num_frames <= 1 << 20
    assert "frames share another's place" in reader.notes[0]


@pytest.mark.parametrize("suffix", [".mkv", ".webm"])
def test_a_last_frame_that_is_held_is_no_truncation(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clip{suffix}"
    codec = "libx264" if suffix == ".mkv" else "libvpx-vp9"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        made = []
        for index in range(40):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), index, np.uint8), "rgb24")
            frame.pts = index
            made += stream.encode(frame)
        made += stream.encode(None)
        last = max((packet for packet in made if packet.size), key=lambda packet: packet.pts)
        last.duration = 8 * 30
        for packet in made:
            container.mux(packet)
    assert b"DURATION" in path.read_bytes() and b"00:00:09" in path.read_bytes()
    info = probe_video(path)
    assert (info.num_frames, info.fps) == (40, 30)
    assert examine(path, Limits().to_dict())["frames"] == 40


def cut_within(source: Path, path: Path, skip: Callable[[int, bool], bool]) -> Sequence[int]:
    """Copy the packets that are not to be skipped; the numbers of those that were left."""
    left = []
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        packets = [packet for packet in old.demux(stream) if packet.size]
        for number, packet in enumerate(packets):
            if not skip(number, packet.is_keyframe):
                left.append(number)
                packet.stream = copy
                new.mux(packet)
    return left


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4"])
def test_a_recording_begins_within_a_group(
    tmp_path: Path, clip: Clips, codec: str, suffix: str
) -> None:
    options = {
        "libx264": {"g": "8", "bf": "0"},
        "libx265": {"x265-params": "keyint=8:bframes=0:log-level=0"},
        "mpeg4": {"g": "8", "sc_threshold": "1000000000"},
    }[codec]
    whole = clip(tmp_path / f"whole{suffix}", codec=codec, num_frames=24, options=options)
    path = tmp_path / f"clip{suffix}"
    cut_within(whole, path, lambda number, _: number < 3)
    reader = VideoReader(path)
    levels = [round(frame.float().mean().item() / 9) for frame in reader.frames()]
    assert levels == list(range(8, 24))
    assert reader.info.num_frames == 16 and len(reader.read(range(16))) == 16
    said = [note for note in reader.notes if "within a group of pictures: 5 that" in note]
    assert len(said) == 1, reader.notes
    assert examine(path, Limits().to_dict())["frames"] == 16


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_cut_at_an_open_group_leaves_its_leading_pictures_out(
    tmp_path: Path, clip: Clips, suffix: str
) -> None:
    options = {"x265-params": "keyint=8:bframes=3:open-gop=1:scenecut=0:log-level=0"}
    whole = clip(tmp_path / f"whole{suffix}", codec="libx265", num_frames=24, options=options)
    seen = []
    path = tmp_path / f"clip{suffix}"
    cut_within(whole, path, lambda _, is_key: seen.append(is_key) or sum(seen) < 2)
    reader = VideoReader(path)
    levels = [round(frame.float().mean().item() / 9) for frame in reader.frames()]
    assert levels == list(range(levels[0], 24)) and levels[0] >= 8
    assert len(reader.read(range(reader.info.num_frames))) == len(levels)
    assert examine(path, Limits().to_dict())["frames"] == len(levels)


def test_the_default_stream_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        streams = []
        for width, height in ((64, 36), (416, 240)):
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            streams.append(stream)
        streams[0].disposition = av.stream.Disposition(0)
        streams[1].disposition = av.stream.Disposition.default
        for index in range(5):
            for stream in streams:
                pixels = np.full((stream.height, stream.width, 3), 40 * index, np.uint8)
                frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
                frame.pts = index
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))
    reader = VideoReader(path)
    assert (reader.info.width, reader.info.height, reader.info.num_frames) == (416, 240, 5)
    assert reader.notes == ("of 2 video streams the default, 416x240, was taken",)
    assert len(reader.read(range(5))) == 5
