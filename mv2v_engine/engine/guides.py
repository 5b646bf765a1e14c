"""What an edit is given beside its source: images to refer to, and a mask of what is made anew.

Both are a session's own, as its source is: every window of every edit sees them. How a model takes
images follows from its kind: VACE's lie on a white canvas of the video's size and stand before its
first frame, Bernini-R's keep their shape and are segments with ids of their own.

C latent channels, T frames of a window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mv2v_engine import arguments
from mv2v_engine.config import Alpha, TransformerConfig
from mv2v_engine.engine.source import AnySource, LongSource, open_long_source
from mv2v_engine.errors import RequestError, VideoError
from mv2v_engine.vae import VideoVAE
from mv2v_engine.video.scan import Check, check_aspect
from mv2v_engine.video.stills import are_stills, frames_of_images, is_image, read_image
from mv2v_engine.video.transforms import cover_and_crop, crop_report
from mv2v_engine.video.windows import EditWindow

AnyImage: TypeAlias = "Path | str | Tensor | np.ndarray[Any, Any] | Any"
_IMAGE = "an image file, one of Pillow's images, or uint8 [height, width, 3]"
_WHITE = 255


@dataclass(frozen=True, eq=False)
class Mask:
    """A video whose bright pixels are made anew. given: as it came, maybe one frame for all."""

    video: LongSource
    given: LongSource

    def window(self, window: EditWindow, check: Check | None = None) -> Tensor:
        """1 where a window is made anew, else 0: float32 [T, height, width] of the model's size."""
        frames = self.video.window(window, check)
        return (frames.float().mean(-1) >= 127.5).float()


@dataclass(eq=False)
class Guides:
    """A session's references, ready for its model, and its mask.

    images: uint8 [1, height, width, 3], each of the size that the model sees it in.
    """

    images: tuple[Tensor, ...] = ()
    mask: Mask | None = None
    _latents: list[Tensor] = field(default_factory=list)

    def sizes(self, stride: int) -> tuple[tuple[int, int], ...]:
        """Latent (rows, columns) of every reference. stride: the VAE's."""
        return tuple((image.shape[1] // stride, image.shape[2] // stride) for image in self.images)

    def latents(self, vae: VideoVAE, check: Check | None = None) -> list[Tensor]:
        """The references' latents [C, 1, H, W], encoded once.

        Raises:
            NotFiniteError: they are not finite.
        """
        if not self._latents:
            self._latents = [vae.encode(image, check=check) for image in self.images]
        return self._latents

    def close(self) -> None:
        """Let go of the mask's file."""
        if self.mask is not None:
            self.mask.video.close()

    def identity(self) -> dict[str, Any]:
        """What a resumed session must agree with; None where nothing is given."""
        digests = [hashlib.sha256(each.numpy().tobytes()).hexdigest()[:16] for each in self.images]
        return {
            "references": digests or None,
            "mask": None if self.mask is None else self.mask.given.fingerprint,
        }

    def describe(self) -> dict[str, Any]:
        """What a report says of them; nothing where nothing is given."""
        told: dict[str, Any] = {}
        if self.images:
            told["references"] = [list(image.shape[1:3]) for image in self.images]
        if self.mask is not None:
            told["mask"] = self.mask.video.name
        return told


def guides_of(config: TransformerConfig) -> dict[str, bool]:
    """Whether a model takes "references", and a "mask"."""
    has_canvas = bool(config.vace_layers)
    return {"references": has_canvas or config.source_ids, "mask": has_canvas}


def require_guides(taken: Mapping[str, bool], name: str, *, references: bool, mask: bool) -> None:
    """Refuse references or a mask that a model does not take.

    taken: as `guides_of` gives it. name: the checkpoint's.

    Raises:
        RequestError: it takes none.
    """
    if mask and not taken["mask"]:
        raise RequestError(
            f"{name} takes no mask; leave it out, or use a checkpoint that does, as VACE"
        )
    if references and not taken["references"]:
        raise RequestError(
            f"{name} takes no reference images; leave them out, or use a checkpoint that does, as "
            "VACE and Bernini-R"
        )


def open_guides(
    config: TransformerConfig,
    source: LongSource,
    *,
    references: Sequence[AnyImage] = (),
    mask: AnySource | None = None,
    stride: int,
    max_pixels: int,
    alpha: Alpha = "black",
    check: Check | None = None,
) -> Guides:
    """Read what an edit of a source is given beside it.

    references: in the order in which the model sees them. mask: a video as `open_long_source` takes
    it, as large and as long as the source, or an image of its size. stride: the VAE's.

    Raises:
        VideoError: a file is missing or damaged, or a mask of another size or length.
        RequestError: they are something else.
    """
    images = [
        _reference(read_reference(each, alpha, max_pixels), source.size, config, stride)
        for each in arguments.sequence("references", references, object, "images")
    ]
    opened = None
    if mask is not None:
        opened = _opened_mask(mask, source, alpha, max_pixels, check)
    return Guides(tuple(images), opened)


def read_reference(image: AnyImage, alpha: Alpha, max_pixels: int) -> Tensor:
    """An image as uint8 [height, width, 3].

    Raises:
        VideoError: there is none, it cannot be read, or it is too large or too narrow.
        RequestError: it is no image.
    """
    if isinstance(image, str | Path):
        path = arguments.path("references", image, _IMAGE)
        return torch.from_numpy(read_image(path, alpha, max_pixels))
    found = frames_of_images([image], alpha)
    if found is None or found[0].shape[3:] != (3,) or found[0].dtype != torch.uint8:
        raise arguments.mistaken("references", image, f"a list, each {_IMAGE}")
    check_aspect("a reference", *found[0].shape[1:3])
    return found[0][0]


def check_mask(
    name: str,
    size: tuple[int, int],
    num_frames: int,
    source_size: tuple[int, int],
    source_frames: int,
) -> None:
    """Refuse a mask that is not as large and as long as its source, sizes (height, width).

    Raises:
        VideoError: it is neither that nor one image of that size.
    """
    if size != source_size:
        (height, width), (rows, columns) = size, source_size
        raise VideoError(
            f"{name} is {width}x{height}, and the source that it masks {columns}x{rows}; give a "
            "mask of the source's size"
        )
    if num_frames not in (1, source_frames):
        raise VideoError(
            f"{name} has {num_frames} frames, and the source that it masks {source_frames}; give "
            "as many, or one image for all"
        )


def _reference(
    image_HW3: Tensor, size: tuple[int, int], config: TransformerConfig, stride: int
) -> Tensor:
    """A reference as its model sees it: uint8 [1, height, width, 3]."""
    height, width = image_HW3.shape[:2]
    frames = image_HW3[None]
    if config.vace_layers:
        top, bottom, left, right = crop_report((height, width), size, "letterbox").padded
        inside = cover_and_crop(frames, (size[0] - top - bottom, size[1] - left - right))[0]
        return F.pad(inside, (0, 0, left, right, top, bottom), value=_WHITE)
    # whole patches, no longer than the video is, and never enlarged
    cell, scale = 2 * stride, min(1.0, max(size) / max(height, width))
    own = [max(1, round(side * scale / cell)) * cell for side in (height, width)]
    return cover_and_crop(frames, (own[0], own[1]))[0]


def _opened_mask(
    mask: AnySource, source: LongSource, alpha: Alpha, max_pixels: int, check: Check | None
) -> Mask:
    """A mask of every frame of a source.

    Raises:
        VideoError: it cannot be read, or is of another size or length.
    """
    given: Any = mask
    if isinstance(mask, str | Path) and not are_stills(Path(mask)) and is_image(Path(mask)):
        given = torch.from_numpy(read_image(Path(mask), alpha, max_pixels))[None]
    video = open_long_source(
        given,
        size=source.size,
        fps=source.fps,
        own_fps=source.fps,
        max_pixels=max_pixels,
        check=check,
        alpha=alpha,
        fit=source.fit,
    )
    name = Path(mask).name if isinstance(mask, str | Path) else "mask"
    size, count = video.source_size, video.num_frames
    check_mask(name, size, count, source.source_size, source.num_frames)
    video.name = name
    if video.num_frames == source.num_frames:
        return Mask(video, video)
    frames = next(video.frames())[None].expand(source.num_frames, -1, -1, -1)
    how: dict[str, Any] = {"fps": source.fps, "size": source.size, "fit": source.fit}
    return Mask(LongSource(frames, name=name, **how), video)
