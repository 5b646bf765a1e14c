"""COLMAP's model of a scene, as text and as bytes: `images` has the poses, `cameras` the lenses.

World-to-camera, OpenCV axes, quaternions that begin with w.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from mv2v_engine.camera.reading import (
    MAX_POSES,
    CameraFile,
    Lens,
    Quaternion,
    Recording,
    Row,
    is_number,
    one_or_all,
    pinhole,
    rotations,
)
from mv2v_engine.errors import CameraError

# COLMAP's models in the order of their numbers: name, parameters, and how many of these are focal
# lengths, which come first; the centre follows
_COLMAP_MODELS = (
    ("SIMPLE_PINHOLE", 3, 1),
    ("PINHOLE", 4, 2),
    ("SIMPLE_RADIAL", 4, 1),
    ("RADIAL", 5, 1),
    ("OPENCV", 8, 2),
    ("OPENCV_FISHEYE", 8, 2),
    ("FULL_OPENCV", 12, 2),
    ("FOV", 5, 2),
    ("SIMPLE_RADIAL_FISHEYE", 4, 1),
    ("RADIAL_FISHEYE", 5, 1),
    ("THIN_PRISM_FISHEYE", 12, 2),
    ("RAD_TAN_THIN_PRISM_FISHEYE", 16, 2),
)
# what these are without distortion is a pinhole
_COLMAP_BENT = ("SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV")


@dataclass(frozen=True)
class _ColmapImage:
    numbers: tuple[float, ...]  # qw qx qy qz tx ty tz
    camera: int
    name: str


def is_colmap_text(file: CameraFile) -> bool:
    if not file.rows:
        return False
    fields = file.rows[0].words.split(maxsplit=9)
    if len(fields) >= 5 and fields[1].isupper() and fields[1] in {m[0] for m in _COLMAP_MODELS}:
        raise file.refused(
            " is COLMAP's cameras.txt, which holds lenses; give images.txt beside it"
        )
    is_image = len(fields) == 10 and fields[0].isdecimal() and fields[8].isdecimal()
    return is_image and not (" " in fields[9] and all(map(is_number, fields[9].split())))


def read_colmap_text(file: CameraFile, camera: str | None, _: Quaternion) -> Recording:
    return _colmap(file, _text_images(file), "cameras.txt", _text_cameras)


def _text_images(file: CameraFile) -> Iterator[_ColmapImage]:
    """IMAGE_ID, QW QX QY QZ, TX TY TZ, CAMERA_ID, NAME; the line after it holds its 2-D points.

    That line may be empty, and some tools leave it out.
    """
    rows = iter(file.rows)
    after: Row | None = next(rows, None)
    while (row := after) is not None:
        fields = row.words.split(maxsplit=9)
        if len(fields) < 10 or not fields[8].isdecimal():
            raise file.refused(
                f": line {row.number} must be an image, IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID "
                f"NAME, got {row.words[:60]!r}"
            )
        values = file.floats(fields[1:8], f"line {row.number}")
        yield _ColmapImage(tuple(values), int(fields[8][:20]), fields[9])
        after = next(rows, None)
        seen = [] if after is None else after.words.split()
        # triples of numbers: x, y and the number of a 3-D point
        if after is not None and len(seen) % 3 == 0 and all(map(is_number, seen)):
            after = next(rows, None)


def is_colmap_binary(file: CameraFile) -> bool:
    return file.ending == "bin"


def read_colmap_binary(file: CameraFile, camera: str | None, _: Quaternion) -> Recording:
    return _colmap(file, _binary_images(file), "cameras.bin", _binary_cameras)


class _Bytes:
    """Goes through a binary file; every step past its end is one error."""

    def __init__(self, file: CameraFile) -> None:
        self._file, self.at = file, 0

    def take(self, form: str) -> tuple[Any, ...]:
        try:
            found = struct.unpack_from(f"<{form}", self._file.data, self.at)
        except struct.error:
            raise self.damaged() from None
        self.at += struct.calcsize(f"<{form}")
        return found

    def text(self) -> str:
        end = self._file.data.find(b"\0", self.at, self.at + 4096)
        if end < 0:
            raise self.damaged()
        start, self.at = self.at, end + 1
        return self._file.data[start:end].decode("utf-8", "replace")

    def skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self._file.data):
            raise self.damaged()

    def count(self, least: int) -> int:
        """How many follow, each of `least` bytes at least."""
        (count,) = self.take("Q")
        if count * least > len(self._file.data) - self.at:
            raise self.damaged()
        return int(count)

    def end(self) -> None:
        if self.at != len(self._file.data):
            raise self.damaged()

    def damaged(self) -> CameraError:
        return self._file.refused(
            " is not COLMAP's binary form, or damaged; give images.bin, or images.txt "
            "(colmap model_converter)"
        )


def _binary_images(file: CameraFile) -> Iterator[_ColmapImage]:
    data = _Bytes(file)
    for _ in range(data.count(73)):
        _, *values, camera = data.take("i7di")
        name = data.text()
        data.skip(24 * data.count(24))
        yield _ColmapImage(tuple(values), camera, name)
    data.end()


def _colmap(
    file: CameraFile,
    images: Iterator[_ColmapImage],
    cameras: str,
    read_cameras: Callable[[CameraFile], dict[int, _ColmapCamera]],
) -> Recording:
    """cameras: the file beside it that has the lenses."""
    found = list(islice(images, MAX_POSES + 1))
    file.check_count(len(found))
    values = torch.tensor([image.numbers for image in found], dtype=torch.float64, device="cpu")
    poses = torch.cat([rotations(file, values[:, :4]), values[:, 4:, None]], dim=-1)
    names = tuple(image.name for image in found)
    lens, problem = None, None
    try:
        data = file.beside(cameras)
        if data is not None:
            lens = _colmap_lens(file, found, read_cameras(CameraFile(cameras, data)))
    except CameraError as error:
        problem = error
    return Recording(poses, file.poses, lens, names, None, problem)


def _colmap_lens(
    file: CameraFile, images: list[_ColmapImage], cameras: dict[int, _ColmapCamera]
) -> Lens:
    missing = next((image for image in images if image.camera not in cameras), None)
    if missing is not None:
        raise file.refused(
            f": image {missing.name[:60]!r} was taken by camera {missing.camera}, which the "
            "cameras file beside it lacks; write both anew, or take the default lens (lens=default)"
        )
    chosen = [cameras[image.camera] for image in images]
    bent = next((camera.bent for camera in chosen if camera.bent), None)
    if bent is not None:
        raise file.bent(bent)
    if len({camera.size for camera in chosen}) > 1:
        raise file.refused(
            ": its images are of several sizes; give images of one size, or take the default lens "
            "(lens=default)"
        )
    intrinsics = torch.stack([camera.intrinsics for camera in chosen])
    return Lens(one_or_all(intrinsics), chosen[0].size)


@dataclass(frozen=True, eq=False)
class _ColmapCamera:
    intrinsics: Tensor
    size: tuple[int, int]
    bent: str | None


def _colmap_camera(
    file: CameraFile, model: tuple[str, int, int], size: tuple[int, int], values: Sequence[float]
) -> _ColmapCamera:
    name, _, num_focal = model
    width, height = size
    if not (0 < width < 1 << 20 and 0 < height < 1 << 20):
        raise file.refused(f": a camera has a size of {width}x{height} pixels")
    cx, cy = values[num_focal : num_focal + 2]
    rest = values[num_focal + 2 :]
    bent = None
    if rest and (name not in _COLMAP_BENT or any(rest)):
        shown = ", ".join(f"{value:g}" for value in rest[:4])
        bent = f"its model is {name} ({shown})"
    intrinsics = pinhole(values[0], values[num_focal - 1], cx, cy)
    return _ColmapCamera(intrinsics, (height, width), bent)


def _text_cameras(file: CameraFile) -> dict[int, _ColmapCamera]:
    """CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS."""
    models = {model[0]: model for model in _COLMAP_MODELS}
    found = {}
    for row in file.rows:
        fields = row.words.split()
        model = models.get(fields[1]) if len(fields) > 1 else None
        is_camera = model is not None and len(fields) == 4 + model[1]
        if not is_camera or not all(fields[place].isdecimal() for place in (0, 2, 3)):
            raise file.refused(
                f": line {row.number} must be a camera, CAMERA_ID MODEL WIDTH HEIGHT PARAMS, got "
                f"{row.words[:60]!r}"
            )
        assert model is not None
        number, width, height = (int(fields[place][:20]) for place in (0, 2, 3))
        values = file.floats(fields[4:], f"line {row.number}")
        found[number] = _colmap_camera(file, model, (width, height), values)
    return found


def _binary_cameras(file: CameraFile) -> dict[int, _ColmapCamera]:
    data, found = _Bytes(file), {}
    for _ in range(data.count(48)):
        number, kind, width, height = data.take("iiQQ")
        if not 0 <= kind < len(_COLMAP_MODELS):
            raise file.refused(
                f": camera {number} has model {kind}; 0 to {len(_COLMAP_MODELS) - 1} are known"
            )
        model = _COLMAP_MODELS[kind]
        found[number] = _colmap_camera(file, model, (width, height), data.take(f"{model[1]}d"))
    data.end()
    return found
