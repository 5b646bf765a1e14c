"""Images as a video: a folder, numbered files (`frames/%03d.png`), or an animated WebP.

Pillow reads them one by one, upright by their EXIF, and what they say of transparency is composed
as a video's is. A folder's images come in the order of their names, numbers by their value.

T frames; sizes are (height, width) in pixels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mv2v_engine.config import Alpha
from mv2v_engine.errors import MV2VError, VideoError
from mv2v_engine.files import by_number
from mv2v_engine.video.clock import clock
from mv2v_engine.video.pictures import composed_over
from mv2v_engine.video.scan import (
    Check,
    Scan,
    VideoInfo,
    check_fps,
    check_picture_size,
    scan_file,
    truncated,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}
# Pillow's names for them
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")
# frames a second of images that come without a rate
DEFAULT_FPS = 25.0
_MAX_IMAGES = 1 << 20
_NUMBER = re.compile(r"%0?(\d*)d")


@dataclass(frozen=True, slots=True)
class Stills:
    """What `scan_stills` found. files: one a frame, or the one that is animated.

    order[i] is the stored frame that is shown at tick i. size: of every frame.
    """

    info: VideoInfo
    files: tuple[Path, ...]
    is_animated: bool
    order: tuple[int, ...]
    notes: tuple[str, ...]
    alpha: Alpha


def are_stills(path: Path) -> bool:
    """Whether a path names images that make a video: a folder, a pattern, or an animated WebP."""
    if path.is_dir() or (_NUMBER.search(path.name) and not path.exists()):
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(64)
    # the ANIM chunk comes right behind the first, whose flags announce it
    return head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and bool(head[20] & 2)


def count_stills(path: Path) -> tuple[int, int, int]:
    """Frames, height and width of an animated image by its header.

    Raises:
        VideoError: it cannot be read.
    """
    with _opened(path) as image:
        return getattr(image, "n_frames", 1), image.height, image.width


def scan_video(
    path: Path,
    max_pixels: int | None,
    check: Check | None = None,
    alpha: Alpha = "black",
    image_fps: float | None = None,
) -> Scan | Stills:
    """What a video holds, of a file or of images; decoded is what has to be.

    Raises:
        VideoError: missing, empty, truncated, or not a video; frames larger than `max_pixels`.
    """
    if are_stills(path):
        return scan_stills(path, max_pixels, check, alpha, image_fps)
    return scan_file(path, max_pixels, check, alpha)


def scan_stills(
    path: Path, max_pixels: int | None, check: Check | None, alpha: Alpha, fps: float | None
) -> Stills:
    """Names, sizes and times of images; decoded are an animated one, and those with alpha.

    fps: of images that say no times.

    Raises:
        VideoError: there are none, they differ in size, one is no image, or it has alpha and that
            is refused.
    """
    is_animated = path.is_file()
    files = (path,) if is_animated else _listed(path)
    rate, notes, stamps = Fraction(fps or DEFAULT_FPS).limit_denominator(1001), [], [0]
    order: tuple[int, ...] = tuple(range(len(files)))
    size: tuple[int, int] | None = None
    has_alpha = False
    for file in files:
        if check is not None:
            check()
        with _opened(file) as image:
            found = _upright_size(image)
            if size is None:
                size = found
                check_picture_size(file, size[1], size[0], max_pixels)
            if found != size:
                raise VideoError(
                    f"{file.name} is {found[1]}x{found[0]}, {files[0].name} before it "
                    f"{size[1]}x{size[0]}; give images of one size"
                )
            if is_animated:
                stamps, has_alpha = _walked(image, path, check)
            else:
                has_alpha = has_alpha or _is_seen_through(image)
    assert size is not None
    if is_animated:
        told = [] if len(stamps) > 2 else [rate]
        rate, order, held = clock(len(stamps) - 1, stamps[:-1], Fraction(1, 1000), told)
        notes += [held] if held else []
    else:
        notes.append(f"{len(files)} images were taken at {float(rate):g} a second")
    check_fps(f"the fps of {path.name}", rate)
    if has_alpha:
        notes.append(composed_over(alpha, path.name, "images"))
    info = VideoInfo(
        path=path,
        width=size[1],
        height=size[0],
        num_frames=len(order),
        fps=float(rate),
        codec="webp" if is_animated else "images",
        duration=float(len(order) / rate),
        rotation=0,
    )
    return Stills(info, files, is_animated, order, tuple(notes), alpha)


def decode_stills(
    stills: Stills, wanted: Sequence[int], check: Check | None
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Stored frames of increasing numbers, each with its number: uint8 [height, width, 3].

    Raises:
        VideoError: an image cannot be read, or is no longer there.
    """
    if stills.is_animated:
        with _opened(stills.files[0]) as image:
            for number in wanted:
                if check is not None:
                    check()
                try:
                    image.seek(number)
                except EOFError:
                    raise truncated(stills.files[0], number, max(stills.order) + 1) from None
                yield number, _rgb(image, stills, stills.files[0])
        return
    for number in wanted:
        if check is not None:
            check()
        with _opened(stills.files[number]) as image:
            yield number, _rgb(image, stills, stills.files[number])


def is_image(path: Path) -> bool:
    """Whether a path's name is that of one image, or the file begins as one."""
    from PIL import Image

    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        with Image.open(path, formats=_FORMATS):
            return True
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def read_image(
    path: Path, alpha: Alpha = "black", max_pixels: int | None = None
) -> NDArray[np.uint8]:
    """One image, upright: uint8 [height, width, 3].

    Raises:
        VideoError: there is no such file, it is no image, or it is too large or too narrow.
    """
    from PIL import ImageOps

    if not path.is_file():
        raise VideoError(f"no image at {path}; give a file that exists")
    with _opened(path) as image:
        height, width = _upright_size(image)
        check_picture_size(path, width, height, max_pixels)
        upright = ImageOps.exif_transpose(image)
        return _composed(upright if upright is not None else image, alpha, path.name)


def frames_of_images(
    images: Sequence[Any], alpha: Alpha = "black"
) -> tuple[Tensor, tuple[str, ...]] | None:
    """Pillow images or arrays [height, width, 3] of one size as uint8 [T, height, width, 3].

    With what was changed of them, in words. None if they are something else.
    """
    import torch
    from PIL.Image import Image
    from torch import Tensor

    if not images or not all(isinstance(each, Image | np.ndarray | Tensor) for each in images):
        return None
    frames: list[Tensor] = []
    has_alpha = False
    for number, image in enumerate(images):
        if isinstance(image, Image):
            frame = torch.from_numpy(_composed(image, alpha, f"image {number}"))
            has_alpha = has_alpha or _is_seen_through(image)
        else:
            frame = torch.as_tensor(np.asarray(image))
        if frames and frame.shape != frames[0].shape:
            raise VideoError(
                f"image {number} is {list(frame.shape)}, the first one {list(frames[0].shape)}; "
                "give images of one size"
            )
        frames.append(frame)
    return torch.stack(frames), (composed_over(alpha, "an image", "images"),) if has_alpha else ()


def _listed(path: Path) -> tuple[Path, ...]:
    """The images of a folder or a pattern, in order."""
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix.lower() in SUFFIXES]
        files = [file for file in files if file.is_file() and not file.name.startswith(".")]
        if not files:
            known = ", ".join(sorted(SUFFIXES))
            raise VideoError(
                f"{path} is a folder without images ({known}); give a video file, or a folder of "
                "its frames"
            )
        return tuple(sorted(files, key=lambda file: by_number(file.name)))[:_MAX_IMAGES]
    match = _NUMBER.search(path.name)
    assert match is not None
    digits = rf"(\d{{{int(match[1])},}})" if match[1] else r"(\d+)"
    before, after = path.name[: match.start()], path.name[match.end() :]
    name = re.compile(re.escape(before) + digits + re.escape(after))
    found = {}
    for file in path.parent.iterdir() if path.parent.is_dir() else ():
        if fits := name.fullmatch(file.name):
            found[int(fits[1])] = file
    if not found:
        raise VideoError(f"no file has the name {path}; give the pattern of images that exist")
    missing = next(number for number in range(min(found), max(found) + 2) if number not in found)
    if missing <= max(found):
        raise VideoError(
            f"{path} has images {min(found)} to {max(found)}, but none of number {missing}; give "
            "them without gaps, or their folder"
        )
    return tuple(found[number] for number in sorted(found))


@contextmanager
def _opened(path: Path) -> Iterator[Image]:
    """An image file; what Pillow says of one that it cannot read becomes one VideoError."""
    from PIL import Image

    try:
        with closing(Image.open(path)) as image:
            yield image
    except MV2VError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        # where a service keeps it is nothing to its clients
        reason = reason.replace(str(path), path.name)
        raise VideoError(
            f"{path.name} cannot be read as an image ({reason}): damaged, or none; give whole "
            "images"
        ) from error


def _upright_size(image: Image) -> tuple[int, int]:
    """(height, width) once EXIF's orientation is applied."""
    is_turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (image.width, image.height) if is_turned else (image.height, image.width)


def _walked(image: Image, path: Path, check: Check | None) -> tuple[list[int], bool]:
    """When each frame begins and the last one ends, milliseconds; whether any is transparent."""
    num_frames: int = getattr(image, "n_frames", 1)
    stamps, has_alpha = [0], False
    for number in range(num_frames):
        if check is not None:
            check()
        try:
            image.seek(number)
            image.load()
        except EOFError:
            raise truncated(path, number, num_frames) from None
        # browsers show a frame of no length for as long
        stamps.append(stamps[-1] + (int(image.info.get("duration", 0)) or 100))
        has_alpha = has_alpha or _is_seen_through(image)
    image.seek(0)
    return stamps, has_alpha


def _is_seen_through(image: Image) -> bool:
    if "A" not in image.getbands() and "transparency" not in image.info:
        return False
    extrema: Any = image.convert("RGBA").getextrema()
    return bool(extrema[3][0] < 255)


def _rgb(image: Image, stills: Stills, path: Path) -> NDArray[np.uint8]:
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    frame = _composed(upright if upright is not None else image, stills.alpha, path.name)
    if frame.shape[:2] != (stills.info.height, stills.info.width):
        raise VideoError(
            f"{path.name} is {frame.shape[1]}x{frame.shape[0]} now, and was {stills.info.width}x"
            f"{stills.info.height}; leave the images as they are"
        )
    return frame


def _composed(image: Image, alpha: Alpha, name: str) -> NDArray[np.uint8]:
    """uint8 [height, width, 3]."""
    from PIL import Image as images

    if image.mode == "F":
        raise VideoError(
            f"{name} has floating-point numbers (mode F), and which of them is white is not said; "
            "save it in 8 or 16 bits"
        )
    if image.mode.startswith("I"):
        # Pillow would clip what is more than 8 bits
        grey = (np.asarray(image).astype(np.float32) / 257).round().clip(0, 255)
        return grey.astype(np.uint8)[..., None].repeat(3, -1)
    if _is_seen_through(image):
        composed_over(alpha, name, "images")
        seen = image.convert("RGBA")
        image = images.alpha_composite(images.new("RGBA", seen.size, alpha), seen)
    return np.array(image.convert("RGB"))
