"""Camera files: this project's own JSON, and ReCamMaster's `camera_extrinsics.json`.

Ours is poses as the engine uses them:

    {"format": "mv2v-camera", "version": 1,
     "convention": "opencv camera-to-world, metres",
     "size": [height, width],            the image that the intrinsics refer to
     "intrinsics": [[fx, 0, cx], ...],   optional, 3x3 or one per frame; 24 mm lens if absent
     "poses": [[[r, r, r, x], [r, r, r, y], [r, r, r, z]], ...]}

ReCamMaster's holds transposed 4x4 matrices in Unreal's axes and centimetres as text
(BASE_MODELS 2.4); its world is left-handed, so only poses relative to a frame mean anything.

T frames.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mv2v_engine import arguments
from mv2v_engine.camera.poses import default_intrinsics, relative_to, validate_poses
from mv2v_engine.camera.trajectories import CameraTrajectory, named_trajectory
from mv2v_engine.errors import CameraError, nearest_names
from mv2v_engine.files import save_json

# what a caller may give as a camera: see `resolve_camera`
Camera: TypeAlias = (
    "str | os.PathLike[str] | CameraTrajectory | Tensor | np.ndarray[Any, Any] | Sequence[Any]"
)
FORMAT = "mv2v-camera"
_FIELDS = ("format", "version", "convention", "size", "intrinsics", "poses")
VERSION = 1
CONVENTION = "opencv camera-to-world, metres"

_CENTIMETRES = 100.0
_EXPECTED = (
    f'expected {{"format": "{FORMAT}", "poses": ...}} or ReCamMaster\'s camera_extrinsics.json '
    '({"frame0": {"cam01": ...}, ...})'
)


def load_trajectory(
    path: Path | str,
    *,
    num_frames: int,
    size: tuple[int, int],
    camera: str | None = None,
    reference: Literal["first_frame", "file"] = "file",
) -> CameraTrajectory:
    """Read one camera path of exactly `num_frames` poses.

    Args:
        size: (height, width) of the video to make; intrinsics are scaled to it.
        camera: which camera of a ReCamMaster file, such as "cam03"; ours has one only.
        reference: what the poses of our own format are relative to: "file" leaves them as
            written, "first_frame" makes the first one the identity. ReCamMaster's are always
            relative to the camera's own first frame, as its presets start at the source's pose.

    Raises:
        CameraError: unreadable file, unknown format or camera, a number of poses other than
            `num_frames`, or poses that are no rigid camera-to-world matrices.
    """
    path = Path(path)
    content = _read_json(path)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        if camera is not None:
            raise CameraError(
                f"{path.name} holds one camera without a name, got {camera!r}; leave the name out"
            )
        trajectory = _own_trajectory(path, content, num_frames, size)
        if reference == "file":
            return trajectory
        poses = relative_to(trajectory.poses, trajectory.poses[0])
        return CameraTrajectory(poses, trajectory.intrinsics, size, trajectory.name)
    if isinstance(content, dict) and "frame0" in content:
        return _recammaster_trajectory(path, content, num_frames, size, camera)
    raise CameraError(f"{path.name} is no camera file: {_EXPECTED}")


def parse_trajectory(
    content: Any, *, num_frames: int, size: tuple[int, int], name: str = "custom"
) -> CameraTrajectory:
    """A camera path from our own format's JSON, as it comes without a file; see the module.

    `format`, `version` and `convention` may be left out.

    Raises:
        CameraError: as `load_trajectory`.
    """
    if not isinstance(content, dict) or content.get("format", FORMAT) != FORMAT:
        raise CameraError(f"a trajectory is an object of format {FORMAT!r}, with poses")
    path = Path("the trajectory")  # what an error calls it
    found = _own_trajectory(path, {"version": VERSION} | content, num_frames, size)
    return replace(found, name=name)


def load_rig(path: Path | str) -> dict[str, Tensor]:
    """Every camera of a ReCamMaster file in one world: poses [T, 3, 4] by the camera's name.

    They are relative to the first camera's first frame, so poses of two cameras compare.

    Raises:
        CameraError: unreadable file, another format, or matrices as in `load_trajectory`.
    """
    path = Path(path)
    content = _read_json(path)
    if not isinstance(content, dict) or "frame0" not in content:
        raise CameraError(f"{path.name} holds no cameras of several videos: {_EXPECTED}")
    world = {
        name: _world_poses(path, content, name) for name in _recammaster_cameras(path, content)
    }
    reference = next(iter(world.values()))[0]
    return {
        name: validate_poses(relative_to(poses, reference), name=f"{path.name}#{name}")
        for name, poses in world.items()
    }


def save_trajectory(path: Path | str, trajectory: CameraTrajectory) -> None:
    """Write a trajectory in our own format, whole or not at all.

    Raises:
        StorageError: the place cannot be written.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "convention": CONVENTION,
        "size": list(trajectory.size),
        "intrinsics": trajectory.intrinsics.tolist(),
        "poses": trajectory.poses.tolist(),
    }
    save_json(Path(path), content)


def resolve_camera(camera: Camera, num_frames: int, size: tuple[int, int]) -> CameraTrajectory:
    """A camera as a user gives it, seen at an image size (height, width).

    Args:
        camera: a preset, a `kind:amount` move, `file.json` or `file.json#cam03`; a trajectory; or
            poses [T, 3, 4] or [T, 4, 4], which are seen through the default lens.

    Raises:
        CameraError: none of these, or as `named_poses`, `load_trajectory`, `CameraTrajectory`.
    """
    if isinstance(camera, CameraTrajectory):
        return camera.resized(size)
    if isinstance(camera, Tensor | np.ndarray | list | tuple):
        return CameraTrajectory(validate_poses(camera), default_intrinsics(*size), size)
    expected = "a preset, a move, a camera file, a trajectory, or poses [frames, 3, 4]"
    # an empty name is an unknown one
    spec = "" if camera == "" else str(arguments.path("camera", camera, expected, kind=CameraError))
    file, _, camera = spec.partition(".json#")
    if camera:
        return load_trajectory(f"{file}.json", num_frames=num_frames, size=size, camera=camera)
    if spec.endswith(".json"):
        return load_trajectory(spec, num_frames=num_frames, size=size)
    return named_trajectory(spec, num_frames, size)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CameraError(
            f"cannot read camera file {path}: {error.strerror}; give the path of a .json file"
        ) from error
    except ValueError as error:
        raise CameraError(f"{path.name} is not valid JSON ({error}): {_EXPECTED}") from error


def _check_count(path: Path, found: int, wanted: int) -> None:
    if found != wanted:
        advice = "add poses" if found < wanted else "leave some out"
        raise CameraError(
            f"{path.name} has {found} poses, the video has {wanted} frames; a trajectory needs "
            f"exactly one pose per frame: {advice}"
        )


def _numbers(path: Path, name: str, value: Any, shapes: tuple[str, ...]) -> Tensor:
    """A nested list of numbers as float64."""
    try:
        return torch.tensor(value, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CameraError(
            f"{path.name}: {name} must be numbers of shape {' or '.join(shapes)}; {error}"
        ) from error


def _own_trajectory(
    path: Path, content: dict[str, Any], num_frames: int, size: tuple[int, int]
) -> CameraTrajectory:
    if content.get("version") != VERSION:
        raise CameraError(
            f"{path.name} has version {content.get('version')!r}, this engine reads {VERSION}; "
            "write it again with this version's save_trajectory"
        )
    convention = content.get("convention", CONVENTION)
    if convention != CONVENTION:
        raise CameraError(
            f"{path.name} is in convention {convention!r}, expected {CONVENTION!r}; convert it"
        )
    unknown = [name for name in content if name not in _FIELDS]
    if unknown:
        raise CameraError(
            f"{path.name} has {unknown[0]!r}, which this format does not know: its fields are "
            f"{', '.join(_FIELDS)}. A lens is a pinhole's: take distortion out of the frames first"
        )
    poses = _numbers(path, "poses", content.get("poses"), ("[frames, 3, 4]",))
    if poses.ndim == 3:
        _check_count(path, len(poses), num_frames)
    poses = validate_poses(poses, name=f"{path.name}: poses")
    if content.get("intrinsics") is None:
        return CameraTrajectory(poses, default_intrinsics(*size), size, path.name)
    own_size = content.get("size")
    if (
        not isinstance(own_size, list)
        or len(own_size) != 2
        or not all(isinstance(pixels, int) for pixels in own_size)
    ):
        raise CameraError(
            f"{path.name}: size must be [height, width], the pixels that the intrinsics refer to, "
            f"got {own_size!r}"
        )
    intrinsics = _numbers(path, "intrinsics", content["intrinsics"], ("[3, 3]", "[frames, 3, 3]"))
    own = CameraTrajectory(poses, intrinsics, (own_size[0], own_size[1]), path.name)
    return own.resized(size)


def _recammaster_trajectory(
    path: Path,
    content: dict[str, Any],
    num_frames: int,
    size: tuple[int, int],
    camera: str | None,
) -> CameraTrajectory:
    names = _recammaster_cameras(path, content)
    if camera is None:
        raise CameraError(
            f"{path.name} holds {len(names)} cameras ({', '.join(names)}); "
            f"name one, such as {path.name}#{names[0]}"
        )
    if camera not in names:
        raise CameraError(
            f"{path.name} has no camera {camera!r}; nearest: {nearest_names(camera, names)}"
        )
    _check_count(path, len(content), num_frames)
    poses = _world_poses(path, content, camera)
    name = f"{path.name}#{camera}"
    poses = validate_poses(relative_to(poses, poses[0]), name=name)
    return CameraTrajectory(poses, default_intrinsics(*size), size, name)


def _recammaster_cameras(path: Path, content: dict[str, Any]) -> list[str]:
    first = content["frame0"]
    if not isinstance(first, dict) or not first:
        raise CameraError(f"{path.name}: frame0 must map camera names to matrices; {_EXPECTED}")
    return list(first)


def _world_poses(path: Path, content: dict[str, Any], camera: str) -> Tensor:
    """One camera in the file's own, left-handed world: [T, 3, 4], float64."""
    matrices = []
    for index in range(len(content)):
        frame = content.get(f"frame{index}")
        text = frame.get(camera) if isinstance(frame, dict) else None
        matrices.append(_parse_matrix(path, f"frame{index} of {camera}", text))
    return _opencv_poses(torch.stack(matrices))


def _parse_matrix(path: Path, where: str, text: Any) -> Tensor:
    """The text "[r r r 0] [r r r 0] [r r r 0] [x y z 1] " as [4, 4] float64."""
    rows = re.findall(r"\[([^\]]*)\]", text) if isinstance(text, str) else []
    try:
        values = [[float(number) for number in row.split()] for row in rows]
    except ValueError:
        values = []
    if [len(row) for row in values] != [4, 4, 4, 4]:
        raise CameraError(
            f'{path.name}: {where} must be text "[r r r 0] [r r r 0] [r r r 0] [x y z 1]", '
            f"got {text!r}"
        )
    if [row[3] for row in values] != [0.0, 0.0, 0.0, 1.0]:
        raise CameraError(
            f"{path.name}: {where} must have the last column 0 0 0 1 (row vectors, translation in "
            f"the last row), got {[row[3] for row in values]}; transpose the matrix?"
        )
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _opencv_poses(unreal: Tensor) -> Tensor:
    """Unreal row-vector matrices [T, 4, 4] in cm as [T, 3, 4] with OpenCV camera axes, metres.

    Unreal's camera axes are x forward, y right, z up. The world keeps Unreal's left-handed axes
    (determinant -1), which cancels in poses relative to a frame (BASE_MODELS 2.4).
    """
    poses = unreal.transpose(1, 2)[:, :3, [1, 2, 0, 3]]
    poses[:, :, 1] *= -1
    poses[:, :, 3] /= _CENTIMETRES
    return poses
