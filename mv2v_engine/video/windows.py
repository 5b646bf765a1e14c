"""A long video as windows of the model's length, and back without a frame too many (METHOD 11).

Windows tile each shot from its first frame; the last one of a shot starts early enough to be full
and keeps only the frames that the one before has not made. A shot shorter than a window is one
window, whose last frame is repeated and cut off again. So the frames kept, one window after the
other, are the video's own: as many, in order, none twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mv2v_engine.errors import VideoError


@dataclass(frozen=True, slots=True)
class EditWindow:
    """What one run of the model sees, and which of its frames are new.

    start, stop: the video's frames that it sees. shot: number of its shot, from 0.
    num_frames: the model's length; `stop - start` is less for a short shot.
    first_new: the first of its frames that no window before has made.
    """

    number: int
    shot: int
    start: int
    stop: int
    num_frames: int
    first_new: int

    @property
    def indices(self) -> tuple[int, ...]:
        """The video's frames that the model is given: [num_frames], the last one repeated."""
        padding = self.num_frames - (self.stop - self.start)
        return (*range(self.start, self.stop), *(self.stop - 1,) * padding)

    @property
    def new_frames(self) -> slice:
        """Which of the model's frames go into the edited video."""
        return slice(self.first_new - self.start, self.stop - self.start)


def edit_windows(
    num_frames: int, window: int, *, cuts: Sequence[int] = ()
) -> tuple[EditWindow, ...]:
    """The windows of a video of `num_frames` frames, in order; none straddles a cut.

    window: frames that the model takes. cuts: first frames of all shots but the first, increasing.

    Raises:
        VideoError: no frames, or cuts that are none of this video.
    """
    if num_frames < 1 or window < 1:
        raise VideoError(
            f"windows of {window} frames of a video of {num_frames}: both must be at least 1"
        )
    edges = (0, *cuts, num_frames)
    if any(first >= second for first, second in pairwise(edges)):
        raise VideoError(
            f"cuts must increase within 1..{num_frames - 1}, got {list(cuts)}; "
            "give the first frame of every shot but the first"
        )
    windows: list[EditWindow] = []
    for shot, (first, end) in enumerate(pairwise(edges)):
        for new in range(first, end, window):
            stop = min(new + window, end)
            start = max(first, stop - window)
            windows.append(EditWindow(len(windows), shot, start, stop, window, new))
    return tuple(windows)
