"""The process that decodes uploads: what it says of a whole video, and of everything else."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from broken_videos import SILENT, broken_videos, is_unharmed

from mv2v_engine.serving.config import Limits
from mv2v_engine.serving.errors import KINDS, ApiError
from mv2v_engine.serving.store.records import ProbedVideo
from mv2v_engine.serving.work.prober import Prober
from mv2v_engine.video.io import VideoReader

LIMITS = Limits()


class Probing:
    """A prober, and the event loop that its process belongs to."""

    def __init__(self) -> None:
        self.prober, self.loop = Prober(), asyncio.new_event_loop()

    def probe(self, path: Path, limits: Limits = LIMITS) -> ProbedVideo:
        return self.loop.run_until_complete(self.prober.probe("", path, limits))

    def refused(self, path: Path, limits: Limits = LIMITS) -> ApiError:
        with pytest.raises(ApiError) as caught:
            self.probe(path, limits)
        return caught.value


@pytest.fixture(scope="module")
def probing() -> Iterator[Probing]:
    """One for all tests: its process takes longer to start than any of them."""
    probing = Probing()
    yield probing
    probing.loop.run_until_complete(probing.prober.stop())
    probing.loop.close()


def test_a_video_is_decoded_and_every_limit_has_its_code(
    probing: Probing, source_clip: Path
) -> None:
    found = probing.probe(source_clip)
    assert found == ProbedVideo(frames=9, width=64, height=48, fps=8.0, seconds=9 / 8)
    # those that it just meets are no hindrance
    probing.probe(source_clip, replace(LIMITS, frames=9, pixels=64 * 48, seconds=9 / 8))
    for change, code in (
        ({"frames": 8}, "too_many_frames"),
        ({"pixels": 64 * 48 - 1}, "too_many_pixels"),
        ({"seconds": 1.0}, "video_too_long"),
    ):
        error = probing.refused(source_clip, replace(LIMITS, **change))
        assert (error.code, error.status, error.param) == (code, 422, "video")
        assert str(next(iter(change.values()))).removesuffix(".0") in error.message


def moving(path: Path, num_frames: int, size: tuple[int, int], codec: str, rate: int = 8) -> Path:
    """A clip whose frames differ."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for number in range(num_frames):
            pixels = np.zeros((*size, 3), np.uint8)
            pixels[0, number % size[1]] = 255
            picture = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format=stream.pix_fmt)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def test_what_would_cost_more_than_a_video_may_is_refused_unread(
    probing: Probing, tmp_path: Path
) -> None:
    strip = moving(tmp_path / "strip.mp4", 2, (2, 4096), "libx264")
    fast = moving(tmp_path / "fast.mp4", 2, (48, 64), "libx264", rate=1 << 20)
    many = moving(tmp_path / "many.gif", 50, (100, 100), "gif")

    error = probing.refused(strip)
    assert error.code == "video_out_of_range" and "4096x2" in error.message
    error = probing.refused(fast)
    assert error.code == "video_out_of_range" and "0.01 to 1000" in error.message
    limits = replace(LIMITS, total_pixels=50 * 100 * 100)
    assert probing.probe(many, limits).frames == 50
    error = probing.refused(many, replace(limits, total_pixels=50 * 100 * 100 - 1))
    assert error.code == "video_too_slow" and "at most 49 of this size" in error.message


def test_of_damaged_videos_the_unharmed_are_taken(
    probing: Probing, source_clip: Path, tmp_path: Path
) -> None:
    taken: list[str] = []

    for number, (what, data) in enumerate(broken_videos(source_clip.read_bytes(), 30)):
        path = tmp_path / f"upload{number}"
        path.write_bytes(data)
        try:
            probing.probe(path)
        except ApiError as error:
            assert KINDS[error.code].status == 422, what
            assert path.name not in error.message and str(tmp_path) not in error.message
        else:
            assert what in SILENT or is_unharmed(path, source_clip), what
            taken.append(what)
    # lies about what nobody reads are no damage
    assert "lying header" in taken


def test_no_other_file_is_opened(probing: Probing, source_clip: Path, tmp_path: Path) -> None:
    beside = tmp_path / "clip.mp4"
    beside.write_bytes(source_clip.read_bytes())
    lists = {
        "concat": b"ffconcat version 1.0\nfile clip.mp4\n",
        "playlist.m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nclip.mp4\n",
    }
    for name, content in lists.items():
        (tmp_path / name).write_bytes(content)

    # the decoder itself would follow it
    assert VideoReader(tmp_path / "concat").info.num_frames == 9
    for name in lists:
        assert probing.refused(tmp_path / name).code == "unreadable_video"


def test_a_decoder_that_takes_too_long_or_dies_is_one_refusal(
    probing: Probing, source_clip: Path, tmp_path: Path
) -> None:
    pipe = tmp_path / "endless"
    os.mkfifo(pipe)

    # nobody ever writes into it, so opening it does not return
    error = probing.refused(pipe, replace(LIMITS, probe_seconds=1.0))
    assert error.code == "video_too_slow"
    probing.probe(source_clip)
    # and the process itself: the next video has a new one
    process = probing.prober._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    probing.loop.run_until_complete(process.wait())
    probing.probe(source_clip)
    again = probing.prober._process
    assert again is not None and again.pid != process.pid
