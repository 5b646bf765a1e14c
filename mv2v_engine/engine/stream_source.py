"""The source of a stream that edits: its frames in order, at the model's size, as many as a block
takes.

What can be read again (a file, frames in memory, a function of the first frame's number) is opened
where it is asked for; what comes once (an iterator, a camera, a pipe) gives what comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mv2v_engine import arguments
from mv2v_engine.config import Fit
from mv2v_engine.engine.source import AnySource, open_long_source
from mv2v_engine.errors import StorageError, VideoError
from mv2v_engine.video.live import LiveFrames
from mv2v_engine.video.scan import Check, check_fps
from mv2v_engine.video.transforms import cover_and_crop

# a frame uint8 [height, width, 3], or several of one size [T, height, width, 3]
SomeFrames: TypeAlias = "Tensor | np.ndarray[Any, Any]"
AnyStreamSource: TypeAlias = (
    "AnySource | LiveFrames | Iterable[SomeFrames] | Callable[[int], Iterable[SomeFrames]]"
)
# identity of what cannot be compared
_AS_THEY_CAME = "frames as they came"


class StreamSource:
    """Frames for one stream.

    fps: of the stream. name: for reports. identity: what a resumed stream must agree with.
    num_resized: how often a frame had another size than the one before it.

    Args:
        opened: the frames from a number on. can_seek: it may be called more than once.
    """

    def __init__(
        self,
        opened: Callable[[int], Iterable[SomeFrames]],
        *,
        size: tuple[int, int],
        fps: float,
        name: str,
        fit: Fit,
        identity: str = _AS_THEY_CAME,
        can_seek: bool = True,
        live: LiveFrames | None = None,
    ) -> None:
        self._open, self._can_seek, self._live = opened, can_seek, live
        self._size, self._fit = size, fit
        self.fps, self.name, self.identity = fps, name, identity
        self._frames: Iterator[SomeFrames] | None = None
        self._position = 0  # the frame that is given next; those held are not given yet
        self._held: list[Tensor] = []
        self._shape: tuple[int, ...] | None = None
        self.num_resized = 0

    def begin(self, first: int) -> None:
        """Say which frame comes next of what comes once."""
        self._position = first

    def take(self, first: int, count: int, check: Check) -> Tensor | None:
        """`count` frames from `first` on, uint8 [T, height, width, 3]; fewer where they end.

        None: there are none. check: called while frames are waited for; what it raises ends that,
        and those that have come are given by the next call.

        Raises:
            VideoError: a frame that is none, or the file no longer has them all.
            StorageError: frames before those that come next, of what comes once.
        """
        if first != self._position and not self._can_seek:
            raise StorageError(
                f"frame {first} of {self.name} is needed again, and it gives each frame once; "
                "begin the stream anew, or give a file"
            )
        if self._frames is None or first != self._position:
            self._held.clear()
            self._frames, self._position = iter(self._open(first)), first
        while len(self._held) < count:
            check()
            some = next(self._frames, None) if self._live is None else self._live.read(check)
            if some is None:
                break
            self._held.extend(self._fitted(some))
        taken, self._held = self._held[:count], self._held[count:]
        self._position += len(taken)
        return torch.stack(taken) if taken else None

    def _fitted(self, some: Any) -> Tensor:
        """Frames at the model's size [T, height, width, 3]."""
        whole = torch.from_numpy(np.ascontiguousarray(some)) if _is_array(some) else some
        if isinstance(whole, Tensor) and whole.ndim == 3:
            whole = whole[None]
        if not isinstance(whole, Tensor) or whole.ndim != 4:
            raise arguments.mistaken(
                "a frame of the source",
                some,
                "uint8 [height, width, 3], or several [frames, height, width, 3]",
                kind=VideoError,
            )
        shape = tuple(whole.shape[1:3])
        self.num_resized += self._shape not in (None, shape)
        self._shape = shape
        return cover_and_crop(whole.detach().cpu(), self._size, self._fit)[0]

    def close(self) -> None:
        """Let go of what is read."""
        self._frames = None
        if self._live is not None:
            self._live.close()

    def report(self) -> dict[str, Any]:
        """What a report says of it."""
        live = {} if self._live is None else self._live.report()
        resized = {"size_changes": self.num_resized} if self.num_resized else {}
        return {"name": self.name, "fps": self.fps, **live, **resized}


def open_stream_source(
    source: Any,
    *,
    size: tuple[int, int],
    fps: float | None,
    own_fps: float,
    fit: Fit,
    **reading: Any,
) -> StreamSource:
    """Open what a stream edits.

    source: as `AnyStreamSource`. fps: None keeps its own. reading: as `open_long_source` takes it.

    Raises:
        VideoError: it is none of these, or cannot be read.
    """
    if fps is not None:
        check_fps("fps", fps)
    if isinstance(source, LiveFrames):
        return StreamSource(
            lambda first: (),
            size=size,
            fps=fps or source.fps or own_fps,
            name=source.name,
            fit=fit,
            can_seek=False,
            live=source,
        )
    is_function = callable(source) and not isinstance(source, Tensor)
    is_kept = isinstance(source, str | bytes | bytearray | memoryview | list | tuple | Tensor)
    is_once = isinstance(source, Iterable) and not (
        is_kept or _is_array(source) or hasattr(source, "read") or hasattr(source, "__fspath__")
    )
    if is_function or is_once:
        return StreamSource(
            source if is_function else lambda first: source,
            size=size,
            fps=fps or own_fps,
            name="frames",
            fit=fit,
            can_seek=is_function,
        )
    video = open_long_source(source, size=size, fps=fps, own_fps=own_fps, fit=fit, **reading)
    return StreamSource(
        video.frames,
        size=size,
        fps=video.fps,
        name=video.name,
        fit=fit,
        identity=video.fingerprint,
    )


def _is_array(value: object) -> bool:
    return isinstance(value, np.ndarray)
