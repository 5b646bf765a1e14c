"""One path comes back from every format, with every option; what is none is one clear line."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mv2v_engine.camera.files import resolve_camera
from mv2v_engine.camera.poses import default_intrinsics, normalised_intrinsics
from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.errors import CameraError
from tests.camera import written
from tests.camera.written import SIZE, WRITERS, Array, N, path, turned

POSES = path()


def read(spec: Any, count: int | None = N, **options: Any) -> CameraTrajectory:
    return resolve_camera(str(spec), count, SIZE, **options)


def same(trajectory: CameraTrajectory, poses: Array, atol: float = 2e-6) -> bool:
    return bool(np.allclose(trajectory.poses.numpy(), poses[:, :3], rtol=0, atol=atol))


def refused(spec: Any, count: int | None = N) -> str:
    with pytest.raises(CameraError) as caught:
        read(spec, count)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 900
    return message


Made = Callable[[Path], Path]


def saved(name: str, content: str | bytes) -> Made:
    def make(folder: Path) -> Path:
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)
        return folder / name

    return make


def npy(poses: Array) -> Made:
    return lambda folder: written.npy(folder / "a.npy", poses)


def nerf(poses: Array = POSES, **about: Any) -> Made:
    return lambda folder: written.nerf(folder / "a.json", poses, **about)


def tum(old: str, new: str) -> Made:
    return lambda folder: changed(written.tum(folder / "a.txt", POSES), old, new)


def realestate(lens: tuple[float, ...]) -> Made:
    return lambda folder: written.realestate(folder / "a.txt", POSES, lens)


def colmap(camera: Any) -> Made:
    """Its text where the camera is one, else its binary form."""
    if isinstance(camera, str):
        return lambda folder: written.colmap_text(folder / "images.txt", POSES, camera)
    return lambda folder: written.colmap_binary(folder / "images.bin", POSES, camera)


def changed(place: Path, old: str, new: str, count: int = 1) -> Path:
    text = place.read_text()
    assert old in text
    place.write_text(text.replace(old, new, count))
    return place


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_path_that_was_written(tmp_path: Path, kind: str) -> None:
    name, write = WRITERS[kind]
    found = read(write(tmp_path / name, POSES))
    assert same(found, POSES) and found.name == name
    assert found.notes[0].startswith("it was read as ")


@pytest.mark.parametrize("kind", sorted(set(WRITERS) - {"own"}))
def test_the_other_axes_and_direction(tmp_path: Path, kind: str) -> None:
    """A file written against its format's habit is read with the options that say so."""
    name, write = WRITERS[kind]
    flip = np.diag([1.0, -1, -1, 1])
    axes = "opencv" if kind == "nerf" else "opengl"
    assert same(read(f"{write(tmp_path / name, POSES @ flip)}?axes={axes}"), POSES)
    backwards = np.linalg.inv(POSES)
    if kind == "nerf":
        # a world-to-camera matrix whose camera has OpenGL's axes
        backwards = flip @ backwards @ flip
    habit = "w2c" if kind.startswith(("colmap", "real")) else "c2w"
    asked = {"w2c": "camera-to-world", "c2w": "world-to-camera"}[habit]
    found = read(f"{write(tmp_path / name, backwards)}?direction={asked}")
    assert (
        same(found, POSES) and f"{asked}, Open" in found.notes[0] and "as asked" in found.notes[0]
    )


@pytest.mark.parametrize("kind", WRITERS)
def test_absolute_poses_in_centimetres(tmp_path: Path, kind: str) -> None:
    """A world's poses, 36 m away and turned by 140 degrees, in centimetres."""
    name, write = WRITERS[kind]
    world = np.eye(4)
    world[:3, :3], world[:3, 3] = turned((1, 2, 0.5), 140), (3000.0, 1500.0, -1300.0)
    poses = POSES.copy()
    poses[:, :3, 3] *= 100
    file = write(tmp_path / name, world @ poses)
    message = refused(file)
    assert "looks wrong: its first pose lies 3.6e+03 metres" in message and "140 degrees" in message
    assert "relative" in message and "scale=0.01" in message
    found = read(f"{file}?relative&scale=0.01")
    assert same(found, POSES, atol=1e-4) and "?relative&scale=0.01" in found.name
    assert found.notes[1:3] == (
        "its places were multiplied by 0.01",
        "its poses were taken relative to its first",
    )
    assert (
        read(f"{file}?unchecked").notes[-1] == "whether it is plausible was not checked, as asked"
    )


@pytest.mark.parametrize("kind", WRITERS)
def test_resampling_keeps_the_path(tmp_path: Path, kind: str) -> None:
    name, write = WRITERS[kind]
    poses = path(81)
    file = write(tmp_path / name, poses)
    assert "has 81 poses, the video has 17 frames" in refused(file, 17)
    found = read(f"{file}?resample", 17)
    assert same(found, poses[::5], atol=1e-5)
    assert "its 81 poses were resampled to 17" in found.notes[1]
    more = read(f"{file}?resample", 161)
    np.testing.assert_allclose(more.poses[::2], poses[:, :3], atol=1e-5)


def test_resampling_goes_evenly_in_time(tmp_path: Path) -> None:
    times = np.array([0.0, 1.0, 4.0])
    poses = np.tile(np.eye(4), (3, 1, 1))
    poses[:, 0, 3] = (0.0, 1.0, 1.3)
    poses[1:, :3, :3] = turned((0, 1, 0), 20)
    file = written.tum(tmp_path / "t.txt", poses, times + 1.7e9)
    found = read(f"{file}?resample", 9)
    assert found.poses[:, 0, 3].tolist() == pytest.approx(
        [0, 0.5, 1, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3], abs=1e-5
    )
    yaw = [math.degrees(math.atan2(p[0, 2], p[2, 2])) for p in found.poses.tolist() and found.poses]
    assert yaw == pytest.approx([0, 10, 20, *[20] * 6], abs=1e-3)
    assert "evenly in time" in found.notes[-1]


def test_one_pose_is_held(tmp_path: Path) -> None:
    file = written.npy(tmp_path / "one.npy", POSES[:1])
    assert "has 1 pose, the video has 6 frames" in refused(file)
    found = read(f"{file}?resample")
    assert same(found, np.repeat(POSES[:1], N, 0)) and "1 pose was resampled to 6" in found.notes[1]


def test_some_of_the_poses(tmp_path: Path) -> None:
    poses = path(20)
    file = written.npy(tmp_path / "p.npy", poses)
    assert same(read(f"{file}?frames=2:8"), poses[2:8])
    assert same(read(f"{file}?frames=-6:"), poses[-6:])
    found = read(f"{file}?frames=0:18:3")
    assert same(found, poses[:18:3]) and "of its 20 poses 6 were taken" in found.notes[1]
    assert "are none of them" in refused(f"{file}?frames=30:40")
    assert "frames must be FIRST:STOP" in refused(f"{file}?frames=3")


def test_names_give_the_order(tmp_path: Path) -> None:
    file = written.nerf(tmp_path / "t.json", path(12))
    content = json.loads(file.read_text())
    for i, frame in enumerate(content["frames"]):
        frame["file_path"] = f"./images/frame{i}"  # 10 comes after 9, not after 1
    mixed = [content["frames"][i] for i in (7, 0, 11, 2, 10, 1, 5, 3, 9, 4, 8, 6)]
    file.write_text(json.dumps({"frames": mixed}))
    found = read(file, 12)
    assert same(found, path(12))
    assert found.notes[1] == (
        "its frames were taken in the order of their names, ./images/frame0 to ./images/frame11"
    )
    assert not same(read(f"{file}?order=file", 12), path(12))
    mixed[3]["file_path"] = mixed[4]["file_path"]
    file.write_text(json.dumps({"frames": mixed}))
    assert "two poses named './images/frame10'" in refused(file, 12)
    read(f"{file}?order=file", 12)


def test_times_give_the_order(tmp_path: Path) -> None:
    file = written.tum(tmp_path / "t.txt", POSES)
    rows = file.read_text().splitlines()
    file.write_text("\n".join([rows[0], *reversed(rows[1:])]))
    found = read(file)
    assert same(found, POSES) and "in the order of their times" in found.notes[1]
    file.write_text("\n".join([*rows, rows[-1]]))
    assert "two poses of the time" in refused(file, 7)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", "utf-16"])
def test_marks_line_ends_and_endings(tmp_path: Path, kind: str, mark: Any) -> None:
    name, write = WRITERS[kind]
    file = write(tmp_path / name, POSES)
    upper = tmp_path / "UPPER" / name.upper()
    upper.parent.mkdir()
    data = file.read_bytes()
    if name.endswith(("txt", "json")):
        text = data.decode().replace("\n", "\r\n")
        data = text.encode(mark) if isinstance(mark, str) else mark + text.encode()
    upper.write_bytes(data)
    assert same(read(upper), POSES)


def test_a_folder_of_colmaps(tmp_path: Path) -> None:
    folder = tmp_path / "sparse" / "0"
    folder.mkdir(parents=True)
    assert "is a folder without images.bin" in refused(folder)
    written.colmap_text(folder / "images.txt", POSES, "1 SIMPLE_PINHOLE 320 192 200 160 96")
    assert same(read(folder), POSES)
    # the same with images that have no line of points
    text = (folder / "images.txt").read_text().splitlines()
    (folder / "images.txt").write_text("\n".join(row for row in text if row.endswith(".jpg")))
    assert same(read(folder / "images.txt"), POSES)


# --- lenses ---


def shares(trajectory: CameraTrajectory) -> Any:
    return normalised_intrinsics(trajectory.intrinsics, SIZE).numpy()


ANGLE = 2 * math.atan(0.5 / 1.2)  # a focal length of 1.2 widths


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (nerf(w=320, h=192, fl_x=384.0), (1.2, 2, 0, 0)),
        (
            nerf(w=320, h=192, fl_x=384, fl_y=400, cx=168, cy=90),
            (1.2, 400 / 192, 8 / 320, -6 / 192),
        ),
        (nerf(w=320, h=192, camera_angle_x=ANGLE), (1.2, 2, 0, 0)),
        (nerf(camera_angle_x=ANGLE), (1.2, 2, 0, 0)),
        (nerf(w=320, h=192, fl_x=384, k1=0, p2=0.0, camera_model="OPENCV"), (1.2, 2, 0, 0)),
        # a square image, of which the video's shape shows the middle
        (nerf(w=800, h=800, fl_x=960), (1.2, 2, 0, 0)),
        (realestate((1.2, 2, 0.51, 0.47, 0, 0)), (1.2, 2, 0.01, -0.03)),
        # 16:9, cut at both sides to 5:3
        (realestate((0.9, 1.6, 0.5, 0.5, 0, 0)), (0.96, 1.6, 0, 0)),
        (colmap("1 PINHOLE 320 192 384 400 168 90"), (1.2, 400 / 192, 8 / 320, -6 / 192)),
        (colmap("1 SIMPLE_RADIAL 320 192 384 160 96 0"), (1.2, 2, 0, 0)),
        (colmap((0, 320, 192, (384, 160, 96))), (1.2, 2, 0, 0)),
        (colmap((4, 320, 192, (384, 384, 160, 96, 0, 0, 0, 0))), (1.2, 2, 0, 0)),
    ],
    ids=["fl_x", "all", "angle", "angle-alone", "nought", "square", "re10k", "re10k-16:9",
         "colmap", "colmap-radial-0", "colmap-bin", "colmap-bin-opencv-0"],
)  # fmt: skip
def test_lenses_travel(tmp_path: Path, write: Made, expected: Any) -> None:
    file = write(tmp_path)
    found = read(file)
    np.testing.assert_allclose(shares(found), expected, rtol=0, atol=1e-5)
    assert same(found, POSES)
    default = read(f"{file}?lens=default")
    torch.testing.assert_close(default.intrinsics, default_intrinsics(*SIZE))
    assert "not taken, but the default one" in default.notes[-1]


def test_a_lens_that_differs_over_time(tmp_path: Path) -> None:
    file = written.realestate(tmp_path / "r.txt", POSES, (0.5, 0.5 * 160 / 96, 0.5, 0.5, 0, 0))
    rows = file.read_text().splitlines()
    for i in range(N):
        fields = rows[i + 1].split()
        fields[1:3] = [str(0.5 + i / 10), str((0.5 + i / 10) * 160 / 96)]
        rows[i + 1] = " ".join(fields)
    file.write_text("\n".join(rows))
    found = read(file)
    np.testing.assert_allclose(shares(found)[:, 0], 0.5 + np.arange(N) / 10, atol=1e-5)
    assert "its lens differs over time, from 0.5 to 1 of the image's width" in found.notes
    np.testing.assert_allclose(
        shares(read(f"{file}?resample", 11))[:, 0], 0.5 + np.arange(11) / 20, atol=1e-5
    )
    np.testing.assert_allclose(shares(read(f"{file}?frames=2:4", 2))[:, 0], [0.7, 0.8], atol=1e-5)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (nerf(w=8, h=8, fl_x=9, k1=0.1), "k1 is 0.1"),
        (nerf(camera_model="OPENCV_FISHEYE", fl_x=9), "OPENCV_FISHEYE"),
        (nerf(is_fisheye=True), "a fisheye"),
        (nerf(camera_model="EQUIRECTANGULAR"), "EQUIRECT"),
        (realestate((0.5, 0.8, 0.5, 0.5, 0.1, 0)), "0.1"),
        (colmap("1 SIMPLE_RADIAL 320 192 384 160 96 0.02"), "SIMPLE_RADIAL"),
        (colmap("1 OPENCV_FISHEYE 8 8 9 9 4 4 0 0 0 0"), "OPENCV_FISHEYE"),
        (colmap((3, 32, 32, (9, 9, 9, 0.1, 0))), "RADIAL"),
    ],
)
def test_a_lens_that_is_no_pinholes(tmp_path: Path, write: Any, words: str) -> None:
    file = write(tmp_path)
    message = refused(file)
    assert "its lens is no pinhole's" in message and words in message and "lens=default" in message
    assert same(read(f"{file}?lens=default"), POSES)


# --- what is refused ---


def mirrored() -> Array:
    poses: Array = POSES @ np.diag([1.0, -1, 1, 1])
    return poses


UNUSABLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty text": (saved("a.txt", ""), "a.txt is empty"),
    "comments alone": (saved("a.txt", "# a\n\n"), "no camera"),
    "prose": (saved("a.txt", "pan to the right"), "4 fields"),
    "empty npy": (saved("a.npy", b""), "a.npy is empty"),
    "png": (saved("a.txt", b"\x89PNG\r\n\x1a\n\0\0"), "no camera file, and no text"),
    "npz": (
        lambda p: np.savez(p / "a.npz", poses=POSES) or p / "a.npz",
        "an archive (npz or zip)",
    ),
    "object npy": (
        lambda p: np.save(p / "a.npy", np.array([{}], dtype=object)) or p / "a.npy",
        "real numbers",
    ),
    "complex npy": (npy(POSES * 1j), "real numbers"),
    "llff": (npy(np.zeros((6, 17))), "LLFF's poses_bounds.npy"),
    "npy of vectors": (npy(np.zeros((6, 3))), "must have shape"),
    "npy of none": (npy(np.zeros((0, 4, 4))), "has no poses"),
    "transposed": (npy(POSES.transpose(0, 2, 1)), "transpose"),
    "left-handed": (npy(mirrored()), "determinant -1"),
    "left-handed NeRF": (nerf(poses=mirrored()), "left-handed"),
    "scaled rotations": (npy(POSES * [3.0, 3, 3, 1]), "it is one times 3"),
    "no rotation": (npy(POSES * [1.0, 2, 1, 1]), "not orthonormal"),
    "nan": (
        npy(np.where(np.isclose(POSES, POSES[3, 0, 3]), np.nan, POSES)),
        "NaN or infinity at frame 3",
    ),
    "two lengths": (tum("1305031102.281250000", "1 2"), "line 3 holds 9 numbers, the first 8"),
    "words among numbers": (tum("1305031102.312500", "now"), "must hold numbers, got 'now000'"),
    "quaternion of another length": (
        tum(" 1.000000000", " 0.5"),
        "quaternion of frame 0 has length 0.5",
    ),
    "no quaternion": (tum(" 1.000000000", " nan"), "quaternion of frame 0 has length nan"),
    "missing matrix": (
        lambda p: changed(written.nerf(p / "a.json", POSES), "transform_matrix", "matrix"),
        "frame 0 must have a transform_matrix",
    ),
    "no frames": (saved("a.json", '{"frames": []}'), "no pos"),
    "frames of text": (
        saved("a.json", '{"frames": ["a"]}'),
        "frame 0 must have a transform_matrix",
    ),
    "focal length of no image": (nerf(fl_x=900), "no size of its images"),
    "a focal length of nought": (
        nerf(w=8, h=8, fl_x=0),
        "a.json: intrinsics must be finite with positive focal",
    ),
    "an angle of 400": (nerf(camera_angle_x=400), "radians"),
    "pixels in shares": (realestate((500, 0.5, 0.5, 0.5, 0, 0)), "are they pixels?"),
    "cameras.txt": (saved("cameras.txt", "1 PINHOLE 8 8 9 9 4 4\n"), "give images.txt"),
    "truncated images.bin": (
        lambda p: (
            (p / "images.bin").write_bytes(
                written.colmap_binary(p / "a.bin", POSES).read_bytes()[:-9]
            )
            and p / "images.bin"
        ),
        "not COLMAP's binary form, or damaged",
    ),
    "images.bin that promises": (
        saved("images.bin", struct.pack("<Q", 1 << 60)),
        "not COLMAP's binary form, or damaged",
    ),
    "cameras.bin": (
        lambda p: (
            written.colmap_binary(p / "images.bin", POSES, (0, 8, 8, (9, 4, 4)))
            and p / "cameras.bin"
        ),
        "give images.bin",
    ),
    "an unknown model": (colmap((99, 8, 8, (9, 4, 4))), "has model 99"),
    "another camera": (
        colmap("7 PINHOLE 8 8 9 9 4 4"),
        "camera 1, which the cameras file beside it lacks",
    ),
    "images.txt that breaks off": (
        lambda p: changed(written.colmap_text(p / "images.txt", POSES), " 1 frame_00003.jpg", ""),
        "must be an image, IMAGE_ID",
    ),
    "three rows of a matrix": (
        saved("a.txt", "1 0 0 0\n0 1 0 0\n0 0 1 0\n"),
        "has 3 lines of 4 numbers",
    ),
    "lenses of other frames": (
        lambda p: changed(
            written.own(p / "a.json", POSES),
            '"version": 1',
            '"version": 1, "size": [4, 4], "intrinsics": '
            + json.dumps([[[1, 0, 2], [0, 1, 2], [0, 0, 1]]] * 2),
        ).rename(p / "a.json?frames=0:6"),
        "intrinsics must have shape [3, 3] or [6, 3, 3], got [2, 3, 3]",
    ),
    "times beyond numbers": (
        lambda p: changed(
            changed(written.tum(p / "a.txt", POSES), "1305031102.250000000", "-1.7e308"),
            "1305031102.281250000",
            "1.7e308",
        ),
        "has times from -1.7e+308 to 1.7e+308",
    ),
    "a name of two lines": (saved("a\nb.txt", ""), "a?b.txt is empty"),
    "far away": (
        npy(POSES + np.eye(4)[3] * [[0], [0], [1], [0]] * 1e300),
        "lie 1e+300 metres from the origin",
    ),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_is_no_camera(tmp_path: Path, kind: str) -> None:
    make, words = UNUSABLE[kind]
    assert words in refused(make(tmp_path))


@pytest.mark.parametrize("shape", ["(9**9,)", "(99999999999,)", "(9, [)", "(-6, -4, 4)", "(((("])
def test_a_header_that_lies_allocates_nothing(tmp_path: Path, shape: str) -> None:
    file = written.npy(tmp_path / "a.npy", POSES)
    old = b"'shape': (6, 4, 4), }       "
    new = f"'shape': {shape}, }}".encode().ljust(len(old))
    assert old in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(old, new[: len(old)]))
    message = refused(file)
    assert "no npy file that can be read" in message or "is damaged: its header" in message


def test_too_many_poses(tmp_path: Path) -> None:
    rows = "0 0 0 0 0 0 0 1\n" * 200_000
    (tmp_path / "a.txt").write_text(rows)
    assert "has 200,000 poses; at most 100,000 are read" in refused(tmp_path / "a.txt")
    written.npy(tmp_path / "a.npy", np.tile(np.eye(4, dtype="f4")[None], (100_001, 1, 1)))  # type: ignore[arg-type]
    assert "has 100,001 poses" in refused(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("relativ", "no option 'relativ'; nearest: relative"),
        ("relative=yes", "relative takes no value, got 'yes'"),
        ("relative&relative", "relative twice"),
        ("scale", "scale must be a positive number"),
        ("scale=0", "scale must be a positive number"),
        ("scale=-1", "scale must be a positive number"),
        ("scale=nan", "scale must be a positive number"),
        ("scale=1e400", "scale must be a positive number"),
        ("axes=unreal", "axes must be opencv or opengl, got 'unreal'"),
        ("direction=up", "direction must be c2w or w2c, got 'up'"),
        ("lens=", "lens must be file or default, got ''"),
        ("quaternion=wxyz", "of TUM's text alone"),
        ("relative&", "no option ''"),
    ],
)
def test_options_that_there_are_not(tmp_path: Path, options: str, words: str) -> None:
    assert words in refused(f"{written.npy(tmp_path / 'a.npy', POSES)}?{options}")


def test_fixed_conventions(tmp_path: Path) -> None:
    file = written.own(tmp_path / "a.json", POSES)
    assert "whose axes are fixed" in refused(f"{file}?axes=opengl")
    assert "whose direction are fixed" in refused(f"{file}?direction=w2c")
    assert "one camera without a name, got 'cam01'" in refused(f"{file}#cam01?relative")


def test_quaternions_in_the_other_order(tmp_path: Path) -> None:
    file = written.tum(tmp_path / "t.txt", POSES)
    rows = [row.split() for row in file.read_text().splitlines()[1:]]
    other = "\n".join(" ".join([*row[:4], row[7], *row[4:7]]) for row in rows)
    file.write_text(other)
    message = refused(file)
    assert "180 degrees" in message and "quaternions in the other order" in message
    assert same(read(f"{file}?quaternion=wxyz"), POSES)


@pytest.mark.parametrize(
    ("header", "is_refused"),
    [
        ("#timestamp,p_x,p_y,p_z,q_w,q_x,q_y,q_z", True),
        ("stamp tx ty tz qw qx qy qz", True),
        ("# timestamp tx ty tz qx qy qz qw", False),
        ("stamp,x,y,z,qx,qy,qz,qw", False),
        ("# recorded by w and others", False),
    ],
)
def test_a_header_says_the_order_of_quaternions(
    tmp_path: Path, header: str, is_refused: bool
) -> None:
    file = written.tum(tmp_path / "t.csv", POSES)
    file.write_text("\n".join([header, *file.read_text().splitlines()[1:]]).replace(" ", ","))
    if is_refused:
        assert "before the other three" in refused(file) and "quaternion=wxyz" in refused(file)
    else:
        assert same(read(file), POSES)


def test_opengl_axes_read_as_opencv_are_named(tmp_path: Path) -> None:
    file = written.npy(tmp_path / "t.npy", POSES @ np.diag([1.0, -1, -1, 1]))
    assert "axes OpenGL's (axes=opengl)" in refused(file)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda p: p[:, :, 3].__setitem__(slice(None), p[:, :, 3] + [0, 0, 11, 0]), "11 metres"),
        (lambda p: p.__setitem__(slice(None), np.block([[turned((0, 1, 0), 95), np.zeros((3, 1))],
                                                        [np.eye(4)[3:]]]) @ p), "95 degrees"),
        (lambda p: p[-1, :3].__setitem__((slice(None), 3), (0, 0, 4.5)), "from frame 4 to 5"),
        (lambda p: p[3].__setitem__((slice(3), slice(3)), turned((0, 1, 0), -60)), "from frame 3"),
    ],
)  # fmt: skip
def test_what_looks_wrong_is_named(tmp_path: Path, edit: Any, words: str) -> None:
    poses = path()
    edit(poses)
    file = written.npy(tmp_path / "a.npy", poses)
    assert words in refused(file) and "looks wrong" in refused(file)
    assert same(read(f"{file}?unchecked"), poses)
    with pytest.raises(CameraError, match="'custom' looks wrong"):
        resolve_camera(poses, N, SIZE)
    # a trajectory is as its maker means it
    assert same(resolve_camera(written.trajectory(poses), N, SIZE), poses)


def test_a_sources_own_path_may_begin_anywhere(tmp_path: Path) -> None:
    poses = path()
    poses[:, 2, 3] += 36
    file = written.npy(tmp_path / "a.npy", poses)
    refused(file)
    assert same(read(file, is_source=True), poses, 1e-5)
    poses[-1, 2, 3] += 160
    with pytest.raises(CameraError, match="comes 160"):
        read(written.npy(tmp_path / "a.npy", poses), is_source=True)


@pytest.mark.parametrize("name", ["what?.npy", "a?relative.npy", "a#b.npy", "a#b?c&d.npy", "?.npy"])
def test_signs_in_a_files_name(tmp_path: Path, name: str) -> None:
    file = written.npy(tmp_path / name, POSES)
    assert same(read(file), POSES)
    found = read(f"{file}?scale=2")
    assert found.poses[-1, 0, 3].item() == pytest.approx(1.8) and found.name == f"{name}?scale=2"


def test_files_that_there_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("re10k.txt", "a/b", "none.JSON#cam01", "x.npy?relative", "images.bin"):
        assert f"cannot read camera file {name.split('#')[0].split('?')[0]}" in refused(name)
    # moves are moves, whatever lies there
    (tmp_path / "static").mkdir()
    (tmp_path / "pan_right").write_text("")
    assert read("static").name == "static" and read("pan_right").name == "pan_right"
    assert "is empty" in refused("./pan_right")
