"""Sound is copied beside frames that keep their number and rate."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from mv2v_engine.video.io import VideoReader, video_writer

Clips = Callable[..., Path]
RATE = 48000


def with_sound(path: Path, codec: str, *, late: int = 0, seconds: float = 2) -> Path:
    """Two seconds of 25 frames each and a tone; the frames begin `late` frames after it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        sound = container.add_stream(codec, rate=RATE)
        sound.layout = "mono"
        for index in range(50):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 4 * index, np.uint8), "rgb24")
            frame.pts = index + late
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        count = int(RATE * seconds)
        tone = (0.4 * np.sin(np.arange(count) * 0.05)).astype(np.float32)
        # a click, by which the two are aligned
        tone[RATE : RATE + 480] = 0.9
        resampler = av.AudioResampler(sound.codec_context.format, "mono", RATE, sound.frame_size)
        whole = av.AudioFrame.from_ndarray(tone[None], "fltp", "mono")
        whole.sample_rate, whole.pts, whole.time_base = RATE, 0, Fraction(1, RATE)
        for piece in [*resampler.resample(whole), *resampler.resample(None)]:
            container.mux(sound.encode(piece))
        container.mux(sound.encode(None))
    return path


def click(path: Path) -> float:
    """When the click is heard after the first frame is shown, in seconds."""
    with av.open(str(path)) as container:
        first = next(container.decode(video=0)).time
    with av.open(str(path)) as container:
        for frame in container.decode(audio=0):
            loud = np.abs(frame.to_ndarray().astype(np.float64))
            loud = loud / (32768 if frame.format.name.startswith("s16") else 1)
            if loud.max() > 0.7:
                return float(frame.time + np.argmax(loud.ravel() > 0.7) / RATE - first)
    raise AssertionError("no click")


@pytest.mark.parametrize(
    ("codec", "suffix"), [("aac", ".mp4"), ("libopus", ".mkv"), ("ac3", ".ts")]
)
@pytest.mark.parametrize("late", [0, 10])
def test_packets_are_copied_in_time(tmp_path: Path, codec: str, suffix: str, late: int) -> None:
    source = with_sound(tmp_path / f"clip{suffix}", codec, late=late)
    reader = VideoReader(source)
    frames = torch.stack([*reader.frames()])
    out = tmp_path / "out.mp4"
    with video_writer(out, reader.info.fps, sound=reader.sound) as writer:
        for piece in frames.split(17):
            writer.add(piece)
    assert VideoReader(out).info.num_frames == 50 and VideoReader(out).info.fps == 25
    assert click(out) == pytest.approx(click(source), abs=0.012)
    with av.open(str(source)) as before, av.open(str(out)) as after:
        old = [bytes(packet) for packet in before.demux(audio=0) if packet.size]
        new = [bytes(packet) for packet in after.demux(audio=0) if packet.size]
    assert new == old[len(old) - len(new) :]
    assert len(new) >= len(old) - late * 0.04 * RATE / 900 - 2
    whole = tmp_path / "whole.mp4"
    with video_writer(whole, reader.info.fps, sound=reader.sound) as writer:
        writer.add(frames)
    assert whole.read_bytes() == out.read_bytes()


def test_sound_that_an_mp4_cannot_hold(tmp_path: Path) -> None:
    sound = VideoReader(with_sound(tmp_path / "clip.mov", "pcm_s16le")).sound
    assert sound is not None and sound.codec == "pcm_s16le" and not sound.is_copied


def test_a_silent_video_has_no_sound(tmp_path: Path, clip: Clips) -> None:
    assert VideoReader(clip(tmp_path / "clip.mp4")).sound is None
