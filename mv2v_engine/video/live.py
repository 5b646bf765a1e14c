"""Video as it arrives: from a pipe, a camera, or any iterator of frames that takes its time.

A thread reads ahead, so that whoever waits for a frame can be told to stop, and a camera never
waits. Encoded video is decoded as it comes: its colours and alpha as of files (see `pictures`), but
interlaced frames are not woven, and of HDR the first frame tells the white.

T frames; sizes are (height, width) in pixels.
"""

from __future__ import annotations

import stat
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from mv2v_engine.config import Alpha
from mv2v_engine.errors import MV2VError, RequestError, VideoError
from mv2v_engine.video.pictures import Pictures, has_room_for_alpha
from mv2v_engine.video.scan import Check, check_picture_size, square_size

if TYPE_CHECKING:
    from av.container import InputContainer

# frames that wait, at most
ROOM = 48
# how long a wait goes on without looking whether it was cancelled
_PATIENCE = 0.1
# what a source may raise; anything else is told by the thread, too
_FAILURES = (MV2VError, ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError)


class LiveFrames:
    """Frames that a thread reads before they are asked for.

    num_dropped: frames that nobody got.

    Args:
        source: gives frames uint8 [height, width, 3], or [T, height, width, 3].
        fps: of the source; None where nobody knows. name: for reports.
        drops: the source does not wait, as a camera: where `room` frames wait already, the oldest
            of them gives way to the new one. False: the source waits.
    """

    def __init__(
        self,
        source: Iterable[Any],
        *,
        fps: float | None = None,
        name: str = "live frames",
        drops: bool = False,
        room: int = ROOM,
    ) -> None:
        self.fps, self.name, self.drops = fps, name, drops
        self.num_dropped = self._num_read = 0
        self._source, self._room = source, room
        self._waiting = deque[Any]()
        self._changed = threading.Condition()
        self._is_over = self._is_closed = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def read(self, check: Check) -> Any:
        """The next frame, as the source gave it; None behind the last one.

        Reading begins with the first call. check: called while a frame is waited for; what it
        raises ends the wait, and the next call gives that frame.

        Raises:
            what the source raises, behind the frames before.
        """
        if self._thread is None:
            # a read that never ends must not keep the process
            self._thread = threading.Thread(target=self._read, daemon=True)
            self._thread.start()
        with self._changed:
            while not (self._waiting or self._is_over):
                self._changed.wait(_PATIENCE)
                check()
            if self._waiting:
                self._changed.notify_all()
                return self._waiting.popleft()
        if self._error is not None:
            raise self._error
        return None

    def _read(self) -> None:
        is_whole = False
        try:
            for frame in self._source:
                with self._changed:
                    while len(self._waiting) >= self._room and not (self.drops or self._is_closed):
                        self._changed.wait()
                    if self._is_closed:
                        break
                    if len(self._waiting) >= self._room:
                        self._waiting.popleft()
                        self.num_dropped += 1
                    self._num_read += 1
                    self._waiting.append(frame)
                    self._changed.notify_all()
            is_whole = True
        except _FAILURES as error:
            self._error, is_whole = error, True
        finally:
            if not is_whole:
                self._error = VideoError(f"{self.name} ended by an error that its thread has told")
            with self._changed:
                self._is_over = True
                self._changed.notify_all()

    def close(self) -> None:
        """Read no further than the frame that is being read."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def report(self) -> dict[str, Any]:
        """What a report says of it."""
        return {"frames_read": self._num_read, "frames_dropped": self.num_dropped}


def is_live(place: str | Path) -> bool:
    """Whether a path is a pipe's or a device's, which is read once and as it comes."""
    try:
        mode = Path(place).stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def open_live(
    place: str | Path | IO[bytes],
    *,
    raw_size: tuple[int, int] | None = None,
    fps: float | None = None,
    max_pixels: int | None = None,
    alpha: Alpha = "black",
    room: int = ROOM,
) -> LiveFrames:
    """Frames of a pipe or a camera.

    A camera is a device such as `/dev/video0`, which FFmpeg reads by v4l2; its frames are dropped
    where nobody waits for them. All else waits.

    Args:
        place: the path of a device or a named pipe, or an open file.
        raw_size: the bytes are frames of so many (rows, columns) of red, green and blue bytes;
            None: encoded video, in a container that can be read without going back (Matroska,
            MPEG-TS, fragmented mp4, y4m).
        fps: None takes the video's own; of raw frames nobody knows it. room: see `LiveFrames`.

    Raises:
        VideoError: it cannot be opened, or holds no video.
    """
    is_path = isinstance(place, str | Path)
    is_device = isinstance(place, str | Path) and stat.S_ISCHR(Path(place).stat().st_mode)
    name = str(place) if is_path else Path(str(getattr(place, "name", "pipe"))).name
    name = "stdin" if name in ("0", "<stdin>") else name
    if raw_size is not None:
        if is_device:
            raise RequestError(f"{name} is a device, whose frames say their size themselves")
        return LiveFrames(_raw(place, raw_size), fps=fps, name=name, room=room)
    import av

    try:
        options = {"framerate": f"{fps:g}"} if is_device and fps is not None else {}
        opened: Any = str(place) if is_path else place
        container = av.open(opened, "r", format="v4l2" if is_device else None, options=options)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise VideoError(
            f"{name} cannot be read as video ({error}); give a container that can be read without "
            "going back (Matroska, MPEG-TS, fragmented mp4), or the size of raw frames"
        ) from error
    if not container.streams.video:
        raise VideoError(f"{name} holds no video; give one with a video stream")
    stream = container.streams.video[0]
    rate = fps or float(stream.average_rate or stream.guessed_rate or 0) or None
    frames = _decoded(container, name, max_pixels, alpha)
    return LiveFrames(frames, fps=rate, name=name, drops=is_device, room=room)


def _raw(place: str | Path | IO[bytes], size: tuple[int, int]) -> Iterator[Tensor]:
    """Frames [height, width, 3] of bytes; what is left of one that is cut off is left out."""
    height, width = size
    length = height * width * 3
    with ExitStack() as stack:
        file: Any = place
        try:
            if isinstance(place, str | Path):
                # a named pipe opens when somebody writes to it
                file = stack.enter_context(Path(place).open("rb"))
            while True:
                data = bytearray()
                while len(data) < length and (more := file.read(length - len(data))):
                    data += more
                if len(data) < length:
                    return
                yield torch.frombuffer(data, dtype=torch.uint8).reshape(height, width, 3)
        except OSError as error:
            reason = error.strerror or str(error)
            raise VideoError(f"raw frames cannot be read any further: {reason}") from error


def _decoded(
    container: InputContainer, name: str, max_pixels: int | None, alpha: Alpha
) -> Iterator[Tensor]:
    """Frames [height, width, 3] of encoded video, upright."""
    import av

    stream, path = container.streams.video[0], Path(name)
    pictures: Pictures | None = None
    shape: tuple[int, int] | None = None
    with container:
        try:
            for frame in container.decode(stream):
                if pictures is None or (frame.height, frame.width) != shape:
                    shape = (frame.height, frame.width)
                    check_picture_size(path, frame.width, frame.height, max_pixels)
                    has_alpha = has_room_for_alpha(frame)
                    tags = stream.codec_context
                    pictures = Pictures(path, frame, tags, alpha, has_alpha=has_alpha)
                    pictures.measure([frame] if pictures.is_hdr else [])
                pixels = pictures.pixels(frame, *square_size(frame, stream))
                yield torch.rot90(pixels, frame.rotation // 90, (0, 1))
        except (av.error.FFmpegError, OSError) as error:
            raise VideoError(
                f"{name} cannot be decoded any further ({error}); the frames before are taken"
            ) from error
