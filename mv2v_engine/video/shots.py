"""Hard cuts of a video, found by PySceneDetect: where one shot ends and another begins.

A window that straddles a cut would be asked to make two places one, and memory of another shot
brings its objects along (the paper's stated failure, METHOD 11).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mv2v_engine.errors import VideoError

_Picture: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]"

# longer sides are scaled down: a cut shows at any size, and detection takes a fraction of the time
_MAX_SIDE = 256
# flashes and single damaged frames make no shot of their own
MIN_SHOT_FRAMES = 8


@dataclass(frozen=True, slots=True)
class _Cut:
    """A cut before frame `number`, with the pictures (BGR) on its two sides."""

    number: int
    before: _Picture
    after: _Picture


def find_cuts(
    frames: Iterable[Tensor], fps: float, *, min_shot_frames: int = MIN_SHOT_FRAMES
) -> tuple[int, ...]:
    """First frames of all shots but the first, increasing; empty for a single shot.

    frames: uint8 [height, width, 3] (RGB) in order, of which only the last few are held. Fewer
    than `min_shot_frames` frames are no shot: a flash leaves no cut, a short shot leaves one.

    Raises:
        VideoError: PySceneDetect is not installed.
    """
    try:
        from scenedetect import AdaptiveDetector, FrameTimecode
    except ImportError as error:
        raise VideoError(
            f"cuts are found by PySceneDetect, which cannot be imported ({error}); install "
            "scenedetect-headless, or give the cuts yourself (none: the video is one shot)"
        ) from error

    rate = Fraction(fps).limit_denominator(1001)
    # short shots are judged below: the detector would drop the second of two near cuts
    detector = AdaptiveDetector(min_scene_len=1)
    # it tells of a cut only when it has seen what follows
    recent: deque[_Picture] = deque(maxlen=detector.event_buffer_length + 2)
    cuts: list[_Cut] = []
    number = -1
    for number, frame in enumerate(frames):
        recent.append(_picture(frame))
        for found in detector.process_frame(FrameTimecode(number, rate), recent[-1]):
            place = len(recent) - 1 - (number - found.frame_num)
            cuts.append(_Cut(found.frame_num, recent[place - 1], recent[place]))
    return _between_shots(cuts, number + 1, min_shot_frames)


def _between_shots(cuts: list[_Cut], num_frames: int, shortest: int) -> tuple[int, ...]:
    """The cuts that part two shots; what is too short between two of them is no shot."""
    kept: list[int] = []
    first: _Cut | None = None  # the first cut of what is too short so far
    for cut, end in pairwise([*cuts, None]):
        assert cut is not None
        first = first or cut
        if (num_frames if end is None else end.number) - cut.number < shortest:
            continue
        begun = kept[-1] if kept else 0
        is_shot = first.number - begun >= shortest
        if is_shot and (first is cut or _differ(first.before, cut.after)):
            kept.append(cut.number)
        first = None
    return tuple(kept)


def _differ(before: _Picture, after: _Picture) -> bool:
    from scenedetect import ContentDetector, FrameTimecode

    detector = ContentDetector(min_scene_len=0)
    detector.process_frame(FrameTimecode(0, 1.0), before)
    return bool(detector.process_frame(FrameTimecode(1, 1.0), after))


def _picture(frame: Tensor) -> _Picture:
    """uint8 [rows, columns, 3] in OpenCV's order of colours, small."""
    height, width = frame.shape[:2]
    factor = -(-max(height, width) // _MAX_SIDE)
    if factor > 1:
        planes = frame.permute(2, 0, 1)[None].float()
        pooled = F.avg_pool2d(planes, factor, ceil_mode=True, count_include_pad=False)[0]
        frame = pooled.round().to(torch.uint8).permute(1, 2, 0)
    return frame.flip(-1).contiguous().numpy()
