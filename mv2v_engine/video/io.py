"""Video files to uint8 frames and back, with PyAV; audio is ignored.

Any container and codec that PyAV reads. Frames come out as a viewer shows them: rotation flag and
pixel aspect applied. Timestamps rule: a constant-rate file comes through frame for frame, a
variable-rate one is resampled to its average rate, each tick taking the frame nearest in time.
A file is scanned once (demuxed; decoded only where packets are no reliable count) before frames
are decoded, so the number of frames is exact and a truncated file is found before any work.

T frames; sizes are (height, width) in pixels.
"""

from __future__ import annotations

import io
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mv2v_engine.config import EngineConfig
from mv2v_engine.errors import VideoError
from mv2v_engine.files import replacing

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

DEFAULT_MAX_PIXELS = EngineConfig().max_source_pixels

# containers whose packets are whole frames, except for a codec with frames that are never shown
_FRAME_PER_PACKET = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
_HIDDEN_FRAMES = {"vp8"}
# renders any text file as a picture of its letters
_TEXT_DEMUXER = "tty"
_DEFAULT_RATE = Fraction(25)


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a file holds, as `read_video` would return it.

    width, height: pixels after rotation and pixel aspect. num_frames: exact. fps: constant rate
    after resampling. duration: seconds. rotation: degrees counter-clockwise that were applied.
    """

    path: Path
    width: int
    height: int
    num_frames: int
    fps: float
    codec: str
    duration: float
    rotation: int


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """Frames uint8 [T, height, width, 3] (RGB) at a constant rate."""

    frames: Tensor
    fps: float


@dataclass(frozen=True, slots=True)
class _Scan:
    """One pass over a file. order[i] is the stored frame shown at tick i.

    coded_size, square_size: (height, width) as stored and with square pixels, before rotation.
    stamps: increasing timestamps of the stored frames, empty if the file has no usable ones.
    keyframes: timestamps at which decoding can begin.
    """

    info: VideoInfo
    coded_size: tuple[int, int]
    square_size: tuple[int, int]
    order: tuple[int, ...]
    stamps: tuple[int, ...]
    keyframes: tuple[int, ...]


def probe_video(path: Path | str) -> VideoInfo:
    """Size, exact frame count and rate of a video file.

    Raises:
        VideoError: missing, empty, truncated, or not a video.
    """
    return _scan(Path(path), max_pixels=None).info


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
    scan = _scan(path, max_pixels=max_pixels)
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


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video stream; every decoding error becomes one VideoError."""
    import av

    if not path.is_file():
        got = "is a folder" if path.is_dir() else "does not exist"
        raise VideoError(f"{path} {got}; give the path of a video file")
    if not path.stat().st_size:
        raise VideoError(f"{path.name} is empty (0 bytes); give a whole video file")
    try:
        with av.open(str(path.resolve()), options={"protocol_whitelist": "file"}) as container:
            attached = av.stream.Disposition.attached_pic
            streams = [
                stream
                for stream in container.streams.video
                if stream.codec_context is not None and not stream.disposition & attached
            ]
            is_text = container.format.name == _TEXT_DEMUXER
            if not streams or is_text:
                kinds = "text" if is_text else ", ".join(s.type for s in container.streams)
                raise VideoError(
                    f"{path.name} holds no video stream that can be decoded (it holds "
                    f"{kinds or 'nothing'}): not a video, or cut off before its index; "
                    "give a whole video file"
                )
            stream = streams[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except av.FFmpegError as error:
        raise VideoError(
            f"{path.name} cannot be decoded as a video ({error.strerror}): not a video, damaged "
            "or truncated; give a whole video file"
        ) from error


def _check_pixels(path: Path, width: int, height: int, max_pixels: int | None) -> None:
    if max_pixels is not None and width * height > max_pixels:
        raise VideoError(
            f"{path.name} is {width}x{height} ({width * height / 1e6:.1f} MP); "
            f"at most {max_pixels / 1e6:.1f} MP; scale it down first"
        )


def _scan(path: Path, max_pixels: int | None) -> _Scan:
    """Sizes and timestamps of every frame, decoding just the first where packets can be trusted."""
    with _opened(path) as (container, stream):
        _check_pixels(path, stream.width, stream.height, max_pixels)
        codec = stream.codec_context.name
        trusted = container.format.name in _FRAME_PER_PACKET and codec not in _HIDDEN_FRAMES
        first, found, keyframes = _walk(path, container, stream, trusted)
        stamps = tuple(sorted(stamp for stamp in found if stamp is not None))
        if len(set(stamps)) < len(found):
            stamps = ()
        rate, order = _clock(len(found), stamps, stream)
        if not stream.frames:
            _check_duration(path, container, stream, stamps, rate)
        square = _square_size(first, stream)
        _check_pixels(path, square[1], square[0], max_pixels)
        return _Scan(
            info=_info(path, first.rotation % 360, square, len(order), rate, codec),
            coded_size=(first.height, first.width),
            square_size=square,
            order=order,
            stamps=stamps,
            keyframes=tuple(sorted(keyframes)),
        )


def _walk(
    path: Path, container: InputContainer, stream: VideoStream, trusted: bool
) -> tuple[VideoFrame, list[int | None], list[int]]:
    """The first frame, the timestamp of every frame, and those of key frames if `trusted`.

    trusted: a packet is a frame, so only the first one is decoded; otherwise all are.
    """
    first: VideoFrame | None = None
    found: list[int | None] = []
    keyframes: list[int] = []
    num_hidden = 0
    for packet in container.demux(stream):
        if trusted and packet.size:
            if packet.is_corrupt:  # cut off in the middle
                continue
            if packet.is_discard:  # outside the edit list
                num_hidden += 1
            else:
                found.append(packet.pts)
                if packet.is_keyframe and packet.pts is not None:
                    keyframes.append(packet.pts)
        if first is None or not trusted:
            frames = packet.decode()
            first = first or next(iter(frames), None)
            if not trusted:
                found.extend(frame.pts for frame in frames)
    if first is None or not found:
        raise VideoError(
            f"{path.name} holds 0 decodable frames, at least 1 is needed: damaged or truncated; "
            "give a whole video file"
        )
    if len(found) + num_hidden < stream.frames:
        raise _truncated(path, len(found), stream.frames - num_hidden)
    return first, found, keyframes


def _info(
    path: Path, rotation: int, size: tuple[int, int], num_frames: int, rate: Fraction, codec: str
) -> VideoInfo:
    if rotation % 90:
        raise VideoError(
            f"{path.name} is flagged as rotated by {rotation} degrees; only quarter turns can be "
            "applied; re-encode it upright"
        )
    height, width = size[::-1] if rotation % 180 else size
    return VideoInfo(
        path=path,
        width=width,
        height=height,
        num_frames=num_frames,
        fps=float(rate),
        codec=codec,
        duration=float(num_frames / rate),
        rotation=rotation,
    )


def _square_size(frame: VideoFrame, stream: VideoStream) -> tuple[int, int]:
    """(height, width) with square pixels, before rotation."""
    aspect = stream.sample_aspect_ratio
    # ratios within 1 % of square come from cropped encodes; scaling would only blur
    if not aspect or abs(aspect - 1) < Fraction(1, 100):
        return frame.height, frame.width
    return frame.height, max(1, round(frame.width * aspect))


def _truncated(path: Path, found: int, promised: int) -> VideoError:
    return VideoError(
        f"{path.name} is truncated: {found} frames could be read, its header promises {promised}; "
        "give the whole file, or re-encode what is left"
    )


def _clock(
    num_frames: int, stamps: tuple[int, ...], stream: VideoStream
) -> tuple[Fraction, tuple[int, ...]]:
    """The constant rate, and for each of its ticks the stored frame nearest in time."""
    rates = (stream.average_rate, stream.guessed_rate, stream.base_rate)
    nominal = [rate for rate in rates if rate]
    identity = tuple(range(num_frames))
    if len(stamps) < 2 or stream.time_base is None:
        return (nominal or [_DEFAULT_RATE])[0], identity
    seconds = [(stamp - stamps[0]) * stream.time_base for stamp in stamps]
    measured = (num_frames - 1) / seconds[-1]
    half = Fraction(1, 2)
    for rate in nominal:
        # the whole span must fit the rate, up to the rounding of stamps to the time base
        slack = Fraction(1, 20) + rate * stream.time_base * 3 / 2
        if abs(rate / measured - 1) * (num_frames - 1) <= slack and _drift(seconds, rate) <= half:
            return rate, identity
    if _drift(seconds, measured) <= half:
        return measured, identity
    for rate in nominal:
        # never more than a frame off its clock: some containers only guess their last stamps
        if _drift(seconds, rate) <= 1 + rate * stream.time_base:
            return rate, identity
    order = []
    for tick in range(num_frames):
        time = tick / measured
        after = min(bisect_left(seconds, time), num_frames - 1)
        before = max(after - 1, 0)
        order.append(before if time - seconds[before] <= seconds[after] - time else after)
    return measured, tuple(order)


def _drift(seconds: Sequence[Fraction], rate: Fraction) -> Fraction:
    """The most that a frame is away from its tick, in frames."""
    return max(abs(second * rate - tick) for tick, second in enumerate(seconds))


def _check_duration(
    path: Path,
    container: InputContainer,
    stream: VideoStream,
    stamps: tuple[int, ...],
    rate: Fraction,
) -> None:
    """A container without a frame count still promises a duration; frames must nearly fill it."""
    if len(stamps) < 2 or stream.time_base is None:
        return
    promised = 0.0
    if "DURATION" in stream.metadata:
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        promised = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    elif len(container.streams) == 1 and container.duration:
        promised = container.duration / 1e6
    held = float((stamps[-1] - stamps[0]) * stream.time_base + 1 / rate)
    longest = max(b - a for a, b in pairwise(stamps)) * stream.time_base
    if promised - held > max(0.1 * promised, 3 * float(longest)):
        raise _truncated(path, len(stamps), round(promised * rate))


def _decode(path: Path, scan: _Scan, wanted: Sequence[int]) -> Tensor:
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
    raise _truncated(path, min(missing), scan.info.num_frames)


def _stored_frames(path: Path, scan: _Scan, seek: int | None) -> Iterator[tuple[int, VideoFrame]]:
    """Decoded frames with their number in the file, from the key frame stamped `seek` on."""
    number = {stamp: index for index, stamp in enumerate(scan.stamps)}
    with _opened(path) as (container, stream):
        if seek is not None:
            container.seek(seek, stream=stream)
        for index, frame in enumerate(container.decode(stream)):
            if not scan.stamps:
                yield index, frame
            elif frame.pts in number:
                yield number[frame.pts], frame


def _pixels(path: Path, scan: _Scan, frame: VideoFrame) -> Tensor:
    """One frame as uint8 [height, width, 3], upright."""
    if (frame.height, frame.width) != scan.coded_size:
        raise VideoError(
            f"{path.name} changes its frame size from {scan.coded_size[1]}x{scan.coded_size[0]} to "
            f"{frame.width}x{frame.height}; re-encode it at one size"
        )
    height, width = scan.square_size
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24", width=width, height=height))
    return torch.rot90(pixels, scan.info.rotation // 90, (0, 1))
