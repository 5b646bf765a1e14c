"""A turn of a session: as it grows, window by window, and finished, as its user sees it.

A novel view has one window, an edit of a long video many. Latents of a window stay in memory until
a folder has them, and are read from there whenever they are asked for, so that a session does not
grow with its turns; without a folder they stay.

T pixel frames, C latent channels, F H W latent grid, W windows, D numbers of a descriptor.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mv2v_engine.arguments import short_repr, shown
from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.engine.request import Request
from mv2v_engine.errors import StorageError
from mv2v_engine.video.display import video_html
from mv2v_engine.video.io import video_writer
from mv2v_engine.video.sound import Sound
from mv2v_engine.video.windows import EditWindow


@dataclass(eq=False)
class KeptWindow:
    """A finished window of a turn.

    report: what it remembered and spent. latents: float32 [C, F, H, W] on the CPU; None once a
    folder has them, and `read_stored` gives them. descriptor: of an edit's source window, [D].
    """

    report: dict[str, Any]
    latents: Tensor | None
    descriptor: Tensor | None = None
    read_stored: Callable[[], Tensor] | None = None

    def read(self) -> Tensor:
        """The latents.

        Raises:
            StorageError: they were stored, and are lost or damaged.
        """
        latents = self.latents
        if latents is not None:
            return latents
        assert self.read_stored is not None
        return self.read_stored()

    def stored(self, read: Callable[[], Tensor]) -> None:
        """Let go of the latents, which are in a folder now; the first folder counts."""
        if self.read_stored is None:
            self.read_stored = read
            self.latents = None


@dataclass(eq=False)
class Draft:
    """A turn as far as it has come.

    settings: those of the engine on which the turn's latents depend; windows of one edit share
    them. windows: the finished ones. report: of the whole turn; None until every window is
    finished. num_stored: how many windows the session's folder has. lost: why the folder's next
    window cannot be read, if it had one.
    """

    number: int
    request: Request
    settings: dict[str, Any] = field(default_factory=dict)
    windows: list[KeptWindow] = field(default_factory=list)
    report: dict[str, Any] | None = None
    num_stored: int = 0
    lost: str | None = None

    @property
    def num_done(self) -> int:
        """How many windows are finished."""
        return len(self.windows)


class RecentFrames:
    """Decoded frames of the turns used last, under a byte budget; shared by an engine's sessions.

    The frames used last stay, even if they alone exceed the budget. A turn that nobody holds any
    longer takes its frames with it.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        # those of every id, least recently used first; callbacks would need the lock at any moment
        self._used: OrderedDict[int, weakref.ref[Footage]] = OrderedDict()

    @property
    def bytes_used(self) -> int:
        """Bytes of the frames that are held."""
        with self._lock:
            return sum(num_bytes for _, num_bytes in self._alive())

    def keep(self, footage: Footage, frames: Tensor) -> None:
        """Hold a turn's frames, now the last used, and let go of others until the budget holds."""
        with self._lock:
            known = self._used.pop(id(footage), None)
            is_new = known is None or known() is not footage or footage.held_frames is None
            footage.held_frames = frames
            self._used[id(footage)] = weakref.ref(footage)
            if is_new:
                self._make_room()

    def _make_room(self) -> None:
        alive = self._alive()
        self._used = OrderedDict((id(footage), weakref.ref(footage)) for footage, _ in alive)
        total = sum(num_bytes for _, num_bytes in alive)
        for footage, num_bytes in alive[:-1]:
            if total <= self.capacity_bytes:
                return
            footage.held_frames = None
            del self._used[id(footage)]
            total -= num_bytes

    def _alive(self) -> list[tuple[Footage, int]]:
        """The turns that still hold frames, and the bytes of these."""
        found = []
        for reference in self._used.values():
            footage = reference()
            if footage is not None and footage.held_frames is not None:
                found.append((footage, footage.held_frames.nbytes))
        return found


class Footage:
    """The video of a turn.

    Args:
        windows: the finished windows, in order.
        decode: latents [C, F, H, W] to frames uint8 [T, height, width, 3] on the CPU.
        recent: what may hold the decoded frames of a novel view.
        new_frames: of an edit, the frames of each window that go into the video; only one window
            of it is in memory at a time. None: one window is the whole video.
    """

    def __init__(
        self,
        windows: Sequence[KeptWindow],
        decode: Callable[[Tensor], Tensor],
        recent: RecentFrames,
        new_frames: Sequence[slice] | None = None,
    ) -> None:
        self.windows, self._decode, self._recent = windows, decode, recent
        self._new_frames = new_frames
        self.held_frames: Tensor | None = None

    def latents(self) -> Tensor:
        """float32 on the CPU: [C, F, H, W], of an edit [W, C, F, H, W].

        Raises:
            StorageError: they were stored, and are lost or damaged.
        """
        found = [window.read() for window in self.windows]
        return found[0] if self._new_frames is None else torch.stack(found)

    def frames(self) -> Tensor:
        """uint8 [T, height, width, 3] on the CPU, decoded again if they were let go of.

        Raises:
            StorageError: as `latents`.
        """
        if self._new_frames is not None:
            return torch.cat(list(self.parts()))
        frames = self.held_frames
        if frames is None:
            frames = self._decode(self.latents())
        self.decoded(frames)
        return frames

    def parts(self) -> Iterator[Tensor]:
        """The frames in order, in as many pieces as are worth holding at once.

        Raises:
            StorageError: as `latents`.
        """
        if self._new_frames is None:
            yield self.frames()
            return
        for window, new in zip(self.windows, self._new_frames, strict=True):
            yield self._decode(window.read())[new]

    def decoded(self, frames: Tensor) -> None:
        """Take the frames of a novel view, now the last used."""
        self._recent.keep(self, frames)


@dataclass(frozen=True, eq=False)
class Turn:
    """A finished turn of a session.

    trajectory: the camera that filmed it; None for an edit, which keeps the source's.
    footage: the video, of which memory holds no more than it must. A novel view's latents are read
        from the session's folder if it has one, its frames are decoded again if they were let go of
        (`EngineConfig.frames_bytes`), to the same bits. Keep the tensor to have it at hand.
    report: what was asked, remembered and spent. It has a `storage_error` while the session's
        folder lacks the turn; `lost` says why a resumed one can no longer be read: its latents and
        frames raise StorageError then.
    sound: the source's, if the video has its frames and rate.
    """

    number: int
    trajectory: CameraTrajectory | None
    footage: Footage = field(repr=False)
    fps: float
    report: dict[str, Any]
    sound: Sound | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        asked = ("camera", "prompt", "seed", "num_inference_steps", "guidance_scale")
        values = {
            name: self.report[name] for name in asked if self.report.get(name) not in (None, "")
        }
        said = "".join(f", {name}={shown(value)}" for name, value in values.items())
        return f"{type(self).__name__}(number={self.number}{said}, fps={self.fps:g})"

    def _repr_html_(self) -> str | None:
        """The video in a notebook, of an edit its first window; none if it is lost."""
        try:
            return video_html(next(self.footage.parts()), self.fps, repr(self))
        except StorageError:
            return None

    @property
    def camera(self) -> CameraTrajectory:
        """The trajectory of a novel view."""
        assert self.trajectory is not None
        return self.trajectory

    @property
    def latents(self) -> Tensor:
        """float32 on the CPU: [C, F, H, W], of an edit in windows [W, C, F, H, W].

        Raises:
            StorageError: the session's folder no longer has them.
        """
        return self.footage.latents()

    @property
    def frames(self) -> Tensor:
        """uint8 [T, height, width, 3] on the CPU, the whole video.

        Raises:
            StorageError: as `latents`.
        """
        return self.footage.frames()

    def save(self, path: Path | str) -> None:
        """Write the frames as H.264 mp4, whole or not at all.

        An edit is decoded window by window, so that it is never in memory whole.

        Raises:
            RequestError: the path is no path, or names no .mp4 file.
            StorageError: the place cannot be written, or as `latents`.
        """
        with video_writer(path, self.fps, sound=self.sound) as writer:
            for frames in self.footage.parts():
                writer.add(frames)


@dataclass(frozen=True, eq=False)
class FinishedWindow:
    """A window that has just been edited, for `Session.edit`'s on_window.

    latents: float32 [C, F, H, W] on the CPU. frames: uint8 [T, height, width, 3], all that the
    model made. report: as in the edit's.
    """

    window: EditWindow
    latents: Tensor
    frames: Tensor
    report: dict[str, Any]

    __repr__ = short_repr

    @property
    def new_frames(self) -> Tensor:
        """The frames that go into the edited video."""
        return self.frames[self.window.new_frames]
