"""Camera files: ours comes back as written, ReCamMaster's becomes OpenCV metres."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mv2v_engine.camera.files import (
    load_rig,
    parse_trajectory,
    resolve_camera,
    save_trajectory,
)
from mv2v_engine.camera.poses import default_intrinsics, identity_poses
from mv2v_engine.camera.trajectories import CameraTrajectory, named_poses, named_trajectory
from mv2v_engine.errors import CameraError
from tests.camera.written import load_trajectory

SIZE = (96, 160)
Matrix = NDArray[np.float64]


def unreal_matrix(yaw: float, position: tuple[float, float, float], pitch: float = 0.0) -> Matrix:
    """An Unreal camera: rows are its forward, right and up axes and its place, in centimetres.

    x forward, y right, z up, left-handed; positive yaw turns right, positive pitch looks up.
    """
    y, p = math.radians(yaw), math.radians(pitch)
    forward = (math.cos(p) * math.cos(y), math.cos(p) * math.sin(y), math.sin(p))
    right = (-math.sin(y), math.cos(y), 0.0)
    up = (-math.sin(p) * math.cos(y), -math.sin(p) * math.sin(y), math.cos(p))
    return np.array([[*forward, 0], [*right, 0], [*up, 0], [*position, 1]])


def as_text(matrix: Matrix) -> str:
    return "".join("[" + " ".join(f"{value:.6g}" for value in row) + "] " for row in matrix)


def write_recammaster(path: Path, cameras: dict[str, list[Matrix]]) -> Path:
    num_frames = len(next(iter(cameras.values())))
    content = {
        f"frame{i}": {name: as_text(path[i]) for name, path in cameras.items()}
        for i in range(num_frames)
    }
    path.write_text(json.dumps(content))
    return path


def own_json(num_frames: int = 3, **changes: Any) -> dict[str, Any]:
    content = {
        "format": "mv2v-camera",
        "version": 1,
        "convention": "opencv camera-to-world, metres",
        "size": list(SIZE),
        "poses": identity_poses(num_frames).tolist(),
    }
    return {**content, **changes}


@pytest.mark.parametrize(
    ("end", "translation", "direction"),
    [
        # 50 cm along its own forward axis (yaw 30, so along no axis of the world)
        ((30.0, (100 + 43.30127, 200 + 25.0, 150.0)), (0, 0, 0.5), (0, 0, 1)),
        # 20 cm to its right
        ((30.0, (100 - 10.0, 200 + 17.32051, 150.0)), (0.2, 0, 0), (0, 0, 1)),
        # 10 cm up: OpenCV's y points down
        ((30.0, (100.0, 200.0, 160.0)), (0, -0.1, 0), (0, 0, 1)),
        # 10 degrees to the right
        ((40.0, (100.0, 200.0, 150.0)), (0, 0, 0), (0.173648, 0, 0.984808)),
        # 10 degrees up
        ((30.0, (100.0, 200.0, 150.0), 10.0), (0, 0, 0), (0, -0.173648, 0.984808)),
    ],
    ids=["forward", "right", "up", "pan-right", "tilt-up"],
)
def test_unreal_moves_become_opencv_moves(
    tmp_path: Path, end: Any, translation: Any, direction: Any
) -> None:
    start = unreal_matrix(30.0, (100.0, 200.0, 150.0))
    path = write_recammaster(tmp_path / "cameras.json", {"cam01": [start, unreal_matrix(*end)]})
    trajectory = load_trajectory(path, num_frames=2, size=SIZE, camera="cam01")
    torch.testing.assert_close(trajectory.poses[:1], identity_poses(1), atol=1e-5, rtol=0)
    assert torch.linalg.det(trajectory.poses[:, :, :3]).tolist() == pytest.approx([1, 1], abs=1e-4)
    assert trajectory.poses[1, :, 3].tolist() == pytest.approx(translation, abs=1e-4)
    assert trajectory.poses[1, :, 2].tolist() == pytest.approx(direction, abs=1e-4)
    torch.testing.assert_close(trajectory.intrinsics, default_intrinsics(*SIZE))
    assert trajectory.name == "cameras.json#cam01"


def test_conversion_follows_recammasters_steps(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    cameras = {
        name: [
            unreal_matrix(
                *generator.uniform(-40, 40, 1),
                tuple(generator.uniform(-300, 300, 3)),
                *generator.uniform(-20, 20, 1),
            )
            for _ in range(5)
        ]
        for name in ("cam01", "cam02")
    }
    path = write_recammaster(tmp_path / "cameras.json", cameras)
    for name, matrices in cameras.items():
        # transpose, permute columns, negate one, centimetres to metres, relative by a full inverse
        poses = []
        for matrix in matrices:
            pose = matrix.T[:, [1, 2, 0, 3]]
            pose[:3, 1] *= -1
            pose[:3, 3] /= 100
            poses.append(pose)
        expected = np.stack([np.linalg.inv(poses[0]) @ pose for pose in poses])[:, :3]
        got = load_trajectory(path, num_frames=5, size=SIZE, camera=name).poses
        np.testing.assert_allclose(got.numpy(), expected, atol=2e-4)


def test_own_format_comes_back_as_saved(tmp_path: Path) -> None:
    for name in ("arc_left", "translate:1,2,3"):
        saved = named_trajectory(name, 9, SIZE)
        save_trajectory(tmp_path / "camera.json", saved)
        loaded = load_trajectory(tmp_path / "camera.json", num_frames=9, size=SIZE)
        assert torch.equal(loaded.poses, saved.poses)
        assert torch.equal(loaded.intrinsics, saved.intrinsics)
        assert loaded.size == SIZE


def test_own_format_holds_a_zoom_lens(tmp_path: Path) -> None:
    lens = default_intrinsics(*SIZE).repeat(3, 1, 1)
    lens[:, :2, :2] *= torch.tensor([1.0, 1.5, 2.0])[:, None, None]
    save_trajectory(tmp_path / "zoom.json", CameraTrajectory(identity_poses(3), lens, SIZE))
    loaded = load_trajectory(tmp_path / "zoom.json", num_frames=3, size=(192, 320))
    torch.testing.assert_close(loaded.intrinsics[:, :2], lens[:, :2] * 2)


def test_own_format_keeps_its_world_unless_told(tmp_path: Path) -> None:
    poses = identity_poses(3)
    poses[:, :, 3] = torch.tensor([[1.0, 2, 3], [1, 2, 4], [1, 2, 5]])
    save_trajectory(
        tmp_path / "camera.json", CameraTrajectory(poses, default_intrinsics(*SIZE), SIZE)
    )
    kept = load_trajectory(tmp_path / "camera.json", num_frames=3, size=SIZE)
    assert torch.equal(kept.poses, poses)
    moved = load_trajectory(tmp_path / "camera.json", num_frames=3, size=SIZE, options="?relative")
    assert moved.poses[:, 2, 3].tolist() == [0, 1, 2]
    assert not moved.poses[:, :2, 3].any()


def test_intrinsics_may_be_left_out(tmp_path: Path) -> None:
    content = own_json()
    del content["size"]
    (tmp_path / "camera.json").write_text(json.dumps(content))
    loaded = load_trajectory(tmp_path / "camera.json", num_frames=3, size=SIZE)
    torch.testing.assert_close(loaded.intrinsics, default_intrinsics(*SIZE))


def test_resolve_camera(tmp_path: Path) -> None:
    own, theirs = tmp_path / "own.json", tmp_path / "theirs.json"
    save_trajectory(own, named_trajectory("pan_left", 2, SIZE))
    start, end = unreal_matrix(0, (0, 0, 0)), unreal_matrix(0, (100, 0, 0))
    write_recammaster(theirs, {"cam01": [start, start], "cam03": [start, end]})
    pan = named_trajectory("pan_left", 2, SIZE).poses
    assert torch.equal(resolve_camera("pan_left", 2, SIZE).poses, pan)
    assert torch.equal(resolve_camera(str(own), 2, SIZE).poses, pan)
    assert resolve_camera(f"{theirs}#cam03", 2, SIZE).poses[1, 2, 3].item() == pytest.approx(1.0)
    assert resolve_camera("zoom:2", 2, SIZE).poses[1, 2, 3].item() == pytest.approx(2.0)
    with pytest.raises(CameraError, match="nearest: pan_left"):
        resolve_camera("pan_lft", 2, SIZE)


def test_options_of_a_camera_by_name(tmp_path: Path) -> None:
    """Eighty-one poses of a rig for a model of fewer frames, as asked."""
    ahead = [unreal_matrix(30.0, (100 + i, 200.0, 150.0)) for i in range(81)]
    rig = write_recammaster(tmp_path / "rig.JSON", {"cam01": ahead, "cam03": ahead[::-1]})
    with pytest.raises(CameraError, match=r"has 81 poses, the video has 17 frames.*resample"):
        resolve_camera(f"{rig}#cam03", 17, SIZE)
    found = resolve_camera(f"{rig}#cam03?resample", 17, SIZE)
    whole = resolve_camera(f"{rig}#cam03", 81, SIZE)
    torch.testing.assert_close(found.poses, whole.poses[::5], rtol=0, atol=1e-6)
    assert found.name == "rig.JSON#cam03?resample"
    assert "centimetres" in found.notes[0] and "81 poses were resampled to 17" in found.notes[1]
    with pytest.raises(CameraError, match=r"no camera 'cam3'; nearest: .*cam03"):
        resolve_camera(f"{rig}#cam3?resample", 17, SIZE)


def bad_rotation() -> list[Any]:
    poses = identity_poses(3)
    poses[1, 0, 0] = 1.5
    return poses.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (own_json(2), r"has 2 poses, the video has 3 frames.*add poses"),
        (own_json(4), r"has 4 poses, the video has 3 frames.*leave some out"),
        (own_json(poses=[[[math.nan] * 4] * 3] * 3), r"c.json: poses hold NaN.* at frame 0"),
        (own_json(poses=bad_rotation()), r"rotation of frame 1 is not orthonormal"),
        (own_json(poses=[[[1, 2], [3]]] * 3), r"poses must be numbers of shape \[frames, 3, 4\]"),
        (own_json(poses="none"), r"poses must be numbers"),
        (own_json(poses=None), r"poses must be numbers"),
        (own_json(poses=[1, 2, 3]), r"must have shape \[frames, 3, 4\]"),
        (own_json(version=2), r"version 2, this engine reads 1"),
        (own_json(convention="opengl"), r"convention 'opengl', expected 'opencv"),
        (own_json(intrinsics=[[1, 2]]), r"shape \[3, 3\] or"),
        (
            own_json(intrinsics=[[9, 0, 1], [0, 9, 1], [5, 5, 0]], size=[48, 64]),
            r"no pinhole's: got a last row of \[5.0, 5.0, 0.0\].*transpose the matrix",
        ),
        (own_json(intrinsics=np.eye(3).tolist(), size=[96]), r"size must be \[height, width\]"),
        (own_json(distortion=[0.1, 0.0]), r"c.json has 'distortion'.*take distortion out of the"),
        ({"poses": []}, r"is no camera file: expected"),
        ([1, 2], r"is no camera file: expected"),
    ],
)
def test_unusable_own_files(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(content))
    with pytest.raises(CameraError, match=message) as caught:
        load_trajectory(path, num_frames=3, size=SIZE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "not json", '{"frame0": '])
def test_not_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(CameraError, match=r"c.json is not valid JSON"):
        load_trajectory(tmp_path / "c.json", num_frames=3, size=SIZE)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(CameraError, match="cannot read camera file"):
            load_trajectory(path, num_frames=3, size=SIZE)
    (tmp_path / "binary.json").write_bytes(bytes(range(256)))
    with pytest.raises(CameraError, match="not valid JSON"):
        load_trajectory(tmp_path / "binary.json", num_frames=3, size=SIZE)


def test_camera_names(tmp_path: Path) -> None:
    still = [unreal_matrix(0, (0, 0, 0))] * 2
    path = write_recammaster(tmp_path / "c.json", {f"cam{i:02}": still for i in range(1, 11)})
    with pytest.raises(CameraError, match=r"no camera 'cam3'; nearest: .*cam03"):
        load_trajectory(path, num_frames=2, size=SIZE, camera="cam3")
    with pytest.raises(CameraError, match=r"holds 10 cameras.*name one, such as c.json#cam01"):
        load_trajectory(path, num_frames=2, size=SIZE)
    save_trajectory(tmp_path / "own.json", named_trajectory("static", 2, SIZE))
    with pytest.raises(CameraError, match="one camera without a name"):
        load_trajectory(tmp_path / "own.json", num_frames=2, size=SIZE, camera="cam01")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("[1 0 0 0] [0 1 0 0] [0 0 1 0] [nan 0 0 1] ", r"c.json#cam01 hold NaN.*frame 1"),
        ("[2 0 0 0] [0 1 0 0] [0 0 1 0] [0 0 0 1] ", r"frame 1 is not orthonormal"),
        ("[1 0 0 0] [0 1 0 0] [0 0 1 0] ", r"frame1 of cam01 must be text"),
        ("[1 0 0 5] [0 1 0 5] [0 0 1 5] [0 0 0 1] ", r"last column 0 0 0 1.*transpose"),
        ("[a 0 0 0] [0 1 0 0] [0 0 1 0] [0 0 0 1] ", r"frame1 of cam01 must be text"),
        (None, r"frame1 of cam01 must be text"),
    ],
)
def test_unusable_recammaster_entries(tmp_path: Path, entry: Any, message: str) -> None:
    path = write_recammaster(tmp_path / "c.json", {"cam01": [unreal_matrix(0, (0, 0, 0))] * 2})
    content = json.loads(path.read_text())
    content["frame1"]["cam01"] = entry
    path.write_text(json.dumps(content))
    with pytest.raises(CameraError, match=message):
        load_trajectory(path, num_frames=2, size=SIZE, camera="cam01")


def test_recammaster_frame_counts(tmp_path: Path) -> None:
    path = write_recammaster(tmp_path / "c.json", {"cam01": [unreal_matrix(0, (0, 0, 0))] * 4})
    with pytest.raises(CameraError, match=r"has 4 poses, the video has 17 frames"):
        load_trajectory(path, num_frames=17, size=SIZE, camera="cam01")
    content = json.loads(path.read_text())
    content["frame9"] = content.pop("frame2")
    path.write_text(json.dumps(content))
    with pytest.raises(CameraError, match=r"frame2 of cam01 must be text.*got None"):
        load_trajectory(path, num_frames=4, size=SIZE, camera="cam01")


def test_a_rigs_cameras_are_in_one_world(tmp_path: Path) -> None:
    """A second camera 50 cm ahead of the first, turned 90 degrees to the right, then back."""
    yaw = math.radians(30)
    ahead = (100 + 50 * math.cos(yaw), 200 + 50 * math.sin(yaw), 150.0)
    path = write_recammaster(
        tmp_path / "camera_extrinsics.json",
        {
            "cam01": [unreal_matrix(30.0, (100.0, 200.0, 150.0))] * 2,
            "cam02": [unreal_matrix(120.0, ahead), unreal_matrix(30.0, ahead)],
        },
    )
    rig = load_rig(path)
    assert list(rig) == ["cam01", "cam02"]
    torch.testing.assert_close(rig["cam01"], identity_poses(2), rtol=0, atol=1e-5)
    place = torch.tensor([0.0, 0.0, 0.5]).expand(2, 3)
    torch.testing.assert_close(rig["cam02"][:, :, 3], place, rtol=0, atol=1e-5)
    forward = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(rig["cam02"][:, :, 2], forward, rtol=0, atol=1e-5)


def test_a_rig_of_our_own_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "camera.json"
    path.write_text(json.dumps(own_json()))
    with pytest.raises(CameraError, match=r"camera\.json holds no cameras of several videos"):
        load_rig(path)


def test_a_trajectory_without_a_file() -> None:
    poses = named_poses("pan_right", 5)
    found = parse_trajectory({"poses": poses.tolist()}, num_frames=5, size=(6, 8))
    torch.testing.assert_close(found.poses, poses)
    assert (found.name, found.size) == ("custom", (6, 8))
    bad: list[Any] = [None, [], {}, {"format": "other"}, {"poses": [[[10**400]]]}, {"version": 2}]
    for content in bad:
        with pytest.raises(CameraError):
            parse_trajectory(content, num_frames=5, size=(6, 8))


@pytest.mark.parametrize("kind", [identity_poses, lambda n: identity_poses(n).tolist()])
@pytest.mark.parametrize("is_source", [False, True])
def test_poses_in_memory_are_one_a_frame(kind: Any, is_source: bool) -> None:
    whose = "the source's camera" if is_source else "the camera"
    for count, words in ((1, r"1 pose, .* frame, or 'static'"), (5, "5 poses, .* a frame$")):
        for camera in (kind(count), named_trajectory("static", count, SIZE)):
            with pytest.raises(CameraError, match=f"^{whose} has {words}"):
                resolve_camera(camera, 17, SIZE, is_source=is_source)
            assert resolve_camera(camera, None, SIZE, is_source=is_source).num_frames == count
    assert resolve_camera(kind(17), 17, SIZE, is_source=is_source).num_frames == 17
