"""Cameras as users give them: presets, moves, files of many formats, poses in memory.

A file is written `PATH`, `PATH#CAMERA` where it holds several, and either with options behind a
question mark: `transforms.json?relative&scale=0.01`. `formats` reads what is written; here it is
brought to camera-to-world, OpenCV axes and metres, one pose a frame, and looked at.

Our own format is poses as the engine uses them:

    {"format": "mv2v-camera", "version": 1,
     "convention": "opencv camera-to-world, metres",
     "size": [height, width],            the image that the intrinsics refer to
     "intrinsics": [[fx, 0, cx], ...],   optional, 3x3 or one per frame; 24 mm lens if absent
     "poses": [[[r, r, r, x], [r, r, r, y], [r, r, r, z]], ...]}

N poses of a file, T frames.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mv2v_engine import arguments
from mv2v_engine.camera.formats import (
    CONVENTION,
    FORMAT,
    RECAMMASTER,
    TUM,
    VERSION,
    Format,
    own_recording,
    recammaster_cameras,
    recammaster_world,
    recognised,
)
from mv2v_engine.camera.options import CameraOptions
from mv2v_engine.camera.plausibility import check_plausible
from mv2v_engine.camera.poses import (
    default_intrinsics,
    invert,
    relative_to,
    require_finite_poses,
    require_rotations,
    validate_poses,
)
from mv2v_engine.camera.reading import (
    EXPECTED,
    MAX_FILE_BYTES,
    CameraFile,
    Lens,
    Recording,
    printable,
)
from mv2v_engine.camera.resampling import even_places, resampled_poses, resampled_values
from mv2v_engine.camera.trajectories import (
    CameraTrajectory,
    covering_intrinsics,
    is_move,
    named_trajectory,
    require_pinhole,
)
from mv2v_engine.errors import CameraError
from mv2v_engine.files import by_number, save_json

# what a caller may give as a camera: see `resolve_camera`
Camera: TypeAlias = (
    "str | os.PathLike[str] | CameraTrajectory | Tensor | np.ndarray[Any, Any] | Sequence[Any]"
)
# the files of a folder that are looked for; the first one there is taken
_IN_FOLDER = ("images.bin", "images.txt", "transforms.json")
_MAX_ASPECT = 16.0  # the most of an image whose pixels are taken to be square
# how a path that looks wrong is mended, or had all the same
_ADVICE = (
    "give options behind the file's name, as FILE?relative&scale=0.01; unchecked takes it as it is"
)
_POSES_ADVICE = "give poses as such, or a CameraTrajectory, which is taken as it is"
_JSON_ADVICE = (
    'give poses as such, or send it as a file with options, as {"spec": "a.json?relative", '
    '"files": {"a.json": ...}}; unchecked takes it as it is'
)


@dataclass(frozen=True)
class _Spec:
    """A camera file as it is asked for."""

    place: str
    camera: str | None
    options: str

    @property
    def name(self) -> str:
        """How errors and reports call it: without the folders above it."""
        camera = "" if self.camera is None else f"#{self.camera}"
        options = f"?{self.options}" if self.options else ""
        return printable(f"{Path(self.place).name or self.place}{camera}{options}")


def _split(text: str, exists: Callable[[str], bool]) -> _Spec | None:
    """The file that a text begins with, of the longest name there is; None if there is none.

    So a question mark or number sign in a file's own name is one.
    """
    signs = [at for at, letter in enumerate(text) if at and letter in "?#"]
    for end in (len(text), *reversed(signs)):
        if exists(text[:end]):
            before, _, options = text[end:].partition("?")
            return _Spec(text[:end], before[1:] if before else None, options)
    return None


def resolve_camera(
    camera: Camera,
    num_frames: int | None,
    size: tuple[int, int],
    *,
    is_source: bool = False,
    check: bool = True,
) -> CameraTrajectory:
    """A camera as a user gives it, seen at an image size (height, width).

    Args:
        camera: a preset, a `kind:amount` move, several of them with plus signs; a camera file with
            its options; a trajectory; or poses [T, 3, 4] or [T, 4, 4], which are seen through the
            default lens.
        num_frames: of the video, one pose each; None takes as many as there are.
        is_source: it is the source's own path, which may begin anywhere.
        check: whether files and poses are refused that look wrong (`plausibility`).

    Raises:
        CameraError: none of these, unreadable, another number of poses than `num_frames`, or poses
            that are no rigid matrices.
    """
    if isinstance(camera, CameraTrajectory):
        _require_count(camera, num_frames, is_source)
        return camera.resized(size)
    if isinstance(camera, Tensor | np.ndarray | list | tuple):
        trajectory = CameraTrajectory(validate_poses(camera), default_intrinsics(*size), size)
        _require_count(trajectory, num_frames, is_source)
        if check:
            _check(trajectory, is_source=is_source, advice=_POSES_ADVICE)
        return trajectory
    expected = "a preset, a move, a camera file, a trajectory, or poses [frames, 3, 4]"
    given: Any = camera
    # an empty name is an unknown one
    if given != "":
        arguments.path("camera", given, expected, kind=CameraError)
    # taken as it is written: ./static is a file, static a move
    text: str = os.fspath(given)
    if not is_move(text):
        spec = _split(text, os.path.exists)
        if spec is not None:
            options = CameraOptions.parsed(spec.options, Path(spec.place).name)
            return _read_spec(
                spec, _open(Path(spec.place)), options, num_frames, size, is_source, check
            )
        place = re.split(r"[?#]", text, maxsplit=1)[0]
        if os.sep in place or re.search(r"\.[A-Za-z]\w*$", place):
            raise CameraError(
                f"cannot read camera file {place}: there is none; give the path of a camera file"
            )
    return named_trajectory(text, num_frames or 2, size)


def _require_count(trajectory: CameraTrajectory, num_frames: int | None, is_source: bool) -> None:
    """Refuse poses in memory that are not one a frame."""
    found = trajectory.num_frames
    if num_frames is not None and found != num_frames:
        poses = "pose" if found == 1 else "poses"
        whose = "the source's camera" if is_source else "the camera"
        still = ", or 'static' for a camera that stays" if found == 1 else ""
        raise CameraError(
            f"{whose} has {found} {poses}, a window of this model has {num_frames} frames: give "
            f"one pose a frame{still}"
        )


def given_trajectory(
    text: str, files: Mapping[str, bytes], *, num_frames: int, size: tuple[int, int]
) -> CameraTrajectory:
    """A camera of files that came with a request: nothing of this machine's is opened.

    Args:
        text: as a command line has it, its file one of `files`.
        files: bytes by their names; COLMAP's cameras file is looked for among them.

    Raises:
        CameraError: as `resolve_camera`.
    """
    spec = _split(text, files.__contains__)
    if spec is None:
        raise CameraError(
            f"there is no file {re.split('[?#]', text, maxsplit=1)[0][:100]!r} among the files "
            f"given: {', '.join(files)[:200] or 'none'}"
        )
    options = CameraOptions.parsed(spec.options, spec.place)
    data = files[spec.place]
    _check_bytes(spec.place, len(data))
    file = CameraFile(spec.place, data, files.get)
    return _read_spec(spec, file, options, num_frames, size, False, True)


def parse_trajectory(
    content: Any,
    *,
    num_frames: int,
    size: tuple[int, int],
    name: str = "custom",
    check: bool = False,
) -> CameraTrajectory:
    """A camera path from our own format's JSON, as it comes without a file; see the module.

    `format`, `version` and `convention` may be left out. check: as for `resolve_camera`.

    Raises:
        CameraError: as `resolve_camera`.
    """
    if not isinstance(content, dict) or content.get("format", FORMAT) != FORMAT:
        raise CameraError(f"a trajectory is an object of format {FORMAT!r}, with poses")
    file = CameraFile("the trajectory", b"")  # what an error calls it
    recording = own_recording(file, {"version": VERSION} | content)
    found = _finished(recording, file.name, CameraOptions(), num_frames, size, [])
    found = replace(found, name=name)
    if check:
        _check(found, is_source=False, advice=_JSON_ADVICE)
    return found


def load_rig(path: Path | str) -> dict[str, Tensor]:
    """Every camera of a ReCamMaster file in one world: poses [T, 3, 4] by the camera's name.

    They are relative to the first camera's first frame, so poses of two cameras compare.

    Raises:
        CameraError: unreadable file, another format, or matrices that are no poses.
    """
    file = _open(Path(path))
    if recognised(file) is not RECAMMASTER:
        raise CameraError(f"{file.name} holds no cameras of several videos: {EXPECTED}")
    world = {name: recammaster_world(file, name) for name in recammaster_cameras(file)}
    reference = next(iter(world.values()))[0]
    return {
        name: validate_poses(relative_to(poses, reference), name=f"{file.name}#{name}")
        for name, poses in world.items()
    }


def save_trajectory(path: Path | str, trajectory: CameraTrajectory) -> None:
    """Write a trajectory in our own format, whole or not at all.

    Raises:
        StorageError: the place cannot be written.
    """
    save_json(Path(path), trajectory_json(trajectory))


def trajectory_json(trajectory: CameraTrajectory) -> dict[str, Any]:
    """A trajectory in our own format."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "convention": CONVENTION,
        "size": list(trajectory.size),
        "intrinsics": trajectory.intrinsics.tolist(),
        "poses": trajectory.poses.tolist(),
    }


def _open(path: Path) -> CameraFile:
    if os.path.isdir(path):
        inside = next((name for name in _IN_FOLDER if os.path.isfile(path / name)), None)
        if inside is None:
            raise CameraError(
                f"cannot read camera file {path}: it is a folder without "
                f"{', '.join(_IN_FOLDER)}; give the path of a camera file"
            )
        path = path / inside

    def beside(name: str) -> bytes | None:
        other = path.parent / name
        return _bytes(other) if os.path.isfile(other) else None

    return CameraFile(path.name, _bytes(path), beside)


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise CameraError(
            f"cannot read camera file {path}: {error.strerror}; give the path of a camera file"
        ) from error
    _check_bytes(path.name, len(data))
    return data


def _check_bytes(name: str, count: int) -> None:
    if count > MAX_FILE_BYTES:
        raise CameraError(
            f"{name} has more than {MAX_FILE_BYTES >> 20} MiB, which no camera's path needs; leave "
            "out what is no pose"
        )


def _read_spec(
    spec: _Spec,
    file: CameraFile,
    options: CameraOptions,
    num_frames: int | None,
    size: tuple[int, int],
    is_source: bool,
    check: bool,
) -> CameraTrajectory:
    """A file's path as it is asked for."""
    form = recognised(file)
    if form.axes is None and (options.axes or options.direction):
        given = "axes" if options.axes else "direction"
        raise file.refused(f" is {form.name}, whose {given} are fixed; leave the option out")
    if options.quaternion != "xyzw" and form is not TUM:
        raise file.refused(
            f" is {form.name}; the option quaternion is of TUM's text alone: leave it out"
        )
    if spec.camera is not None and form is not RECAMMASTER:
        raise file.refused(
            f" holds one camera without a name, got {spec.camera!r}; leave the name out"
        )
    recording = form.read(file, spec.camera, options.quaternion)
    notes = [f"it was read as {form.name}{_convention(form, options)}"]
    recording = _converted(recording, form, options)
    trajectory = _finished(recording, file.name, options, num_frames, size, notes)
    trajectory = replace(trajectory, name=spec.name)
    if check and not options.unchecked:
        _check(trajectory, is_source=is_source, advice=_ADVICE)
    return trajectory


def _check(trajectory: CameraTrajectory, *, is_source: bool, advice: str) -> None:
    check_plausible(trajectory.poses, trajectory.name, is_source=is_source, advice=advice)


def _convention(form: Format, options: CameraOptions) -> str:
    if form is RECAMMASTER:
        return " (Unreal's axes, centimetres, relative to the camera's own first frame)"
    if form.axes is None:
        return ""
    axes = {"opencv": "OpenCV", "opengl": "OpenGL"}[options.axes or str(form.axes)]
    direction = options.direction or form.direction
    words = {"c2w": "camera-to-world", "w2c": "world-to-camera"}[str(direction)]
    asked = ", as asked" if options.axes or options.direction else ""
    return f" ({words}, {axes} axes{asked})"


def _converted(recording: Recording, form: Format, options: CameraOptions) -> Recording:
    """Poses as camera-to-world in OpenCV axes, in the file's own world and unit."""
    poses, name = recording.poses, recording.name
    require_finite_poses(poses, name=name)
    require_rotations(poses[..., :3], name=name)
    if (options.direction or form.direction) == "w2c":
        poses = invert(poses)
    if (options.axes or form.axes) == "opengl":
        poses = poses * poses.new_tensor([1.0, -1.0, -1.0, 1.0])
    return replace(recording, poses=poses)


def _finished(
    recording: Recording,
    file: str,
    options: CameraOptions,
    num_frames: int | None,
    size: tuple[int, int],
    notes: list[str],
) -> CameraTrajectory:
    """The path as it is asked for, of poses in camera-to-world and OpenCV axes.

    notes: what was changed before this.
    """
    require_finite_poses(recording.poses, name=recording.name)
    recording = _with_asked_lens(recording, file, options, notes)
    recording = _chosen(_ordered(recording, file, options, notes), file, options, notes)
    poses, lens = recording.poses, recording.lens
    if options.scale != 1:
        poses = torch.cat([poses[..., :3], poses[..., 3:] * options.scale], dim=-1)
        notes.append(f"its places were multiplied by {options.scale:g}")
    if options.relative:
        require_rotations(poses[..., :3], name=recording.name)
        poses = relative_to(poses, poses[0])
        notes.append("its poses were taken relative to its first")
    places = None
    if num_frames is not None and len(poses) != num_frames:
        if not options.resample:
            found = len(poses)
            advice = "add poses" if found < num_frames else "leave some out"
            raise CameraError(
                f"{file} has {found} pose{'s' * (found != 1)}, the video has {num_frames} frames; "
                f"a trajectory needs exactly one pose per frame: {advice}, take some (frames=A:B), "
                "or resample it (resample)"
            )
        places = even_places(num_frames, len(poses), recording.times)
        # before it is mixed with others: a frame keeps its number in an error
        validate_poses(poses, name=recording.name)
        notes.append(
            f"its {len(poses)} pose{'s were' if len(poses) > 1 else ' was'} resampled to "
            f"{num_frames}, evenly {'in time' if recording.times is not None else 'by number'}"
        )
        poses = resampled_poses(poses, places)
    checked = validate_poses(poses, name=recording.name)
    intrinsics = default_intrinsics(*size)
    if lens is not None:
        intrinsics = _fitted_lens(lens, file, places, size, notes)
    if options.unchecked:
        notes.append("whether it is plausible was not checked, as asked")
    return CameraTrajectory(checked, intrinsics, size, file, tuple(notes))


def _with_asked_lens(
    recording: Recording, file: str, options: CameraOptions, notes: list[str]
) -> Recording:
    """Leave the lens out where the default one is asked for, or refuse what cannot be taken."""
    if options.lens == "default":
        if recording.lens is not None or recording.problem:
            notes.append("its lens was not taken, but the default one")
        return replace(recording, lens=None, problem=None)
    if recording.problem:
        raise recording.problem
    if recording.lens is not None:
        shape, count = tuple(recording.lens.intrinsics.shape), len(recording.poses)
        if shape not in ((3, 3), (count, 3, 3)):
            raise CameraError(
                f"{file}: intrinsics must have shape [3, 3] or [{count}, 3, 3], got {list(shape)}"
            )
    return recording


def _ordered(
    recording: Recording, file: str, options: CameraOptions, notes: list[str]
) -> Recording:
    """Poses in the order of their times, or else of their names."""
    count = len(recording.poses)
    if recording.times is not None:
        require_finite_poses(recording.times[:, None], name=f"{file}: times")
        order = recording.times.argsort(stable=True)
        times = recording.times[order]
        if not math.isfinite(float(times[-1] - times[0])):
            raise CameraError(f"{file} has times from {float(times[0]):g} to {float(times[-1]):g}")
        again = (times[1:] == times[:-1]).nonzero()
        if len(again):
            stamp = float(times[int(again[0])])
            raise CameraError(f"{file} has two poses of the time {stamp:.17g}; leave one out")
        indices, words = order.tolist(), "times"
    elif recording.names is not None and options.order == "name":
        names = recording.names
        indices, words = sorted(range(count), key=lambda i: by_number(names[i])), "names"
        twice = next((a for a, b in pairwise(indices) if names[a] == names[b]), None)
        if twice is not None:
            raise CameraError(
                f"{file} has two poses named {names[twice][:100]!r}, so that their names give no "
                "order; leave one out, or take them as they come (order=file)"
            )
    else:
        return recording
    if indices == list(range(count)):
        return recording
    first, last = indices[0], indices[-1]
    ends = (
        f", {printable(recording.names[first][:60])} to {printable(recording.names[last][:60])}"
        if recording.names is not None
        else ""
    )
    notes.append(f"its frames were taken in the order of their {words}{ends}")
    return _picked(recording, torch.tensor(indices, dtype=torch.int64, device="cpu"))


def _chosen(recording: Recording, file: str, options: CameraOptions, notes: list[str]) -> Recording:
    if options.frames is None:
        return recording
    count = len(recording.poses)
    bounds = [int(part) if part else None for part in options.frames.split(":")]
    indices = list(range(count)[slice(*bounds)])
    if not indices:
        raise CameraError(f"{file} has {count} poses, and frames={options.frames} are none of them")
    notes.append(f"of its {count} poses {len(indices)} were taken (frames={options.frames})")
    return _picked(recording, torch.tensor(indices, dtype=torch.int64, device="cpu"))


def _picked(recording: Recording, indices: Tensor) -> Recording:
    lens, names = recording.lens, recording.names
    if lens is not None and lens.intrinsics.ndim == 3 and len(lens.intrinsics) > 1:
        lens = replace(lens, intrinsics=lens.intrinsics[indices])
    return replace(
        recording,
        poses=recording.poses[indices],
        lens=lens,
        names=None if names is None else tuple(names[index] for index in indices.tolist()),
        times=None if recording.times is None else recording.times[indices],
    )


def _fitted_lens(
    lens: Lens, file: str, places: Tensor | None, size: tuple[int, int], notes: list[str]
) -> Tensor:
    """Intrinsics of the video's frames, whose pixels are square if the file's are."""
    intrinsics, own_size = lens.intrinsics, lens.size
    image: tuple[float, float]
    if own_size is None:
        intrinsics, image = _square_pixels(intrinsics, file, size)
    else:
        image = own_size
    if min(image) < 1:
        raise CameraError(f"{file}: size must be positive pixels, got {list(image)}")
    try:
        require_pinhole(intrinsics, len(intrinsics))
    except CameraError as error:
        raise CameraError(f"{file}: {error}") from error
    shapes = [image[1] / image[0], size[1] / size[0]]
    if max(shapes) / min(shapes) > 1.01:
        kind = f"images of {image[1]:g}x{image[0]:g}" if own_size else f"images {shapes[0]:.3g}:1"
        notes.append(f"its lens is that of {kind}, whose middle was taken")
    intrinsics = covering_intrinsics(intrinsics, image, size)
    if places is not None and intrinsics.ndim == 3:
        intrinsics = resampled_values(intrinsics, places)
    if intrinsics.ndim == 3 and len(intrinsics) > 1:
        focal = intrinsics[:, 0, 0] / size[1]
        notes.append(
            f"its lens differs over time, from {float(focal[0]):.4g} to {float(focal[-1]):.4g} of "
            "the image's width"
        )
    return intrinsics


def _square_pixels(
    shares: Tensor, file: str, size: tuple[int, int]
) -> tuple[Tensor, tuple[float, float]]:
    """Intrinsics in pixels, and the image, of shares of an image whose size nobody says.

    Its pixels are square, so that both focal lengths tell its shape; one alone tells nothing, and
    it is of the video's shape then.
    """
    focal = shares[..., 0, 0].flatten()[0], shares[..., 1, 1].flatten()[0]
    aspect = float(focal[1] / focal[0])  # width over height
    if aspect != aspect:
        aspect = size[1] / size[0]
        shares = shares.clone()
        shares[..., 1, 1] = shares[..., 0, 0] * aspect
    if not 1 / _MAX_ASPECT <= aspect <= _MAX_ASPECT:
        raise CameraError(
            f"{file}: its focal lengths {float(focal[0]):g} and {float(focal[1]):g} should be "
            "shares of the image's width and height, and fit no image of square pixels; are they "
            "pixels?"
        )
    image = (size[1] / aspect, float(size[1]))
    scale = shares.new_tensor([image[1], image[0], 1.0])
    return shares * scale[:, None], image
