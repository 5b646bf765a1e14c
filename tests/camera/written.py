"""Camera files of every format, written from one path by each format's own convention."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mv2v_engine.camera.files import resolve_camera
from mv2v_engine.camera.poses import default_intrinsics
from mv2v_engine.camera.trajectories import CameraTrajectory

SIZE = (96, 160)
N = 6
Array = NDArray[np.float64]


def turned(axis: tuple[float, float, float], degrees: float) -> Array:
    """A rotation about an axis, by Rodrigues' formula."""
    x, y, z = np.array(axis) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.radians(degrees)
    result: Array = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    return result


def load_trajectory(
    path: Path,
    *,
    num_frames: int,
    size: tuple[int, int],
    camera: str | None = None,
    options: str = "",
) -> CameraTrajectory:
    """A camera file's path, whether it is plausible or not."""
    name = f"{path}#{camera}" if camera else str(path)
    return resolve_camera(name + options, num_frames, size, check=False)


def path(count: int = N) -> Array:
    """Camera-to-world, OpenCV axes, metres: [count, 4, 4] that turn and move about all axes."""
    poses = np.tile(np.eye(4), (count, 1, 1))
    for i in range(count):
        share = i / max(count - 1, 1)
        poses[i, :3, :3] = turned((0.3, 1.0, -0.2), 25 * share)
        poses[i, :3, 3] = (0.9 * share, -0.4 * share, 0.5 * share**2)
    return poses


def quaternion(rotation: Array) -> Array:
    """w x y z of a rotation: the row of the outer product q q^T that is the longest."""
    (a, b, c), (d, e, f), (g, h, i) = rotation
    products = np.array(
        [
            [1 + a + e + i, h - f, c - g, d - b],
            [h - f, 1 + a - e - i, b + d, c + g],
            [c - g, b + d, 1 - a + e - i, f + h],
            [d - b, c + g, f + h, 1 - a - e + i],
        ]
    )
    row = products[np.argmax(np.diag(products))]
    result: Array = row / np.linalg.norm(row)
    return result


def nerf(place: Path, poses: Array, **more: object) -> Path:
    """OpenGL axes: the camera's y and z are the other way round."""
    frames = [
        {
            "file_path": f"images/{i:04}.png",
            "transform_matrix": (pose @ np.diag([1.0, -1, -1, 1])).tolist(),
        }
        for i, pose in enumerate(poses)
    ]
    place.write_text(json.dumps({"frames": frames, **more}))
    return place


def realestate(
    place: Path, poses: Array, lens: tuple[float, ...] = (0.5, 0.8, 0.5, 0.5, 0, 0)
) -> Path:
    rows = ["https://www.youtube.com/watch?v=none"]
    for i, pose in enumerate(poses):
        numbers = [1000 * i, *lens, *np.linalg.inv(pose)[:3].flatten()]
        rows.append(" ".join(f"{number:.9g}" for number in numbers))
    place.write_text("\n".join(rows) + "\n")
    return place


def tum(place: Path, poses: Array, times: Array | None = None) -> Path:
    rows = ["# timestamp tx ty tz qx qy qz qw"]
    for i, pose in enumerate(poses):
        w, *xyz = quaternion(pose[:3, :3])
        stamp = 1305031102.25 + i / 32 if times is None else times[i]
        rows.append(" ".join(f"{n:.9f}" for n in (stamp, *pose[:3, 3], *xyz, w)))
    place.write_text("\n".join(rows))
    return place


def colmap_text(place: Path, poses: Array, camera: str | None = None) -> Path:
    rows = ["# Image list with two lines of data per image:"]
    for i, pose in enumerate(poses):
        inverse = np.linalg.inv(pose)
        numbers = " ".join(f"{n:.12g}" for n in (*quaternion(inverse[:3, :3]), *inverse[:3, 3]))
        rows += [f"{i + 1} {numbers} 1 frame_{i:05}.jpg", "100.5 20 -1 7.25 8 3" if i % 2 else ""]
    place.write_text("\n".join(rows) + "\n")
    if camera is not None:
        (place.parent / "cameras.txt").write_text(f"# CAMERA_ID, MODEL, ...\n{camera}\n")
    return place


def colmap_binary(
    place: Path, poses: Array, camera: tuple[int, int, int, tuple[float, ...]] | None = None
) -> Path:
    """camera: number of the model, width, height, parameters."""
    data = struct.pack("<Q", len(poses))
    for i, pose in enumerate(poses):
        inverse = np.linalg.inv(pose)
        data += struct.pack("<i7di", i + 1, *quaternion(inverse[:3, :3]), *inverse[:3, 3], 1)
        data += f"frame_{i:05}.jpg".encode() + b"\0"
        data += struct.pack("<Q", 2) + struct.pack("<ddqddq", 1.5, 2, -1, 3, 4, 17)
    place.write_bytes(data)
    if camera is not None:
        model, width, height, values = camera
        packed = struct.pack(f"<QiiQQ{len(values)}d", 1, 1, model, width, height, *values)
        (place.parent / "cameras.bin").write_bytes(packed)
    return place


def npy(place: Path, poses: Array) -> Path:
    with place.open("wb") as file:
        np.save(file, poses)
    return place


def json_list(place: Path, poses: Array) -> Path:
    place.write_text(json.dumps(poses.tolist()))
    return place


def text_rows(place: Path, poses: Array) -> Path:
    np.savetxt(place, poses.reshape(len(poses), -1))
    return place


def text_blocks(place: Path, poses: Array) -> Path:
    blocks = ["\n".join(" ".join(f"{n:.12g}" for n in row) for row in pose) for pose in poses]
    place.write_text("\n\n".join(blocks))
    return place


def own(place: Path, poses: Array) -> Path:
    content = {"format": "mv2v-camera", "version": 1, "poses": poses[:, :3].tolist()}
    place.write_text(json.dumps(content))
    return place


WRITERS: dict[str, tuple[str, Callable[[Path, Array], Path]]] = {
    "own": ("camera.json", own),
    "nerf": ("transforms.json", nerf),
    "realestate": ("0a1b2c.txt", realestate),
    "tum": ("groundtruth.txt", tum),
    "colmap-text": ("images.txt", colmap_text),
    "colmap-binary": ("images.bin", colmap_binary),
    "npy": ("poses.npy", npy),
    "npy-3x4": ("poses.npy", lambda place, poses: npy(place, poses[:, :3])),
    "npy-rows": ("poses.npy", lambda place, poses: npy(place, poses.reshape(-1, 16))),
    "npy-columns": ("poses.npy", lambda place, poses: npy(place, np.asfortranarray(poses))),
    "npy-big-endian": ("poses.npy", lambda place, poses: npy(place, poses.astype(">f4"))),  # type: ignore[arg-type]
    "json-list": ("poses.json", json_list),
    "json-rows": (
        "poses.json",
        lambda place, poses: json_list(place, poses[:, :3].reshape(-1, 12)),
    ),
    "kitti": ("poses.txt", lambda place, poses: text_rows(place, poses[:, :3])),
    "text-4x4": ("poses.txt", text_rows),
    "text-blocks": ("poses.txt", text_blocks),
}


def trajectory(poses: Array) -> CameraTrajectory:
    return CameraTrajectory(torch.from_numpy(poses), default_intrinsics(*SIZE), SIZE)
