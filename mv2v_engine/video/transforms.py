"""A clip onto the model's grid: which frames (`select_window`), at what size (`cover_and_crop`).

Nothing is cut or scaled silently: both say what they did in words that go into the report.

T frames; sizes are (height, width) in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mv2v_engine.config import Fit
from mv2v_engine.errors import VideoError, nearest_names
from mv2v_engine.video.scan import check_aspect

WINDOWS = ("first", "middle", "last", "even", "pad")
# pixels resized at once: float copies of a long clip would not fit
_CHUNK_PIXELS = 8 * 1920 * 1080
# a frame that is enlarged beyond this many times the size that is kept is cropped first
_WHOLE_AREAS = 4


@dataclass(frozen=True, slots=True)
class Window:
    """Which frames of the clip make the model's window; indices never decrease."""

    indices: tuple[int, ...]
    description: str


@dataclass(frozen=True, slots=True)
class CropReport:
    """How frames were brought to the model's size.

    source_size, size: (height, width) before and after. scale: factor on both axes.
    cropped: (top, bottom, left, right) pixels cut off after scaling. padded: the same of bars.
    """

    source_size: tuple[int, int]
    size: tuple[int, int]
    scale: float
    cropped: tuple[int, int, int, int]
    padded: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def description(self) -> str:
        source = f"{self.source_size[1]}x{self.source_size[0]}"
        scaled = "unscaled" if self.scale == 1 else f"scaled by {self.scale:.3f}"
        top, bottom, left, right = self.cropped
        cut = "nothing cropped"
        if any(self.cropped):
            cut = f"cropped by {left}+{right} columns and {top}+{bottom} rows"
        if any(self.padded):
            top, bottom, left, right = self.padded
            cut += f", between black bars of {left}+{right} columns and {top}+{bottom} rows"
        return f"{source} to {self.size[1]}x{self.size[0]}: {scaled}, {cut}"


def select_window(num_frames_available: int, num_frames_wanted: int, window: str | None) -> Window:
    """Choose the frames of a clip that the model sees.

    Args:
        window: None takes the whole clip and needs equal counts; "first", "middle", "last" take a
            run of frames; "even" spreads them over the whole clip; a number starts the run there;
            "pad" repeats the last frame of a shorter clip.

    Raises:
        VideoError: the clip has the wrong length for this choice, or the choice is unknown.
    """
    have, want = num_frames_available, num_frames_wanted
    if have < 1 or want < 1:
        raise VideoError(f"a window of {want} frames from {have}: both must be at least 1")
    if window is not None and window not in WINDOWS and not window.isdecimal():
        near = nearest_names(window, WINDOWS)
        raise VideoError(
            f"unknown window {window!r}; nearest: {near}. Choose first, middle, last, even, pad "
            "or the number of the frame to start at"
        )
    if have == want and window in (None, *WINDOWS):
        return Window(tuple(range(have)), f"all {have} frames")
    if window is None or (window == "pad" and have > want) or (window != "pad" and have < want):
        choices = "first, middle, last, even or START" if have > want else "pad"
        tried = f" and window {window!r} cannot change that" if window is not None else ""
        raise VideoError(
            f"the clip has {have} frames, the model's window is {want}{tried}; "
            f"choose window={choices}"
        )
    if window == "pad":
        indices = tuple(min(index, have - 1) for index in range(want))
        return Window(indices, f"all {have} frames, the last repeated {want - have} times")
    if window == "even":
        indices = tuple(round(i * (have - 1) / max(want - 1, 1)) for i in range(want))
        return Window(indices, f"{want} of {have} frames, spread evenly over the whole clip")
    starts = {"first": 0, "middle": (have - want) // 2, "last": have - want}
    start = starts[window] if window in starts else int(window)
    if start + want > have:
        raise VideoError(
            f"window {start} needs frames {start} to {start + want - 1}, the clip has {have} "
            f"(0 to {have - 1}); start at {have - want} or before"
        )
    return Window(
        tuple(range(start, start + want)), f"frames {start} to {start + want - 1} of {have}"
    )


def cover_and_crop(
    frames: Tensor, size: tuple[int, int], fit: Fit = "crop"
) -> tuple[Tensor, CropReport]:
    """Scale frames so that they cover `size`, then crop the middle.

    Memory is taken for a few frames at once, none of them much larger than the source and `size`.

    Args:
        frames: uint8 [T, height, width, 3].
        size: (height, width) wanted. fit: "letterbox" scales them to lie within it, and adds bars.

    Returns:
        uint8 [T, *size, 3] (bilinear, antialiased; untouched where nothing scales) and a report.

    Raises:
        VideoError: other frames than these, or as `crop_report`.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
        raise VideoError(
            f"frames must be uint8 [T, height, width, 3], got {frames.dtype} {list(frames.shape)}"
        )
    source = (frames.shape[1], frames.shape[2])
    if fit == "letterbox":
        report = crop_report(source, size, fit)
        top, bottom, left, right = report.padded
        inside = (size[0] - top - bottom, size[1] - left - right)
        scaled_frames, _ = cover_and_crop(frames, inside)
        return F.pad(scaled_frames, (0, 0, left, right, top, bottom)), report
    report = crop_report(source, size)
    top, bottom, left, right = report.cropped
    scaled = (top + size[0] + bottom, left + size[1] + right)
    rows, columns = slice(top, top + size[0]), slice(left, left + size[1])
    if scaled == source:
        return frames[:, rows, columns].contiguous(), report
    num_pixels = max(math.prod(source), math.prod(size))
    chunks = torch.split(frames, max(1, _CHUNK_PIXELS // num_pixels))
    if report.scale > 1 and math.prod(scaled) > _WHOLE_AREAS * math.prod(size):
        return torch.cat([_enlarge(chunk, scaled, rows, columns) for chunk in chunks]), report
    return torch.cat([_resize(chunk, scaled)[:, rows, columns] for chunk in chunks]), report


def crop_report(source: tuple[int, int], size: tuple[int, int], fit: Fit = "crop") -> CropReport:
    """What `cover_and_crop` does to frames of a size, without any frames.

    Raises:
        VideoError: a size that is not positive, or frames that are too long and narrow.
    """
    if min(source) < 1 or min(size) < 1:
        raise VideoError(f"cannot scale frames of {source} to {size}; both must be positive")
    check_aspect("the clip", *source)
    if fit == "letterbox":
        scale = min(size[0] / source[0], size[1] / source[1])
        # not a row of bar where rounding alone would ask for it
        inside = tuple(
            min(most, max(1, round(side * scale))) for side, most in zip(source, size, strict=True)
        )
        report = crop_report(source, (inside[0], inside[1]))
        top, left = (size[0] - inside[0]) // 2, (size[1] - inside[1]) // 2
        padded = (top, size[0] - inside[0] - top, left, size[1] - inside[1] - left)
        return replace(report, size=size, padded=padded)
    scale = max(size[0] / source[0], size[1] / source[1])
    scaled = (max(size[0], round(source[0] * scale)), max(size[1], round(source[1] * scale)))
    # half to even, as torchvision's centre crop, with which the models' videos were cut
    top, left = round((scaled[0] - size[0]) / 2), round((scaled[1] - size[1]) / 2)
    cropped = (top, scaled[0] - size[0] - top, left, scaled[1] - size[1] - left)
    return CropReport(source_size=source, size=size, scale=scale, cropped=cropped)


def _resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear with antialiasing, computed in fp32 and rounded: [T, *size, 3]."""
    planes = frames.permute(0, 3, 1, 2).float()
    planes = F.interpolate(planes, size=size, mode="bilinear", antialias=True, align_corners=False)
    return _to_frames(planes)


def _enlarge(frames: Tensor, size: tuple[int, int], rows: slice, columns: slice) -> Tensor:
    """Rows and columns of `_resize` to a larger size, and nothing besides them is computed.

    Enlarging needs no antialiasing. The weights differ in their last bits from those of `_resize`,
    so a value is at most 1 away; which is why frames that fit are still resized whole: sessions
    are known again by their pixels.
    """
    y_H, x_W = (
        (torch.arange(part.start, part.stop, dtype=torch.float32, device="cpu") + 0.5) * (2 / total)
        - 1
        for part, total in ((rows, size[0]), (columns, size[1]))
    )
    grid_HW2 = torch.stack(torch.meshgrid(x_W, y_H, indexing="xy"), -1)
    planes = frames.permute(0, 3, 1, 2).float()
    grid = grid_HW2.expand(len(planes), *grid_HW2.shape)
    return _to_frames(F.grid_sample(planes, grid, padding_mode="border", align_corners=False))


def _to_frames(planes: Tensor) -> Tensor:
    """uint8 [T, height, width, 3] of fp32 [T, 3, height, width]."""
    return planes.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
