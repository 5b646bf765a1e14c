"""An mp4 that plays while it grows, and that can be cut off and continued at any fragment.

    ftyp moov   written once: the codec and the size, no frames
    moof mdat   a fragment: frames that begin with a key frame and refer to no others

Every fragment comes from an encoder of its own, so its bytes follow from its frames and its place
alone: a file that is cut off behind a fragment and continued has the bytes of one that never was.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import IO, TypeVar

from torch import Tensor

from mv2v_engine.errors import StorageError, VideoError
from mv2v_engine.files import make_folder
from mv2v_engine.video.io import VideoWriter, video_path
from mv2v_engine.video.scan import check_fps

# no table of all frames, and places that are counted from their own fragment
_CONTAINER = {"movflags": "empty_moov+default_base_moof+frag_keyframe"}
# every frame is shown when it is decoded, so that times are counted from the frames alone
_CODEC = {"bf": "0"}
_HEAD = struct.Struct(">I4s")
AnyWriter = TypeVar("AnyWriter", bound="RawWriter")


class RawWriter:
    """Writes frames into an open file or pipe as their bytes, red, green and blue.

    num_frames: written so far.
    """

    def __init__(self, file: IO[bytes], num_frames: int = 0) -> None:
        self._file, self.num_frames = file, num_frames

    def add(self, frames: Tensor) -> None:
        """Write frames uint8 [T, height, width, 3], and wait until they are written.

        Raises:
            OSError: the place does not take them; of a pipe whose reader has left, BrokenPipeError.
        """
        self._file.write(frames.contiguous().numpy().tobytes())
        self._file.flush()
        self.num_frames += len(frames)

    def close(self) -> None:
        """Let go of the file."""
        with suppress(BrokenPipeError):
            self._file.close()

    def __enter__(self: AnyWriter) -> AnyWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class FragmentWriter(RawWriter):
    """Appends frames as fragments of an mp4, in place of their bytes.

    num_fragments, num_frames: in the file so far. `append_fragments` opens one in a path.
    """

    def __init__(
        self,
        file: IO[bytes],
        fps: float | Fraction,
        *,
        crf: int = 18,
        num_fragments: int = 0,
        num_frames: int = 0,
    ) -> None:
        check_fps("fps", fps)
        super().__init__(file, num_frames)
        self.rate, self._crf = Fraction(fps).limit_denominator(1001), crf
        self.num_fragments = num_fragments

    def add(self, frames: Tensor) -> None:
        """Append a fragment of frames uint8 [T, height, width, 3], and wait until it is written.

        Raises:
            VideoError: other frames than these, or this PyAV cannot encode h264.
            OSError: the place does not take it; of a pipe whose reader has left, BrokenPipeError.
        """
        buffer = BytesIO()
        writer = VideoWriter(
            buffer, self.rate, self._crf, container_options=_CONTAINER, codec_options=_CODEC
        )
        try:
            writer.add(frames)
            writer.finish()
            made = bytearray(buffer.getvalue())
        finally:
            writer.close()
        ticks = _timescale(made) * self.num_frames / self.rate
        wanted = (b"moof", b"mdat") if self.num_fragments else (b"ftyp", b"moov", b"moof", b"mdat")
        for kind, start, stop in list(_boxes(made, 0, len(made))):
            if kind == b"moof":
                _place(made, start, stop, self.num_fragments + 1, int(ticks))
        parts = [made[a:b] for kind, a, b in _boxes(made, 0, len(made)) if kind in wanted]
        self._file.write(b"".join(parts))
        self._file.flush()
        with suppress(OSError, ValueError):  # a pipe has nothing to flush
            os.fsync(self._file.fileno())
        self.num_fragments += 1
        self.num_frames += len(frames)


def append_fragments(
    path: Path | str, fps: float | Fraction, *, num_fragments: int = 0, num_frames: int = 0
) -> FragmentWriter:
    """A writer behind the first fragments of a file; what follows them there is cut off.

    num_frames: in these fragments.

    Raises:
        RequestError: the path is no mp4's.
        StorageError: the place cannot be written, or the file has fewer whole fragments.
    """
    path = video_path("path", path)
    try:
        make_folder(path.parent)
        file = path.open("r+b" if num_fragments else "wb")
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}; choose another place"
        ) from error
    if num_fragments:
        ends = fragment_ends(path)
        if len(ends) < num_fragments:
            file.close()
            raise StorageError(
                f"{path} holds {len(ends)} whole fragments, expected {num_fragments} or more; "
                "make it anew"
            )
        file.truncate(ends[num_fragments - 1])
        file.seek(0, os.SEEK_END)
    return FragmentWriter(file, fps, num_fragments=num_fragments, num_frames=num_frames)


def fragment_ends(path: Path) -> list[int]:
    """Where each whole fragment of a file ends, in bytes; none of what is no such file."""
    ends, before = list[int](), b""
    for kind, _, stop in _file_boxes(path):
        if (before, kind) == (b"moof", b"mdat"):
            ends.append(stop)
        before = kind
    return ends


def read_head(path: Path) -> bytes:
    """What stands before the first fragment of a file; nothing if there is none."""
    for kind, start, _ in _file_boxes(path):
        if kind == b"moof":
            with path.open("rb") as file:
                return file.read(start)
    return b""


def codec_of(head: bytes) -> str:
    """The codec that a head names, as RFC 6381 has it for players: avc1.640028."""
    place = head.index(b"avcC") + 5
    return f"avc1.{head[place : place + 3].hex()}"


def _file_boxes(path: Path) -> Iterator[tuple[bytes, int, int]]:
    """The whole boxes of a file, as `_boxes`; none of what is no such file."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        size, start = os.fstat(file.fileno()).st_size, 0
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            length, kind = _HEAD.unpack(head)
            if length < _HEAD.size or start + length > size:
                return
            yield kind, start, start + length
            start += length
            file.seek(start)


def _boxes(data: bytes | bytearray, start: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """The boxes in a range of bytes: their kind, where they start and where they end."""
    while start + _HEAD.size <= stop:
        length, kind = _HEAD.unpack_from(data, start)
        if length < _HEAD.size:
            raise VideoError(f"the encoder wrote a box {kind!r} of {length} bytes; update PyAV")
        yield kind, start, start + length
        start += length


def _inside(data: bytes | bytearray, start: int, stop: int, *path: bytes) -> int:
    """Where the content of the first box of a path of kinds begins."""
    for kind in path:
        found = (box for box in _boxes(data, start, stop) if box[0] == kind)
        _, start, stop = next(found)
        start += _HEAD.size
    return start


def _timescale(data: bytes | bytearray) -> int:
    """Ticks of a second in which the track counts."""
    place = _inside(data, 0, len(data), b"moov", b"trak", b"mdia", b"mdhd")
    # behind version, flags and two times, which are longer in version 1
    offset = 20 if data[place] else 12
    ticks: int = struct.unpack_from(">I", data, place + offset)[0]
    return ticks


def _place(data: bytearray, start: int, stop: int, number: int, ticks: int) -> None:
    """Write into a moof which fragment it is, and when its first frame is shown."""
    start += _HEAD.size
    struct.pack_into(">I", data, _inside(data, start, stop, b"mfhd") + 4, number)
    place = _inside(data, start, stop, b"traf", b"tfdt")
    struct.pack_into(">Q" if data[place] else ">I", data, place + 4, ticks)
