"""One pass over a video file before any frame is decoded: sizes, exact count, timestamps, rate.

Time stamps become ticks of one rate (see `clock`). Packets are demuxed, and decoded only where they
are no reliable count, so a truncated file is found here. How long the last frame is held is no
count: what a container promises is believed only where bytes of it lack.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from mv2v_engine import arguments
from mv2v_engine.config import Alpha
from mv2v_engine.errors import VideoError, VideoRangeError
from mv2v_engine.video.clock import clock
from mv2v_engine.video.pictures import Pictures, has_room_for_alpha, is_seen_through
from mv2v_engine.video.sound import Sound, find_sound

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_MATROSKA = "matroska,webm"
# the element that holds all others, and how far from the beginning it lies at most
_SEGMENT, _HEADER_BYTES = b"\x18\x53\x80\x67", 4096
# containers whose packets are whole frames, except for a codec with frames that are never shown
FRAME_PER_PACKET = {"mov,mp4,m4a,3gp,3g2,mj2", _MATROSKA}
_HIDDEN_FRAMES = {"vp8"}
# those that store when each frame is shown, where others guess the last ones
_STORE_TIMES = FRAME_PER_PACKET | {"gif", "apng"}
# the beginning of an address as `Path` leaves it
_ADDRESS = re.compile("[a-z]{2,}:/")
# FFmpeg's own decoders of these leave alpha out
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# renders any text file as a picture of its letters
_TEXT_DEMUXER = "tty"
# frames a second that a video may have, read or written
MIN_FPS, MAX_FPS = 0.01, 1000.0
# the longer side of a frame over its shorter one, at most
MAX_ASPECT = 16
# Matroska's tag of a track's length; anything may be written there
_CLOCK = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")


# called between the packets of a file; what it raises ends the reading
Check: TypeAlias = Callable[[], None]
# threads of a decoder: each one may hold a frame
_MAX_THREADS = 4
# pixels by which blocks of a codec may reach over a small frame
_PADDING = 1 << 20


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


@dataclass(frozen=True, slots=True)
class Scan:
    """One pass over a file. order[i] is the stored frame shown at tick i.

    coded_size, square_size: (height, width) as stored and with square pixels, before rotation.
    stamps: increasing timestamps of the stored frames, empty if the file has no usable ones.
    keyframes: timestamps at which decoding can begin. pictures: how frames become RGB.
    is_interlaced: whether frames are made of two fields each. notes: what is changed of the video,
        in words. num_skipped: pictures before the first whole one.
    """

    info: VideoInfo
    coded_size: tuple[int, int]
    square_size: tuple[int, int]
    order: tuple[int, ...]
    stamps: tuple[int, ...]
    keyframes: tuple[int, ...]
    pictures: Pictures
    is_interlaced: bool
    notes: tuple[str, ...]
    num_skipped: int
    sound: Sound | None


@contextmanager
def opened(
    path: Path, max_pixels: int | None = None
) -> Iterator[tuple[InputContainer, VideoStream, VideoCodecContext]]:
    """The container, its video stream and the decoder; decoding errors become one VideoError.

    Of several streams the one that is marked as the default.

    max_pixels: of a frame. The decoder is held to it too, up to the padding of its blocks: a file
        may change its size behind its header.
    """
    import av

    if not path.is_file():
        got = "is a folder" if path.is_dir() else "does not exist"
        advice = "give the path of a video file"
        if _ADDRESS.match(str(path)):
            advice = "an address is not fetched: download it, and give the path of the file"
        elif "*" in path.name:
            advice = "give the images' folder, or their pattern, as %03d.png"
        raise VideoError(f"{path} {got}; {advice}")
    if not path.stat().st_size:
        raise VideoError(f"{path.name} is empty (0 bytes); give a whole video file")
    most = None if max_pixels is None else min(2 * max_pixels + _PADDING, 2**31 - 1)
    bound = {} if most is None else {"max_pixels": str(most)}
    try:
        # tags may be in any encoding, and nobody reads them here
        with av.open(
            str(path.resolve()),
            metadata_errors="replace",
            options={"protocol_whitelist": "file"},
        ) as container:
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
            stream = default_stream(streams)
            decoder = _decoder(stream)
            decoder.thread_type = "AUTO"
            decoder.thread_count = min(_MAX_THREADS, os.cpu_count() or 1)
            decoder.options = bound
            yield container, stream, decoder
    except av.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise
        raise VideoError(
            f"{path.name} cannot be decoded as a video ({error.strerror}): not a video, damaged "
            "or truncated; give a whole video file"
        ) from error


def default_stream(streams: Sequence[VideoStream]) -> VideoStream:
    """The stream that is marked as the default, else the first."""
    import av

    default = av.stream.Disposition.default
    return next((stream for stream in streams if stream.disposition & default), streams[0])


def _decoder(stream: VideoStream) -> VideoCodecContext:
    """The stream's own decoder; of VP8 and VP9 with alpha one that reads it."""
    import av

    own = stream.codec_context
    name = _ALPHA_DECODERS.get(own.name)
    if name is None or stream.metadata.get("alpha_mode", "0") != "1":
        return own
    try:
        decoder: VideoCodecContext = av.VideoCodecContext.create(name, "r")  # type: ignore[assignment]
    except av.codec.codec.UnknownCodecError:
        return own
    decoder.extradata = own.extradata
    return decoder


def rate_notes(own: float, asked: float | None) -> tuple[str, ...]:
    """What another rate than a file's own changes of it, in words. asked: None keeps it."""
    if asked in (None, own):
        return ()
    return (f"its {own:g} frames a second are taken for {asked:g}",)


def check_fps(name: str, fps: float | Fraction) -> None:
    """Refuse a rate that no video has. name: of what has it, for the error.

    Raises:
        RequestError: it is no number.
        VideoRangeError: it is out of range.
    """
    arguments.number(name, fps)
    if not MIN_FPS <= fps <= MAX_FPS:
        raise VideoRangeError(
            f"{name} must lie in {MIN_FPS:g} to {MAX_FPS:g}, got {float(fps):g}; give the clip's "
            "own rate, a file's by `ffmpeg -r RATE -i FILE new.mp4`"
        )


def check_aspect(name: str, height: int, width: int) -> None:
    """Refuse frames of which a crop to any usual size would show next to nothing.

    name: of the video, for the error.

    Raises:
        VideoRangeError: one side is more than `MAX_ASPECT` times the other.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise VideoRangeError(
            f"{name} has frames of {width}x{height}, one side more than {MAX_ASPECT} times the "
            f"other; crop or pad it to {MAX_ASPECT}:1 or less"
        )


def check_picture_size(path: Path, width: int, height: int, max_pixels: int | None) -> None:
    """Refuse frames that are too large, or too long and narrow."""
    check_aspect(path.name, height, width)
    if max_pixels is not None and width * height > max_pixels:
        raise VideoError(
            f"{path.name} is {width}x{height} ({width * height / 1e6:.1f} MP); "
            f"at most {max_pixels / 1e6:.1f} MP; scale it down first"
        )


def packets(
    container: InputContainer, stream: VideoStream, check: Check | None
) -> Iterator[Packet[VideoStream]]:
    """The packets of a stream, the empty one that ends it included."""
    for packet in container.demux(stream):
        if check is not None:
            check()
        yield packet


def scan_file(
    path: Path,
    max_pixels: int | None,
    check: Check | None = None,
    alpha: Alpha = "black",
) -> Scan:
    """Sizes and timestamps of every frame.

    Just the first is decoded where packets can be trusted, of frames with room for alpha as many
    as are opaque.
    """
    with opened(path, max_pixels) as (container, stream, decoder):
        check_picture_size(path, stream.width, stream.height, max_pixels)
        codec = stream.codec_context.name
        trusted = container.format.name in FRAME_PER_PACKET and codec not in _HIDDEN_FRAMES
        walk = _walk(path, container, stream, decoder, trusted, check)
        first, found = walk.first, walk.found
        stamps = tuple(sorted(stamp for stamp in found if stamp is not None))
        if len(set(stamps)) < len(found):
            stamps = ()
        told = (stream.average_rate, stream.guessed_rate, stream.base_rate)
        guesses = container.format.name not in _STORE_TIMES
        begin = (stamps[0] if stamps else 0) * (stream.time_base or Fraction(1))
        rate, order, held = clock(len(found), stamps, stream.time_base, told, guesses=guesses)
        check_fps(f"the fps of {path.name}", rate)
        if not stream.frames and not walk.num_skipped:
            _check_duration(path, container, stream, stamps, rate, walk.last_held)
        square = square_size(first, stream)
        check_picture_size(path, square[1], square[0], max_pixels)
        has_alpha = has_room_for_alpha(first) and _is_any_seen_through(path, max_pixels, check)
        pictures = Pictures(path, first, stream.codec_context, alpha, has_alpha=has_alpha)
        notes = list(pictures.notes)
        if walk.num_skipped:
            notes.append(
                f"it begins within a group of pictures: {walk.num_skipped} that cannot be decoded "
                "are left out, it starts at the first whole one"
            )
        if held is not None:
            notes.append(held)
        videos = container.streams.video
        if len(videos) > 1 and stream is not videos[0]:
            size = f"{stream.width}x{stream.height}"
            notes.insert(0, f"of {len(videos)} video streams the default, {size}, was taken")
        is_interlaced = first.interlaced_frame
        if is_interlaced:
            notes.append("it is interlaced, and was deinterlaced (bwdif)")
        return Scan(
            info=_info(path, first.rotation % 360, square, len(order), rate, codec),
            coded_size=(first.height, first.width),
            square_size=square,
            order=order,
            stamps=stamps,
            keyframes=tuple(sorted(walk.keyframes)),
            pictures=pictures,
            is_interlaced=is_interlaced,
            notes=tuple(notes),
            num_skipped=walk.num_skipped,
            sound=find_sound(path, container, begin),
        )


def _is_any_seen_through(path: Path, max_pixels: int | None, check: Check | None) -> bool:
    """Whether a pixel of any frame is transparent: decodes up to the first one that has some."""
    with opened(path, max_pixels) as (container, stream, decoder):
        return any(
            is_seen_through(frame)
            for packet in packets(container, stream, check)
            for frame in decoder.decode(packet)
        )


@dataclass(frozen=True, slots=True)
class _Walk:
    """What the packets of a file hold.

    first: the first whole frame. found: the timestamp of every frame from it on. keyframes: those
    at which decoding can begin, empty where packets are no frames. num_skipped: pictures before
    the first whole one. last_held: how long the last one is to be shown, in units of the stream.
    """

    first: VideoFrame
    found: list[int | None]
    keyframes: list[int]
    num_skipped: int
    last_held: int


def _walk(
    path: Path,
    container: InputContainer,
    stream: VideoStream,
    decoder: VideoCodecContext,
    trusted: bool,
    check: Check | None,
) -> _Walk:
    """Count the frames. trusted: a packet is one, so only the first is decoded; else all are."""
    first: VideoFrame | None = None
    found: list[int | None] = []
    keyframes: list[int] = []
    num_hidden = num_before = last_held = 0
    latest: int | None = None
    first_key: int | None = None
    is_begun = False
    for packet in packets(container, stream, check):
        if packet.size and not is_begun:
            is_begun = packet.is_keyframe
            first_key = packet.pts if is_begun else None
            num_before += not is_begun
        if packet.pts is not None and (latest is None or packet.pts > latest):
            latest, last_held = packet.pts, packet.duration or 0
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
            frames = decoder.decode(packet)
            if first is None:
                # a decoder makes up what lies before the first key frame
                whole = (frame for frame in frames if not num_before or frame.key_frame)
                first = next(whole, None)
            if not trusted:
                found.extend(frame.pts for frame in frames)
    if first is None or not found:
        raise VideoError(
            f"{path.name} holds 0 decodable frames, at least 1 is needed: damaged or truncated; "
            "give a whole video file"
        )
    if len(found) + num_hidden < stream.frames:
        raise truncated(path, len(found), stream.frames - num_hidden)
    kept, num_cut = found, 0
    if first.pts is not None:
        kept = [stamp for stamp in found if stamp is None or stamp >= first.pts]
        lost = [stamp for stamp in found if stamp is not None and stamp < first.pts]
        # else what lacks is damage, and is said where it is read
        is_beginning = num_before or (first_key is not None and all(s < first_key for s in lost))
        kept, num_cut = (kept, len(lost)) if is_beginning else (found, 0)
    num_skipped = num_cut if trusted else max(num_cut, num_before)
    return _Walk(first, kept, keyframes, num_skipped, last_held)


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


def square_size(frame: VideoFrame, stream: VideoStream) -> tuple[int, int]:
    """(height, width) with square pixels, before rotation."""
    aspect = stream.sample_aspect_ratio
    # ratios within 1 % of square come from cropped encodes; scaling would only blur
    if not aspect or abs(aspect - 1) < Fraction(1, 100):
        return frame.height, frame.width
    return frame.height, max(1, round(frame.width * aspect))


def check_size(path: Path, scan: Scan, frame: VideoFrame) -> None:
    """Refuse a frame of another size than the first one's."""
    if (frame.height, frame.width) != scan.coded_size:
        raise VideoError(
            f"{path.name} changes its frame size from {scan.coded_size[1]}x{scan.coded_size[0]} to "
            f"{frame.width}x{frame.height}; re-encode it at one size"
        )


def truncated(path: Path, found: int, promised: int) -> VideoError:
    return VideoError(
        f"{path.name} is truncated: {found} frames could be read, its header promises {promised}; "
        "give the whole file, or re-encode what is left"
    )


def _check_duration(
    path: Path,
    container: InputContainer,
    stream: VideoStream,
    stamps: tuple[int, ...],
    rate: Fraction,
    last_held: int,
) -> None:
    """A container without a frame count still promises a duration; frames must nearly fill it."""
    if len(stamps) < 2 or stream.time_base is None:
        return
    if container.format.name == _MATROSKA and not _lacks_bytes(path):
        return
    promised = 0.0
    told = _CLOCK.fullmatch(stream.metadata.get("DURATION", ""))
    if told is not None:
        promised = int(told[1]) * 3600 + int(told[2]) * 60 + float(told[3])
    elif len(container.streams) == 1 and container.duration:
        promised = container.duration / 1e6
    last = max(last_held * stream.time_base, 1 / rate)
    held = float((stamps[-1] - stamps[0]) * stream.time_base + last)
    longest = max(b - a for a, b in pairwise(stamps)) * stream.time_base
    if promised - held > max(0.1 * promised, 3 * float(longest)):
        raise truncated(path, len(stamps), round(promised * rate))


def _lacks_bytes(path: Path) -> bool:
    """Whether a Matroska file is shorter than its segment says that it is."""
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
    at = head.find(_SEGMENT)
    if at < 0 or at + 12 > len(head):
        return True
    at += len(_SEGMENT)
    # the first byte's leading zeros count the bytes of the number behind it
    length = 9 - head[at].bit_length()
    size = int.from_bytes(head[at : at + length], "big") - (1 << 7 * length)
    is_known = size != (1 << 7 * length) - 1
    return is_known and path.stat().st_size < at + length + size
