"""Damage that a decoder hides is found, and whole videos of every kind are taken for whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from mv2v_engine.errors import VideoError
from mv2v_engine.serving.config import Limits
from mv2v_engine.serving.work.probe import Refused, examine
from mv2v_engine.video.damage import check_pictures
from mv2v_engine.video.io import VideoReader, read_video
from mv2v_engine.video.stills import scan_video

Clips = Callable[..., Path]
LIMITS = Limits().to_dict()
NUM_FRAMES = 20
# stamps of a variable rate, milliseconds
UNEVEN = [40 * index + 11 * (index % 3) for index in range(NUM_FRAMES)]
WHOLE: dict[str, dict[str, Any]] = {
    "b_frames.mp4": {"options": {"bf": "3", "b-pyramid": "2"}},
    "open_groups.mp4": {"options": {"x264-params": "open-gop=1:keyint=6"}},
    "no_key_frames.mp4": {"options": {"x264-params": "intra-refresh=1:keyint=6"}},
    "interlaced.mov": {"options": {"x264-params": "interlaced=1:slices=3"}},
    "pieces.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "sound.mp4": {"audio": True},
    "uneven.mp4": {"stamps_ms": UNEVEN},
    "uneven.mkv": {"stamps_ms": UNEVEN},
    "no_times.avi": {"codec": "libx264"},
    "old.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "stream.ts": {"codec": "libx264"},
    "television.mpg": {"codec": "mpeg2video"},
    "hidden.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "9"}},
    "hidden.mkv": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "pictures.mov": {"codec": "mjpeg"},
    "lossless.mkv": {"codec": "ffv1"},
}


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    """Frames that take many bytes, so that damage has something to hit."""
    return np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, 48, 64, 3)).astype(np.uint8)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_videos_pass(tmp_path: Path, clip: Clips, name: str) -> None:
    path = clip(tmp_path / name, **WHOLE[name])
    assert examine(path, LIMITS)["frames"] >= NUM_FRAMES - 1


def test_what_is_around_the_pictures_is_no_damage(tmp_path: Path, clip: Clips) -> None:
    path = clip(tmp_path / "clip.mp4")
    whole = path.read_bytes()
    changes = {
        "bytes behind the end": whole + bytes(1000),
        "a brand of its own": whole.replace(b"isom", b"zzzz"),
        "a tag in another encoding": whole.replace(b"Lavf", b"\xe9\xe8\xfc\xac"),
    }
    for what, data in changes.items():
        assert data != whole, what
        path.write_bytes(data)
        assert examine(path, LIMITS)["frames"] == NUM_FRAMES, what


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4")]
)
def test_made_up_pictures_are_found(
    tmp_path: Path, clip: Clips, noise: np.ndarray, name: str, codec: str
) -> None:
    path = clip(tmp_path / name, codec=codec, frames=noise)
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    # in the middle of the largest one's data, behind everything that names or counts
    largest = max(packets, key=len)
    start = data.find(largest) + len(largest) // 2
    data[start : start + 64] = np.random.default_rng(1).bytes(64)
    path.write_bytes(data)
    assert len(read_video(path).frames) == NUM_FRAMES  # the decoder makes up what it cannot read
    with pytest.raises(VideoError, match=rf"{name} is damaged: \d+ of its 20 frames"):
        check_pictures(path, scan_video(path, None))


def test_times_that_contradict_the_order_are_found(tmp_path: Path, clip: Clips) -> None:
    path = clip(tmp_path / "clip.mp4", options={"bf": "3"})
    data = path.read_bytes()
    assert b"ctts" in data
    path.write_bytes(data.replace(b"ctts", b"free"))
    with pytest.raises(VideoError, match="by its time stamp"):
        check_pictures(path, scan_video(path, None))


def test_a_length_that_is_none_is_no_promise(tmp_path: Path, clip: Clips) -> None:
    path = clip(tmp_path / "clip.mkv")
    data = path.read_bytes()
    assert b"00:00:00.8" in data
    path.write_bytes(data.replace(b"00:00:00.8", b"not a time"))
    assert VideoReader(path).info.num_frames == NUM_FRAMES


def test_a_lost_end_is_found(tmp_path: Path, clip: Clips, noise: np.ndarray) -> None:
    # too little for its duration to tell
    path = clip(tmp_path / "clip.mkv", frames=noise)
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 40])
    with pytest.raises(Refused, match="damaged or cut off: File ended prematurely"):
        examine(path, LIMITS)
