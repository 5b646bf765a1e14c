"""Video files to uint8 frames and back, with PyAV; audio is ignored.

Any container and codec that PyAV reads. Frames come out as a viewer shows them: rotation flag and
pixel aspect applied. A file is scanned first (see `scan`), so that the number of frames is exact
and a truncated file is found before any work.

T frames; sizes are (height, width) in pixels.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mv2v_engine.config import EngineConfig
from mv2v_engine.errors import VideoError
from mv2v_engine.files import replacing
from mv2v_engine.video.scan import Scan, VideoInfo, opened, scan_file, truncated

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

DEFAULT_MAX_PIXELS = EngineConfig().max_source_pixels


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """Frames uint8 [T, height, width, 3] (RGB) at a constant rate."""

    frames: Tensor
    fps: float


def probe_video(path: Path | str) -> VideoInfo:
    """Size, exact frame count and rate of a video file.

    Raises:
        VideoError: missing, empty, truncated, or not a video.
    """
    return scan_file(Path(path), max_pixels=None).info


def read_video(
    path: Path | str,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    start: int = 0,
    count: int | None = None,
    indices: Sequence[int] | None = None,
) -> Clip:
    """Decode frames `start` to `start + count` (default: to the end), or the given `indices`.

    Only what is needed is decoded: from the key frame before the first frame asked for to the
    last one. `indices` may repeat and takes the place of start and count.

    Raises:
        VideoError: as `probe_video`; frames larger than `max_pixels`; frames that do not exist.
    """
    path = Path(path)
    scan = scan_file(path, max_pixels=max_pixels)
    available = scan.info.num_frames
    if indices is None:
        stop = available if count is None else start + count
        indices = range(start, stop)
    if not indices or min(indices) < 0 or max(indices) >= available:
        asked = f"{min(indices)} to {max(indices)}" if indices else "none"
        raise VideoError(
            f"{path.name} has {available} frames (0 to {available - 1}), but {asked} were asked "
            "for; ask for frames that exist"
        )
    wanted = [scan.order[index] for index in indices]
    return Clip(_decode(path, scan, wanted), scan.info.fps)


def write_video(path: Path | str, frames: Tensor, fps: float | Fraction, *, crf: int = 18) -> None:
    """Write frames uint8 [T, height, width, 3] as h264 in mp4, whole or not at all.

    Colours are BT.709, 4:2:0; odd sizes, which 4:2:0 cannot hold, are written as 4:4:4. The same
    frames give the same bytes: one encoder thread, no time stamp.

    Raises:
        VideoError: the frames are not such a tensor, or this PyAV cannot encode h264.
        StorageError: the place cannot be written; nothing is left behind.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8 or not len(frames):
        raise VideoError(
            "frames to write must be uint8 [T, height, width, 3] with T >= 1, "
            f"got {frames.dtype} {list(frames.shape)}"
        )
    if not 0.01 <= fps <= 1000:
        raise VideoError(f"fps must lie in 0.01 to 1000, got {fps}; give the rate of the clip")
    encoded = _encode(frames.cpu(), Fraction(fps).limit_denominator(1001), crf)
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(encoded)


def _encode(frames: Tensor, rate: Fraction, crf: int) -> bytes:
    """The bytes of an mp4; in memory, so that a full disk is met in one place only."""
    import av

    height, width = frames.shape[1:3]
    pixel_format = "yuv444p" if height % 2 or width % 2 else "yuv420p"
    buffer = io.BytesIO()
    try:
        with av.open(buffer, "w", format="mp4") as container:
            # with its macroblock tree x264 reads memory that it never wrote: other bytes each run
            options = {"crf": str(crf), "mbtree": "0"}
            stream = container.add_stream("libx264", rate=rate, options=options)
            stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
            stream.codec_context.thread_count = 1
            stream.codec_context.color_range = 1  # limited
            for name in ("colorspace", "color_primaries", "color_trc"):
                setattr(stream.codec_context, name, 1)  # BT.709
            for index, frame in enumerate(frames):
                picture = av.VideoFrame.from_ndarray(frame.contiguous().numpy(), format="rgb24")
                picture = picture.reformat(
                    format=pixel_format, dst_colorspace="ITU709", dst_color_range="MPEG"
                )
                picture.pts, picture.time_base = index, 1 / rate
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
    except (av.FFmpegError, av.codec.codec.UnknownCodecError) as error:
        raise VideoError(
            f"cannot encode {len(frames)} frames of {width}x{height} as h264 ({error}); "
            "install a PyAV that has libx264"
        ) from error
    return buffer.getvalue()


def _decode(path: Path, scan: Scan, wanted: Sequence[int]) -> Tensor:
    """The stored frames `wanted` (any order, repeats allowed) as uint8 [T, height, width, 3]."""
    places: dict[int, list[int]] = {}
    for place, stored in enumerate(wanted):
        places.setdefault(stored, []).append(place)
    out = torch.empty(len(wanted), scan.info.height, scan.info.width, 3, dtype=torch.uint8)
    first_key = None
    if scan.stamps:
        target = scan.stamps[min(places)]
        first_key = next((key for key in reversed(scan.keyframes) if key <= target), None)
    missing = set(places)
    # a file may lie about its key frames: then once more from its beginning
    for seek in (first_key, None) if first_key is not None else (None,):
        for stored, frame in _stored_frames(path, scan, seek):
            if stored in missing:
                pixels = _pixels(path, scan, frame)
                for place in places[stored]:
                    out[place] = pixels
                missing.discard(stored)
            if not missing:
                return out
    raise truncated(path, min(missing), scan.info.num_frames)


def _stored_frames(path: Path, scan: Scan, seek: int | None) -> Iterator[tuple[int, VideoFrame]]:
    """Decoded frames with their number in the file, from the key frame stamped `seek` on."""
    number = {stamp: index for index, stamp in enumerate(scan.stamps)}
    with opened(path) as (container, stream):
        if seek is not None:
            container.seek(seek, stream=stream)
        for index, frame in enumerate(container.decode(stream)):
            if not scan.stamps:
                yield index, frame
            elif frame.pts in number:
                yield number[frame.pts], frame


def _pixels(path: Path, scan: Scan, frame: VideoFrame) -> Tensor:
    """One frame as uint8 [height, width, 3], upright."""
    if (frame.height, frame.width) != scan.coded_size:
        raise VideoError(
            f"{path.name} changes its frame size from {scan.coded_size[1]}x{scan.coded_size[0]} to "
            f"{frame.width}x{frame.height}; re-encode it at one size"
        )
    height, width = scan.square_size
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24", width=width, height=height))
    return torch.rot90(pixels, scan.info.rotation // 90, (0, 1))
