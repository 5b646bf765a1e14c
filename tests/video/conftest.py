"""Small real clips, written with PyAV in any container and codec."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

LEVEL_STEP = 9


def write_clip(
    path: Path,
    *,
    num_frames: int = 20,
    size: tuple[int, int] = (48, 64),
    codec: str = "libx264",
    rate: int = 25,
    stamps_ms: Sequence[int] | None = None,
    frames: np.ndarray | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    aspect: Fraction | None = None,
    audio: bool = False,
) -> Path:
    """Frame i is grey of level i * LEVEL_STEP unless `frames` are given."""
    pixel_format = {"mjpeg": "yuvj420p", "ffv1": "yuv444p"}.get(codec, "yuv420p")
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = size
        stream.pix_fmt = pixel_format
        if codec.startswith("mpeg"):
            stream.bit_rate = 4_000_000
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if stamps_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if audio:
            sound = container.add_stream("aac", rate=8000)
            quiet = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
            quiet.sample_rate, quiet.pts = 8000, 0
            for packet in [*sound.encode(quiet), *sound.encode(None)]:
                container.mux(packet)
        for index in range(num_frames):
            if frames is None:
                pixels = np.full((*size, 3), index * LEVEL_STEP, np.uint8)
            else:
                pixels = frames[index]
            picture = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format=pixel_format)
            if stamps_ms is not None:
                picture.pts, picture.time_base = stamps_ms[index], Fraction(1, 1000)
            container.mux(stream.encode(picture))
        if num_frames:
            container.mux(stream.encode(None))
    return path


@pytest.fixture
def clip() -> Callable[..., Path]:
    return write_clip


@pytest.fixture
def level_step() -> int:
    return LEVEL_STEP


def with_alpha(
    path: Path, codec: str, form: str, num_frames: int = 3, opaque: int | None = 0
) -> Path:
    """Red, of which the right half is transparent, after `opaque` frames; None: all are."""
    pixels = np.zeros((32, 64, 4), np.uint8)
    pixels[..., 0], pixels[..., 3] = 200, 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 32, form
        if codec == "libvpx-vp9":
            stream.options = {"lossless": "1"}
        for index in range(num_frames):
            if index == opaque:
                pixels[:, 32:, 3] = 0
            frame = av.VideoFrame.from_ndarray(pixels, "rgba").reformat(format=form)
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
