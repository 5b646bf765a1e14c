"""Video files to uint8 frames and back, with PyAV; sound is copied where a writer is given it.

Any container and codec that PyAV reads. Frames come out as a viewer shows them: rotation flag and
pixel aspect applied, HDR tone-mapped, fields woven into whole frames, alpha composed; `notes` says
so (see `pictures`). A file is scanned first (see `scan`), so that the number of frames is exact
and a truncated file is found before any work. `VideoReader` and `VideoWriter` hold no more of a
long video than they are asked for or given.

T frames; sizes are (height, width) in pixels.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from mv2v_engine import arguments
from mv2v_engine.config import Alpha, EngineConfig, Fit
from mv2v_engine.errors import RequestError, VideoError
from mv2v_engine.files import replacing
from mv2v_engine.video.fields import deinterlaced
from mv2v_engine.video.scan import (
    Check,
    Scan,
    VideoInfo,
    check_fps,
    check_size,
    opened,
    packets,
    truncated,
)
from mv2v_engine.video.sound import Sound, SoundCopy
from mv2v_engine.video.stills import Stills, decode_stills, scan_video
from mv2v_engine.video.transforms import cover_and_crop

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

DEFAULT_MAX_PIXELS = EngineConfig().max_source_pixels
# the frames that are looked at for the white of an HDR video
_MEASURED_FRAMES = 5
# the most bytes of the frames of one read
MAX_READ_BYTES = 16 << 30


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
    return VideoReader(path, max_pixels=None).info


def read_video(
    path: Path | str,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Clip:
    """Decode all frames of a video.

    Raises:
        VideoError: as `probe_video` and `VideoReader.read`; frames larger than `max_pixels`.
    """
    reader = VideoReader(path, max_pixels=max_pixels)
    return Clip(reader.read(range(reader.info.num_frames)), reader.info.fps)


class VideoReader:
    """A video that is scanned once and decoded where it is asked for.

    path: a file, a folder of images, or their pattern (`frames/%03d.png`). image_fps: of images,
        which say none; None takes 25.

    check: called between packets, here and where frames are read; what it raises ends the reading.
    alpha: what is put behind transparent pixels, "black" or "white"; "refuse" does not take them.

    notes: what is changed of the video before anybody sees a frame, in words.

    Raises:
        VideoError: as `probe_video`; frames larger than `max_pixels`.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        max_pixels: int | None = DEFAULT_MAX_PIXELS,
        check: Check | None = None,
        alpha: Alpha = "black",
        image_fps: float | None = None,
    ) -> None:
        self.path, self._max_pixels = Path(path), max_pixels
        self._about = scan_video(self.path, max_pixels, check, alpha, image_fps)
        self._is_measured = False

    @property
    def _scan(self) -> Scan:
        assert isinstance(self._about, Scan)
        return self._about

    @property
    def files(self) -> tuple[Path, ...]:
        """What the video is read from."""
        return self._about.files if isinstance(self._about, Stills) else (self.path,)

    @property
    def info(self) -> VideoInfo:
        return self._about.info

    @property
    def sound(self) -> Sound | None:
        """What is heard beside the frames, if anything is."""
        return None if isinstance(self._about, Stills) else self._about.sound

    @property
    def notes(self) -> tuple[str, ...]:
        return self._about.notes

    def read(
        self,
        indices: Sequence[int],
        *,
        size: tuple[int, int] | None = None,
        fit: Fit = "crop",
        check: Check | None = None,
    ) -> Tensor:
        """The frames of these numbers, in any order and with repeats: uint8 [T, height, width, 3].

        Only what is needed is decoded: from the key frame before the first one to the last one.

        size: (height, width) to which each is brought as soon as it is decoded, as `cover_and_crop`
            does by `fit`; None leaves them as they are.

        Raises:
            VideoError: frames that do not exist, or that the file no longer has, or more than
                `MAX_READ_BYTES` of them.
        """
        available = self.info.num_frames
        if not indices or min(indices) < 0 or max(indices) >= available:
            asked = f"{min(indices)} to {max(indices)}" if indices else "none"
            raise VideoError(
                f"{self.path.name} has {available} frames (0 to {available - 1}), but {asked} were "
                "asked for; ask for frames that exist"
            )
        wanted = [self._about.order[index] for index in indices]
        height, width = size or (self.info.height, self.info.width)
        num_bytes = len(wanted) * height * width * 3
        if num_bytes > MAX_READ_BYTES:
            raise VideoError(
                f"{len(wanted)} frames of {width}x{height} take {num_bytes / 1e9:.1f} GB, at most "
                f"{MAX_READ_BYTES / 1e9:.1f} GB are read at once; read {self.path.name} in parts"
            )
        out = torch.empty(len(wanted), height, width, 3, dtype=torch.uint8, device="cpu")
        self._decode(wanted, partial(_fitted, size=size, fit=fit), out, check)
        return out

    def frames(self, start: int = 0, check: Check | None = None) -> Iterator[Tensor]:
        """Frames from `start` on in order, uint8 [height, width, 3], one after the other.

        The file is decoded from its beginning: a file that lies about its key frames does no harm.

        Raises:
            VideoError: the file no longer has them all.
        """
        order, tick = self._about.order, 0
        first = order[start] if start < len(order) else len(order)
        if isinstance(self._about, Stills):
            at = start
            for stored, still in decode_stills(self._about, range(first, order[-1] + 1), check):
                while at < len(order) and order[at] == stored:
                    yield torch.from_numpy(still)
                    at += 1
            return
        self._measure(check)
        for stored, frame in self._stored_frames(None, check):
            if tick < len(order) and stored == order[tick]:
                is_wanted = stored >= first
                pixels = self._pixels(frame) if is_wanted else None
                # a frame that is held longer fills several ticks of a constant rate
                while tick < len(order) and order[tick] == stored:
                    if pixels is not None and tick >= start:
                        yield pixels
                    tick += 1
        if tick < len(order):
            raise truncated(self.path, tick, len(order))

    def _decode(
        self,
        wanted: Sequence[int],
        fitted: Callable[[Tensor], Tensor],
        out: Tensor,
        check: Check | None,
    ) -> None:
        """Put the stored frames `wanted` (any order, repeats allowed) into `out`, one after one."""
        places: dict[int, list[int]] = {}
        for place, stored in enumerate(wanted):
            places.setdefault(stored, []).append(place)
        if isinstance(self._about, Stills):
            for stored, still in decode_stills(self._about, sorted(places), check):
                out[places[stored]] = fitted(torch.from_numpy(still))
            return
        scan = self._scan
        first_key = None
        if scan.stamps:
            # what is woven of fields needs the frame before it, too
            target = scan.stamps[max(0, min(places) - scan.is_interlaced)]
            first_key = next((key for key in reversed(scan.keyframes) if key <= target), None)
        self._measure(check)
        missing = set(places)
        # a file may lie about its key frames: then once more from its beginning
        for seek in (first_key, None) if first_key is not None else (None,):
            for stored, frame in self._stored_frames(seek, check):
                if stored in missing:
                    out[places[stored]] = fitted(self._pixels(frame))
                    missing.discard(stored)
                if not missing:
                    return
        raise truncated(self.path, min(missing), scan.info.num_frames)

    def _stored_frames(
        self, seek: int | None, check: Check | None
    ) -> Iterator[tuple[int, VideoFrame]]:
        """Decoded frames with their number in the file, from the key frame stamped `seek` on."""
        scan = self._scan
        stamps = scan.stamps
        number = {stamp: index for index, stamp in enumerate(stamps)}
        with opened(self.path, self._max_pixels) as (container, stream, decoder):
            if seek is not None:
                container.seek(seek, stream=stream)
            decoded = (
                frame
                for packet in packets(container, stream, check)
                for frame in decoder.decode(packet)
            )
            numbered = (
                (index if frame.pts is None else number.get(frame.pts, index), frame)
                for index, frame in enumerate(decoded)
                if not stamps or frame.pts in number
            )
            if scan.is_interlaced:
                yield from deinterlaced(numbered, partial(check_size, self.path, scan))
            else:
                yield from numbered

    def _measure(self, check: Check | None) -> None:
        """Look at some frames of an HDR video for its white, once."""
        if self._is_measured or not self._scan.pictures.is_hdr:
            return
        scan, most = self._scan, _MEASURED_FRAMES
        if scan.stamps and scan.keyframes:
            keys = scan.keyframes
            seeks = sorted({keys[place * (len(keys) - 1) // (most - 1)] for place in range(most)})
            looked_at = (next(self._stored_frames(seek, check), None) for seek in seeks)
            scan.pictures.measure(found[1] for found in looked_at if found is not None)
        else:
            # what has no known key frames is decoded from its beginning
            begun = islice(self._stored_frames(None, check), 0, 20 * most, 20)
            scan.pictures.measure(frame for _, frame in begun)
        self._is_measured = True

    def _pixels(self, frame: VideoFrame) -> Tensor:
        """One frame as uint8 [height, width, 3], upright."""
        check_size(self.path, self._scan, frame)
        height, width = self._scan.square_size
        pixels = self._scan.pictures.pixels(frame, height, width)
        return torch.rot90(pixels, self.info.rotation // 90, (0, 1))


def _fitted(pixels: Tensor, size: tuple[int, int] | None, fit: Fit) -> Tensor:
    """A frame brought to a size, if one is asked for."""
    return pixels if size is None else cover_and_crop(pixels[None], size, fit)[0][0]


def write_video(path: Path | str, frames: Tensor, fps: float | Fraction, *, crf: int = 18) -> None:
    """Write frames uint8 [T, height, width, 3] as `video_writer` does.

    Raises:
        VideoError: the frames are not such a tensor, or this PyAV cannot encode h264.
        StorageError: the place cannot be written; nothing is left behind.
    """
    with video_writer(path, fps, crf=crf) as writer:
        writer.add(frames)


@contextmanager
def video_writer(
    path: Path | str, fps: float | Fraction, *, crf: int = 18, sound: Sound | None = None
) -> Iterator[VideoWriter]:
    """A writer of h264 in mp4, whole or not at all: the file appears when the block has ended.

    Colours are BT.709, 4:2:0; odd sizes, which 4:2:0 cannot hold, are written as 4:4:4. The same
    frames give the same bytes, however they are cut: one encoder thread, no time stamp.

    sound: copied into the file, from the first frame on.

    Raises:
        VideoError: a rate out of range, no frames at all, or as `VideoWriter.add`.
        StorageError: the place cannot be written; nothing is left behind.
    """
    check_fps("fps", fps)
    with replacing(video_path("path", path)) as temporary:
        writer = VideoWriter(temporary, Fraction(fps).limit_denominator(1001), crf, sound)
        try:
            yield writer
            writer.finish()
        finally:
            writer.close()


def open_video(
    source: Path | str | bytes | IO[bytes],
    *,
    max_pixels: int | None = DEFAULT_MAX_PIXELS,
    check: Check | None = None,
    alpha: Alpha = "black",
    image_fps: float | None = None,
) -> VideoReader:
    """A reader of a file or of images, as `VideoReader`, or of a file's bytes or an open file.

    What is no path is copied into a temporary file, which goes with the reader.

    Raises:
        VideoError: as `VideoReader`, or the file was opened as text.
    """
    options: dict[str, Any] = {"check": check, "alpha": alpha, "image_fps": image_fps}
    if isinstance(source, str | Path):
        return VideoReader(source, max_pixels=max_pixels, **options)
    is_bytes = isinstance(source, bytes | bytearray | memoryview)
    name = "bytes" if is_bytes else Path(str(getattr(source, "name", "file"))).name or "file"
    if getattr(source, "closed", False):
        raise VideoError(f"the file {name} is closed; give it open, as by open(path, 'rb')")
    folder = tempfile.mkdtemp(prefix="mv2v-")
    try:
        path = Path(folder) / name
        with path.open("wb") as file:
            if isinstance(source, bytes | bytearray | memoryview):
                file.write(source)
            elif source.seekable():
                place = source.tell()
                source.seek(0)
                shutil.copyfileobj(source, file)
                source.seek(place)
            else:
                shutil.copyfileobj(source, file)
        reader = VideoReader(path, max_pixels=max_pixels, **options)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, TypeError):
            raise VideoError(
                f"the file {name} must be open for bytes, as by open(path, 'rb'); {error}"
            ) from error
        raise
    weakref.finalize(reader, shutil.rmtree, folder, ignore_errors=True)
    return reader


def video_path(name: str, value: Path | str) -> Path:
    """Where a video is to be written. name: of the argument.

    Raises:
        RequestError: it is no path, or the path of something else than an mp4.
    """
    path = arguments.path(name, value, "the path of an .mp4 file")
    if path.suffix.lower() != ".mp4":
        got = path.suffix or "none"
        raise RequestError(
            f"videos are written as H.264 in .mp4, {name} {path.name!r} has the suffix {got}; "
            f"name it {path.stem + '.mp4'!r}"
        )
    return path


class VideoWriter:
    """An mp4 under way; made by `video_writer`. num_frames: written so far.

    Args:
        place: the path, or a file that is open already and stays so.
        container_options, codec_options: FFmpeg's, beside the writer's own.
    """

    def __init__(
        self,
        place: Path | IO[bytes],
        rate: Fraction,
        crf: int,
        sound: Sound | None = None,
        *,
        container_options: Mapping[str, str] | None = None,
        codec_options: Mapping[str, str] | None = None,
    ) -> None:
        self.place, self.rate, self.crf = place, rate, crf
        self._sound = sound
        self._container_options = dict(container_options or {})
        self._codec_options = dict(codec_options or {})
        self._copy: SoundCopy | None = None
        self.num_frames = 0
        self._file: IO[bytes] | None = None
        self._container: OutputContainer | None = None
        self._stream: VideoStream | None = None

    def add(self, frames: Tensor) -> None:
        """Append frames uint8 [T, height, width, 3], all of one size.

        Raises:
            VideoError: other frames than these, or this PyAV cannot encode h264.
            OSError: the place cannot be written; leaving the block makes it a StorageError.
        """
        import av

        is_video = frames.ndim == 4 and frames.shape[-1] == 3 and frames.dtype == torch.uint8
        if not is_video or not len(frames):
            raise VideoError(
                "frames to write must be uint8 [T, height, width, 3] with T >= 1, "
                f"got {frames.dtype} {list(frames.shape)}"
            )
        height, width = frames.shape[1:3]
        with _encoding():
            stream = self._stream or self._open(height, width)
            if (stream.height, stream.width) != (height, width):
                raise VideoError(
                    f"the video has frames of {stream.width}x{stream.height}, got {width}x{height};"
                    " give all frames one size"
                )
            for frame in frames.cpu():
                picture = av.VideoFrame.from_ndarray(frame.contiguous().numpy(), format="rgb24")
                picture = picture.reformat(
                    format=stream.pix_fmt, dst_colorspace="ITU709", dst_color_range="MPEG"
                )
                picture.pts, picture.time_base = self.num_frames, 1 / self.rate
                self._mux(picture)
                self.num_frames += 1
                if self._copy is not None:
                    self._copy.mux(self.num_frames / self.rate)

    def finish(self) -> None:
        """Write what the encoder still holds, and the index."""
        if not self.num_frames:
            raise VideoError("a video needs at least one frame, got none; add frames")
        with _encoding():
            self._mux(None)
            if self._copy is not None:
                self._copy.mux()
            self.close()

    def close(self) -> None:
        """Let go of the file, finished or not."""
        container, self._container, self._stream = self._container, None, None
        copy, self._copy = self._copy, None
        if copy is not None:
            copy.close()
        file, self._file = self._file, None
        try:
            if container is not None:
                container.close()
        finally:
            if file is not None:
                file.close()

    def _open(self, height: int, width: int) -> VideoStream:
        import av

        if isinstance(self.place, Path):
            # a container that cannot write its end, on a full disk, keeps a file of its own open
            self._file = self.place.open("wb")
        place: Any = self._file or self.place
        container = av.open(place, "w", format="mp4", options=self._container_options)
        self._container = container
        # with its macroblock tree x264 reads memory that it never wrote: other bytes each run
        options = {"crf": str(self.crf), "mbtree": "0"} | self._codec_options
        stream = container.add_stream("libx264", rate=self.rate, options=options)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.color_range = 1  # limited
        for name in ("colorspace", "color_primaries", "color_trc"):
            setattr(stream.codec_context, name, 1)  # BT.709
        if self._sound is not None:
            self._copy = SoundCopy(self._sound, container)
        self._stream = stream
        return stream

    def _mux(self, picture: VideoFrame | None) -> None:
        assert self._container is not None and self._stream is not None
        self._container.mux(self._stream.encode(picture))


@contextmanager
def _encoding() -> Iterator[None]:
    """PyAV's errors as ours; what the system refuses is left to whoever knows the place."""
    import av

    try:
        yield
    except (av.FFmpegError, av.codec.codec.UnknownCodecError) as error:
        if isinstance(error, OSError | MemoryError):
            raise
        raise VideoError(
            f"cannot encode frames as h264 ({error}); install a PyAV that has libx264"
        ) from error
