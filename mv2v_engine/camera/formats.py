"""Readers of camera files: one function a format, each with the one convention of its format.

A format is recognised by what a file holds, not by its name; only COLMAP's binary form, which
begins with nothing of its own, is told by its ending. What is read is as it is written: `files`
brings it to camera-to-world, OpenCV axes and metres, by the format's convention or by another that
is asked for.

N poses of a file.
"""

from __future__ import annotations

import io
import json
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mv2v_engine.camera.colmap import (
    is_colmap_binary,
    is_colmap_text,
    read_colmap_binary,
    read_colmap_text,
)
from mv2v_engine.camera.poses import relative_to
from mv2v_engine.camera.reading import (
    EXPECTED,
    Axes,
    CameraFile,
    Direction,
    Lens,
    Quaternion,
    Recording,
    matrix_poses,
    numbers,
    one_or_all,
    pinhole,
    rotations,
)
from mv2v_engine.errors import CameraError, nearest_names

FORMAT = "mv2v-camera"
VERSION = 1
CONVENTION = "opencv camera-to-world, metres"
_FIELDS = ("format", "version", "convention", "size", "intrinsics", "poses")
_CENTIMETRES = 100.0
# what Python raises at syntax that it cannot read
_SYNTAX = (SyntaxError, TokenError, RecursionError, MemoryError, AttributeError)


# --- this project's own JSON ---


def _is_own(file: CameraFile) -> bool:
    return isinstance(file.json, dict) and file.json.get("format") == FORMAT


def _read_own(file: CameraFile, camera: str | None, _: Quaternion) -> Recording:
    return own_recording(file, file.json)


def own_recording(file: CameraFile, content: dict[str, Any]) -> Recording:
    """The poses and lens of our own format's JSON (see `files`).

    Raises:
        CameraError: it is none.
    """
    if content.get("version") != VERSION:
        raise file.refused(
            f" has version {content.get('version')!r}, this engine reads {VERSION}; "
            "write it again with this version's save_trajectory"
        )
    convention = content.get("convention", CONVENTION)
    if convention != CONVENTION:
        raise file.refused(f" is in convention {convention!r}, expected {CONVENTION!r}; convert it")
    unknown = [name for name in content if name not in _FIELDS]
    if unknown:
        raise file.refused(
            f" has {unknown[0]!r}, which this format does not know: its fields are "
            f"{', '.join(_FIELDS)}. A lens is a pinhole's: take distortion out of the frames first"
        )
    poses = matrix_poses(file, numbers(file, "poses", content.get("poses"), ("[frames, 3, 4]",)))
    if content.get("intrinsics") is None:
        return Recording(poses, file.poses)
    size = content.get("size")
    if (
        not isinstance(size, list)
        or len(size) != 2
        or not all(isinstance(pixels, int) for pixels in size)
    ):
        raise file.refused(
            f": size must be [height, width], the pixels that the intrinsics refer to, got {size!r}"
        )
    shapes = ("[3, 3]", "[frames, 3, 3]")
    intrinsics = numbers(file, "intrinsics", content["intrinsics"], shapes)
    return Recording(poses, file.poses, Lens(intrinsics, (size[0], size[1])))


# --- ReCamMaster and MultiCamVideo ---


def _is_recammaster(file: CameraFile) -> bool:
    return isinstance(file.json, dict) and "frame0" in file.json


def _read_recammaster(file: CameraFile, camera: str | None, _: Quaternion) -> Recording:
    """Transposed 4x4 matrices as text, in Unreal's axes and centimetres (BASE_MODELS 2.4).

    Its world is left-handed, so that only poses relative to a frame mean anything: they are
    relative to the camera's own first frame, as the presets start at the source's pose.
    """
    names = recammaster_cameras(file)
    if camera is None:
        raise file.refused(
            f" holds {len(names)} cameras ({', '.join(names)}); "
            f"name one, such as {file.name}#{names[0]}"
        )
    if camera not in names:
        raise file.refused(f" has no camera {camera!r}; nearest: {nearest_names(camera, names)}")
    poses = recammaster_world(file, camera)
    return Recording(relative_to(poses, poses[0]), f"{file.name}#{camera}")


def recammaster_cameras(file: CameraFile) -> list[str]:
    """The names of the cameras in a file of ReCamMaster's."""
    first = file.json["frame0"]
    if not isinstance(first, dict) or not first:
        raise file.refused(f": frame0 must map camera names to matrices; {EXPECTED}")
    return list(first)


def recammaster_world(file: CameraFile, camera: str) -> Tensor:
    """One camera in the file's own, left-handed world: [N, 3, 4], float64, metres.

    Unreal's camera axes are x forward, y right, z up. The world keeps them (determinant -1), which
    cancels in poses relative to a frame.
    """
    file.check_count(len(file.json))
    matrices = []
    for index in range(len(file.json)):
        frame = file.json.get(f"frame{index}")
        text = frame.get(camera) if isinstance(frame, dict) else None
        matrices.append(_unreal_matrix(file, f"frame{index} of {camera}", text))
    poses = torch.stack(matrices).transpose(1, 2)[:, :3, [1, 2, 0, 3]]
    poses[:, :, 1] *= -1
    poses[:, :, 3] /= _CENTIMETRES
    return poses


def _unreal_matrix(file: CameraFile, where: str, text: Any) -> Tensor:
    """The text "[r r r 0] [r r r 0] [r r r 0] [x y z 1] " as [4, 4] float64."""
    rows = re.findall(r"\[([^\]]*)\]", text) if isinstance(text, str) else []
    try:
        values = [[float(number) for number in row.split()] for row in rows]
    except ValueError:
        values = []
    if [len(row) for row in values] != [4, 4, 4, 4]:
        raise file.refused(
            f': {where} must be text "[r r r 0] [r r r 0] [r r r 0] [x y z 1]", '
            f"got {str(text)[:100]!r}"
            if text is not None
            else f": {where} must be text, as in all frames, got None: frames are named frame0 to "
            "the last without a gap"
        )
    if [row[3] for row in values] != [0.0, 0.0, 0.0, 1.0]:
        raise file.refused(
            f": {where} must have the last column 0 0 0 1 (row vectors, translation in "
            f"the last row), got {[row[3] for row in values]}; transpose the matrix?"
        )
    return torch.tensor(values, dtype=torch.float64, device="cpu")


# --- NeRF's transforms.json: Blender, instant-ngp, nerfstudio ---

_DISTORTION = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")
_PINHOLES = ("PINHOLE", "SIMPLE_PINHOLE", "OPENCV", "PERSPECTIVE")


def _is_nerf(file: CameraFile) -> bool:
    return isinstance(file.json, dict) and isinstance(file.json.get("frames"), list)


def _read_nerf(file: CameraFile, camera: str | None, _: Quaternion) -> Recording:
    content, frames = file.json, file.json["frames"]
    file.check_count(len(frames))
    matrices = []
    for index, frame in enumerate(frames):
        if not isinstance(frame, dict) or "transform_matrix" not in frame:
            raise file.refused(
                f": frame {index} must have a transform_matrix, 4x4 camera-to-world, got "
                f"{json.dumps(frame)[:100]}"
            )
        where = f"the transform_matrix of frame {index}"
        matrix = numbers(file, where, frame["transform_matrix"], ("[4, 4]",))
        if tuple(matrix.shape) not in ((4, 4), (3, 4)):
            raise file.refused(f": {where} must have shape [4, 4], got {list(matrix.shape)}")
        matrices.append(matrix)
    if len({len(matrix) for matrix in matrices}) > 1:
        raise file.refused(": its transform_matrix are 3x4 and 4x4; all must be of one shape")
    poses = matrix_poses(file, torch.stack(matrices))
    paths = [frame.get("file_path") for frame in frames]
    names = tuple(paths) if all(isinstance(path, str) for path in paths) else None
    lens, problem = None, None
    try:
        lens = _nerf_lenses(file, [content | frame for frame in frames])
    except CameraError as error:
        problem = error
    return Recording(poses, file.poses, lens, names, None, problem)


def _nerf_lenses(file: CameraFile, frames: list[dict[str, Any]]) -> Lens | None:
    """The lens of all frames, each with the file's own fields where it has none."""
    bent = next((words for frame in frames if (words := _nerf_distortion(frame))), None)
    if bent is not None:
        raise file.bent(bent)
    lenses = [_nerf_lens(file, frame, index) for index, frame in enumerate(frames)]
    found = [lens for lens in lenses if lens is not None]
    if not found:
        return None
    if len({lens.size for lens in found}) > 1 or len(found) < len(lenses):
        raise file.refused(
            ": some of its frames have a lens or a size, and others another; give one size (w, h) "
            "for all, or take the default lens (lens=default)"
        )
    intrinsics = torch.stack([lens.intrinsics for lens in found])
    return Lens(one_or_all(intrinsics), found[0].size)


def _nerf_distortion(frame: dict[str, Any]) -> str | None:
    """Why a frame's lens is no pinhole's; None if it is one."""
    model = str(frame.get("camera_model", "PINHOLE")).upper()
    if model not in _PINHOLES or frame.get("is_fisheye"):
        return f"its camera_model is {model if model not in _PINHOLES else 'a fisheye'}"
    bent = [key for key in _DISTORTION if frame.get(key) not in (None, 0)]
    return f"it is distorted ({bent[0]} is {frame[bent[0]]!r:.20})" if bent else None


def _nerf_lens(file: CameraFile, frame: dict[str, Any], index: int) -> Lens | None:
    def value(key: str) -> float | None:
        found = frame.get(key)
        if found is None:
            return None
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        if not is_number or not abs(found) < 1e9:
            raise file.refused(f": {key} of frame {index} must be a number, got {found!r:.40}")
        return float(found)

    width, height = value("w"), value("h")
    fx, fy = value("fl_x"), value("fl_y")
    angle_x, angle_y = value("camera_angle_x"), value("camera_angle_y")
    for key, angle in (("camera_angle_x", angle_x), ("camera_angle_y", angle_y)):
        if angle is not None and not 0 < angle < math.pi:
            raise file.refused(f": {key} must lie between 0 and pi radians, got {angle:g}")
    if fx is None and fy is None and angle_x is None and angle_y is None:
        return None
    if width is None or height is None:
        if angle_x is None:
            raise file.refused(
                " has a focal length and no size of its images (w, h), to which it refers; add "
                "them, or take the default lens (lens=default)"
            )
        # Blender's synthetic scenes: an angle alone, of images of any size
        share_x = 0.5 / math.tan(angle_x / 2)
        share_y = 0.5 / math.tan(angle_y / 2) if angle_y is not None else math.nan
        return Lens(pinhole(share_x, share_y, 0.5, 0.5), None)
    if not (width >= 1 and height >= 1 and width.is_integer() and height.is_integer()):
        raise file.refused(f": w and h must be whole pixels, got {width:g} and {height:g}")
    if fx is None and angle_x is not None:
        fx = 0.5 * width / math.tan(angle_x / 2)
    if fy is None and angle_y is not None:
        fy = 0.5 * height / math.tan(angle_y / 2)
    fx, fy = (fy if fx is None else fx), (fx if fy is None else fy)
    assert fx is not None and fy is not None
    cx, cy = value("cx"), value("cy")
    centre = (width / 2 if cx is None else cx, height / 2 if cy is None else cy)
    return Lens(pinhole(fx, fy, *centre), (int(height), int(width)))


# --- matrices: JSON, npy, text ---


def _is_json_matrices(file: CameraFile) -> bool:
    content = file.json
    return isinstance(content, list) and bool(content) and isinstance(content[0], list)


def _read_json_matrices(file: CameraFile, camera: str | None, _: Quaternion) -> Recording:
    shapes = ("[frames, 4, 4]", "[frames, 3, 4]")
    return Recording(matrix_poses(file, numbers(file, "poses", file.json, shapes)), file.poses)


def _is_npy(file: CameraFile) -> bool:
    if file.data[:4] == b"PK\x03\x04":
        raise file.refused(
            " is an archive (npz or zip) of several arrays; save the poses alone as .npy"
        )
    return file.data.startswith(b"\x93NUMPY")


def _read_npy(file: CameraFile, camera: str | None, _: Quaternion) -> Recording:
    stream = io.BytesIO(file.data)
    try:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        with warnings.catch_warnings():
            # it does not matter that Python 2 wrote it
            warnings.simplefilter("ignore")
            shape, is_columns, dtype = read(stream)
    # a header is Python's own syntax
    except (ValueError, LookupError, TypeError, EOFError, *_SYNTAX) as error:
        raise file.refused(" is no npy file that can be read; save it again") from error
    if dtype.kind not in "fiu" or dtype.hasobject:
        raise file.refused(f" holds {dtype} values; save real numbers, as float32 or float64")
    # the header is not believed: what it promises is not allocated before it is there
    promised, found = math.prod(shape) * dtype.itemsize, len(file.data) - stream.tell()
    if promised != found or any(length < 0 for length in shape):
        raise file.refused(
            f" is damaged: its header promises {list(shape)} of {dtype}, {promised:,} bytes, and "
            f"{found:,} follow; save it again"
        )
    if shape and shape[-1:] == (17,):
        raise file.refused(
            f" has shape {list(shape)}, which is LLFF's poses_bounds.npy; give its "
            "transforms.json, or 4x4 matrices"
        )
    if not found:
        file.check_count(0)
    values = np.frombuffer(file.data, dtype, offset=stream.tell())
    with np.errstate(invalid="ignore"):  # NaN is told where it stands
        array = values.reshape(shape, order="F" if is_columns else "C").astype(np.float64)
    return Recording(matrix_poses(file, torch.from_numpy(array.copy())), file.poses)


def _is_table(*columns: int) -> Callable[[CameraFile], bool]:
    return lambda file: bool(file.table_rows) and len(file.table_rows[0].fields) in columns


def _read_text_matrices(file: CameraFile, camera: str | None, _: Quaternion) -> Recording:
    """12 or 16 numbers a line, as KITTI has them, or four lines of four a matrix."""
    values = file.table()
    if values.shape[1] == 4:
        if len(values) % 4:
            raise file.refused(
                f" has {len(values)} lines of 4 numbers; a matrix has 4 of them, or write 12 or 16 "
                "numbers a line"
            )
        values = values.unflatten(0, (-1, 4))
    # one line is one pose, also where there are four of them
    if values.ndim == 2:
        values = values.unflatten(1, (-1, 4))
    return Recording(matrix_poses(file, values), file.poses)


# --- RealEstate10K ---


def _read_realestate(file: CameraFile, camera: str | None, _: Quaternion) -> Recording:
    """Microseconds, fx fy cx cy in shares of the image, two noughts, and a 3x4 world-to-camera."""
    values = file.table()
    lens = values[:, 1:5]
    bent = values[:, 5:7].abs().amax(1).nonzero()
    problem = None
    if len(bent):
        problem = file.bent(f"it is distorted ({values[int(bent[0]), 5:7].tolist()})")
    intrinsics = torch.zeros(len(values), 3, 3, dtype=torch.float64, device="cpu")
    intrinsics[:, 0, 0], intrinsics[:, 1, 1] = lens[:, 0], lens[:, 1]
    intrinsics[:, 0, 2], intrinsics[:, 1, 2], intrinsics[:, 2, 2] = lens[:, 2], lens[:, 3], 1.0
    return Recording(
        values[:, 7:].unflatten(1, (3, 4)),
        file.poses,
        Lens(one_or_all(intrinsics), None),
        times=values[:, 0],
        problem=problem,
    )


# --- TUM ---


def _read_tum(file: CameraFile, camera: str | None, quaternion: Quaternion) -> Recording:
    """Seconds, x y z, and a quaternion whose w is its last number: camera-to-world."""
    values = file.table()
    turned = values[:, 4:]
    header = file.header()
    if quaternion == "xyzw" and len(header) == 8 and re.search(r"w\b", header[4], re.IGNORECASE):
        raise file.refused(
            f": its header names {header[4][:40]} before the other three of the quaternion; is it "
            "in the order w x y z (option quaternion=wxyz)?"
        )
    if quaternion == "xyzw":
        turned = turned[:, [3, 0, 1, 2]]
    poses = torch.cat([rotations(file, turned), values[:, 1:4, None]], dim=-1)
    return Recording(poses, file.poses, times=values[:, 0])


# --- the registry ---


@dataclass(frozen=True)
class Format:
    """One kind of camera file.

    name: how a note calls it. axes, direction: its convention; None where the reader has brought it
        to camera-to-world, OpenCV axes itself and no other can be asked for.
    matches: whether a file is of this kind. read: (file, camera's name, order of quaternions).
    """

    name: str
    axes: Axes | None
    direction: Direction | None
    matches: Callable[[CameraFile], bool]
    read: Callable[[CameraFile, str | None, Quaternion], Recording]


# the first that matches is taken
FORMATS = (
    Format("an npy array", "opencv", "c2w", _is_npy, _read_npy),
    Format("COLMAP's images.bin", "opencv", "w2c", is_colmap_binary, read_colmap_binary),
    Format("this project's JSON", None, None, _is_own, _read_own),
    Format("ReCamMaster's extrinsics", None, None, _is_recammaster, _read_recammaster),
    Format("NeRF's transforms", "opengl", "c2w", _is_nerf, _read_nerf),
    Format("a list of matrices", "opencv", "c2w", _is_json_matrices, _read_json_matrices),
    Format("COLMAP's images.txt", "opencv", "w2c", is_colmap_text, read_colmap_text),
    Format("RealEstate10K's text", "opencv", "w2c", _is_table(19), _read_realestate),
    Format("TUM's text", "opencv", "c2w", _is_table(8), _read_tum),
    Format("matrices as text", "opencv", "c2w", _is_table(4, 12, 16), _read_text_matrices),
)
RECAMMASTER = FORMATS[3]
TUM = FORMATS[8]


def recognised(file: CameraFile) -> Format:
    """What kind of camera file this is.

    Raises:
        CameraError: it is none that is known.
    """
    for form in FORMATS:
        if form.matches(file):
            return form
    if not file.data.strip():
        raise file.refused(" is empty; a camera needs one pose per frame")
    if file.text is None:
        raise file.refused(f" is no camera file, and no text: {EXPECTED}")
    hint = ""
    if file.json is None and file.rows:
        row = file.rows[0]
        hint = f" (line {row.number} has {len(row.fields)} fields: {row.words[:60]!r})"
    raise file.refused(f" is no camera file{hint}: {EXPECTED}")
