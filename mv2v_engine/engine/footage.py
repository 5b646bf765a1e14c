"""What is held of a finished turn's video, so that a session does not grow with its turns.

Latents stay in memory until a folder has them, and are read from there whenever they are asked
for; of a session without a folder they stay. Frames stay while they are among the last used.

T pixel frames, C latent channels, F H W latent grid.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator

from torch import Tensor


class RecentFrames:
    """Decoded frames of the turns used last, under a byte budget; shared by an engine's sessions.

    The frames used last stay, even if they alone exceed the budget. A turn that nobody holds any
    longer takes its frames with it.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        # by id, least recently used first; no callbacks, which would need the lock at any moment
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
        """Whoever still holds frames, and their bytes."""
        found = []
        for reference in self._used.values():
            footage = reference()
            if footage is not None and footage.held_frames is not None:
                found.append((footage, footage.held_frames.nbytes))
        return found


class Footage:
    """One turn's video.

    Args:
        latents: [C, F, H, W] float32 on the CPU; None if `read` gives them.
        decode: latents to frames uint8 [T, height, width, 3] on the CPU.
        read: the latents from where they are stored.
    """

    def __init__(
        self,
        latents: Tensor | None,
        decode: Callable[[Tensor], Tensor],
        recent: RecentFrames,
        read: Callable[[], Tensor] | None = None,
    ) -> None:
        self._latents, self._decode, self._recent, self._read = latents, decode, recent, read
        self.held_frames: Tensor | None = None

    @property
    def is_stored(self) -> bool:
        """Whether a folder has the latents."""
        return self._read is not None

    def latents(self) -> Tensor:
        """float32 [C, F, H, W] on the CPU.

        Raises:
            StorageError: they were stored, and are lost or damaged.
        """
        latents = self._latents
        if latents is not None:
            return latents
        assert self._read is not None
        return self._read()

    def stored(self, read: Callable[[], Tensor]) -> None:
        """The latents are in a folder now, so memory lets go of them; the first folder counts."""
        if self._read is None:
            self._read = read
            self._latents = None

    def frames(self) -> Tensor:
        """uint8 [T, height, width, 3] on the CPU, decoded again if they were let go of.

        Raises:
            StorageError: as `latents`.
        """
        frames = self.held_frames
        if frames is None:
            frames = self._decode(self.latents())
        self.decoded(frames)
        return frames

    def parts(self) -> Iterator[Tensor]:
        """The frames, which one window's memory holds."""
        yield self.frames()

    def decoded(self, frames: Tensor) -> None:
        """The frames, now the last used."""
        self._recent.keep(self, frames)
