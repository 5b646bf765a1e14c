"""Reading and writing: which frames come out, in which order, at which rate and which way up."""

from __future__ import annotations

import ctypes
import errno
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from mv2v_engine.errors import StorageError, VideoError
from mv2v_engine.testing import largest_file
from mv2v_engine.video.io import (
    VideoReader,
    probe_video,
    read_video,
    video_writer,
    write_video,
)

Clips = Callable[..., Path]

FORMATS = [
    ("clip.mp4", "libx264"),
    ("clip.mkv", "libx264"),
    ("clip.ts", "libx264"),
    ("clip.h264", "libx264"),
    ("clip.webm", "libvpx-vp9"),
    ("old.webm", "libvpx"),
    ("clip.mov", "mjpeg"),
    ("clip.avi", "mpeg4"),
    ("clip.mpg", "mpeg2video"),
]

# the 3x3 display matrix of a track header (16.16 fixed point), by clockwise quarter turns
MATRICES = {1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 3: (0, -1, 1, 0)}


def levels(frames: Tensor, step: int) -> list[int]:
    """Which frame of a grey-level clip each one is."""
    return [round(frame.float().mean().item() / step) for frame in frames]


def rotate_by_flag(path: Path, quarter_turns: int) -> None:
    """Patch the display matrix of the first track header of an mp4."""
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in MATRICES[quarter_turns])
    for offset, value in ((0, a), (4, b), (12, c), (16, d)):
        content[matrix + offset : matrix + offset + 4] = value.to_bytes(4, "big", signed=True)
    path.write_bytes(content)


def smooth_frames(num_frames: int, height: int, width: int) -> Tensor:
    """A moving gradient with a coloured corner, kind to a codec."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    frames = torch.stack([x * 3 + y, y * 4, x * 2], dim=-1)[None].repeat(num_frames, 1, 1, 1)
    frames += torch.arange(num_frames)[:, None, None, None]
    frames = frames.clamp(0, 255).to(torch.uint8)
    frames[:, : height // 4, : width // 4] = torch.tensor([230, 30, 30], dtype=torch.uint8)
    return frames


@pytest.mark.parametrize(("name", "codec"), FORMATS, ids=[name for name, _ in FORMATS])
def test_constant_rate_comes_through_frame_for_frame(
    tmp_path: Path, clip: Clips, level_step: int, name: str, codec: str
) -> None:
    path = clip(tmp_path / name, codec=codec)
    info = probe_video(path)
    assert (info.num_frames, info.fps, info.width, info.height) == (20, 25.0, 64, 48)
    assert info.duration == pytest.approx(0.8)
    read = read_video(path)
    assert read.fps == 25.0
    assert read.frames.dtype == torch.uint8 and read.frames.shape == (20, 48, 64, 3)
    assert levels(read.frames, level_step) == list(range(20))


def test_ntsc_rate_survives_millisecond_stamps(tmp_path: Path) -> None:
    path = tmp_path / "clip.mkv"
    write_video(tmp_path / "clip.mp4", smooth_frames(31, 32, 32), 30000 / 1001)
    import av

    with av.open(str(tmp_path / "clip.mp4")) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.size:
                packet.stream = copy
                target.mux(packet)
    info = probe_video(path)
    assert info.num_frames == 31
    assert info.fps == pytest.approx(30000 / 1001, abs=0.01)


@pytest.mark.parametrize(("name", "codec"), FORMATS, ids=[name for name, _ in FORMATS])
def test_partial_read_equals_slice(tmp_path: Path, clip: Clips, name: str, codec: str) -> None:
    path = clip(tmp_path / name, codec=codec, options={"g": "6"})
    whole = read_video(path).frames
    for start, count in ((0, 1), (5, 4), (6, 1), (11, 9), (19, 1)):
        part = VideoReader(path).read(range(start, start + count))
        assert torch.equal(part, whole[start : start + count]), (start, count)
    picked = [2, 2, 9, 17, 17]
    assert torch.equal(VideoReader(path).read(picked), whole[picked])


def test_small_jitter_is_constant_rate(tmp_path: Path, clip: Clips, level_step: int) -> None:
    stamps = [40 * i + (7 if i % 3 == 1 else 0) for i in range(20)]
    path = clip(tmp_path / "clip.mp4", stamps_ms=stamps)
    assert levels(read_video(path).frames, level_step) == list(range(20))
    assert probe_video(path).fps == pytest.approx(25, rel=0.02)


@pytest.mark.parametrize("quarter_turns", [1, 2, 3])
def test_rotation_flag_is_applied(tmp_path: Path, quarter_turns: int) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, smooth_frames(3, 32, 48), 25)
    stored = read_video(path).frames
    rotate_by_flag(path, quarter_turns)
    info = probe_video(path)
    # numpy turns counter-clockwise
    expected = np.rot90(stored.numpy(), -quarter_turns, (1, 2))
    assert (info.height, info.width) == expected.shape[1:3]
    assert info.rotation == (-90 * quarter_turns) % 360
    assert np.array_equal(read_video(path).frames.numpy(), expected)


@pytest.mark.parametrize("size", [(47, 63), (48, 63), (31, 32), (1, 1)])
def test_odd_sizes_keep_every_pixel(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = smooth_frames(4, *size)
    write_video(tmp_path / "odd.mp4", frames, 25, crf=1)
    read = read_video(tmp_path / "odd.mp4").frames
    assert read.shape == frames.shape
    assert (read.int() - frames.int()).abs().max() <= 6


def test_pixel_aspect_is_squared(tmp_path: Path, clip: Clips) -> None:
    path = clip(tmp_path / "wide.mp4", num_frames=3, aspect=Fraction(2, 1))
    info = probe_video(path)
    assert (info.width, info.height) == (128, 48)
    assert read_video(path).frames.shape == (3, 48, 128, 3)


def test_audio_is_ignored(tmp_path: Path, clip: Clips, level_step: int) -> None:
    path = clip(tmp_path / "sound.mp4", num_frames=5, audio=True)
    assert levels(read_video(path).frames, level_step) == list(range(5))


def test_one_frame(tmp_path: Path) -> None:
    frames = smooth_frames(1, 32, 48)
    write_video(tmp_path / "one.mp4", frames, 24)
    info = probe_video(tmp_path / "one.mp4")
    assert (info.num_frames, info.fps) == (1, 24.0)
    assert read_video(tmp_path / "one.mp4").frames.shape == (1, 32, 48, 3)


def test_colours_survive(tmp_path: Path) -> None:
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 120, 40], [0, 0, 0]])
    frames = colours.to(torch.uint8)[:, None, None].repeat(1, 32, 32, 1)
    write_video(tmp_path / "colours.mp4", frames, 25)
    read = read_video(tmp_path / "colours.mp4").frames
    assert (read.int() - frames.int()).abs().max() <= 4


@contextmanager
def filled_memory(byte: int) -> Iterator[None]:
    """glibc fills fresh memory with a byte, so that an encoder that reads it is found out."""
    libc, perturb, size = ctypes.CDLL(None), -6, 1 << 16
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    libc.mallopt(perturb, byte ^ 255)
    try:
        fresh = libc.malloc(size)
        assert ctypes.string_at(fresh, size) == bytes([byte]) * size
        libc.free(fresh)
        yield
    finally:
        libc.mallopt(perturb, 0)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="fresh memory cannot be filled")
def test_same_frames_same_bytes(tmp_path: Path) -> None:
    y, x, t = torch.meshgrid(torch.arange(48), torch.arange(64), torch.arange(9), indexing="ij")
    frames = torch.stack([3 * x + y + t, 4 * y + t, 2 * x + t], dim=-1).clamp(0, 255)
    frames = frames.permute(2, 0, 1, 3).to(torch.uint8)
    for name, part in (("even.mp4", frames), ("odd.mp4", frames[:, :47, :63])):
        written = []
        for byte in (0x01, 0xAA):
            with filled_memory(byte):
                write_video(tmp_path / name, part, 25)
            written.append((tmp_path / name).read_bytes())
        assert written[0] == written[1], name


@pytest.mark.parametrize("rate", [25, 23.976, 30000 / 1001, Fraction(24000, 1001)])
def test_written_rate_is_exact(tmp_path: Path, rate: float | Fraction) -> None:
    write_video(tmp_path / "clip.mp4", smooth_frames(9, 16, 16), rate)
    info = probe_video(tmp_path / "clip.mp4")
    assert info.fps == float(rate) and info.num_frames == 9


def test_pieces_make_the_same_file_as_the_whole(tmp_path: Path) -> None:
    frames = smooth_frames(9, 48, 64)
    write_video(tmp_path / "whole.mp4", frames, 25)
    with video_writer(tmp_path / "pieces.mp4", 25) as writer:
        for piece in frames.split([4, 1, 4]):
            writer.add(piece)
            assert not (tmp_path / "pieces.mp4").exists()
    assert writer.num_frames == 9
    assert (tmp_path / "pieces.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_an_unfinished_video_leaves_nothing(tmp_path: Path) -> None:
    frames = smooth_frames(3, 48, 64)
    write_video(tmp_path / "clip.mp4", frames, 25)
    before = (tmp_path / "clip.mp4").read_bytes()
    sizes = pytest.raises(VideoError, match=r"64x48, got 64x32; give all frames one size")
    with sizes, video_writer(tmp_path / "clip.mp4", 25) as writer:
        writer.add(frames)
        writer.add(frames[:, :32])
    with pytest.raises(VideoError, match="at least one frame"), video_writer(tmp_path / "b.mp4", 9):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]
    assert (tmp_path / "clip.mp4").read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on a process's files")
def test_a_full_disk_leaves_the_old_file_alone(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"earlier result")
    noise = torch.Generator().manual_seed(0)
    full = pytest.raises(StorageError, match=r"(?s)cannot write.*choose another place")
    with largest_file(20_000), full, video_writer(tmp_path / "clip.mp4", 25, crf=1) as writer:
        for _ in range(30):
            writer.add(torch.randint(0, 256, (1, 96, 128, 3), generator=noise).to(torch.uint8))
    assert [entry.name for entry in tmp_path.iterdir()] == ["clip.mp4"]
    assert (tmp_path / "clip.mp4").read_bytes() == b"earlier result"


def test_frames_one_after_the_other_are_those_read_at_once(
    tmp_path: Path, clip: Clips, level_step: int
) -> None:
    constant = clip(tmp_path / "constant.mp4")
    held = clip(
        tmp_path / "held.mkv", num_frames=8, stamps_ms=[0, 40, 80, 1080, 1120, 1160, 1200, 1240]
    )
    for path in (constant, held):
        frames = list(VideoReader(path).frames())
        assert torch.equal(torch.stack(frames), read_video(path).frames)


def test_want_of_memory_is_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, torch.zeros(4, 32, 32, 3, dtype=torch.uint8), 8)

    def full(*_: object, **__: object) -> None:
        raise av.error.MemoryError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(av, "open", full)
    with pytest.raises(MemoryError):
        read_video(path)
