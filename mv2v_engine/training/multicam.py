"""MultiCamVideo's folders as scenes: `train/f24_aperture5/scene1/videos/cam01.mp4` and beside it
`cameras/camera_extrinsics.json` (BASE_MODELS 2.4).

A camera whose video is missing, damaged or of another length than its poses is left out and the
scene says so; a scene without poses, or with fewer than two such cameras, is an error of its own.

T frames; sizes are (height, width) in pixels.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mv2v_engine.camera.files import load_rig
from mv2v_engine.errors import CameraError, TrainingError, VideoError
from mv2v_engine.files import by_number
from mv2v_engine.training.scenes import Scene
from mv2v_engine.video.io import read_video
from mv2v_engine.video.transforms import cover_and_crop

_LAYOUT = "train/f24_aperture5/scene1/videos/cam01.mp4"
_SENSOR = 23.76  # millimetres of each side
# beyond any of the dataset's frames, which are 1280x1280
_MAX_PIXELS = 3840 * 2160


class MultiCamVideo:
    """The scenes below a dataset's root, their videos scaled and cropped to one window.

    Args:
        num_frames: of the window, from the first frame on; a shorter clip is left out.
        size: (height, width) that frames are scaled to cover and cropped to.
        captions: a table with columns file_name (below the root) and text, as ReCamMaster's
            metadata.csv; None where there is none.
    """

    def __init__(
        self,
        root: Path,
        *,
        num_frames: int,
        size: tuple[int, int],
        captions: Path | None = None,
    ) -> None:
        self.root, self.num_frames, self.size = root, num_frames, size
        folders = [path for path in root.glob("train/*/scene*") if path.is_dir()]
        self._folders = {
            f"scene_{folder.parent.name}_{folder.name}": folder
            for folder in sorted(folders, key=lambda each: by_number(each.as_posix()))
        }
        if not self._folders:
            raise TrainingError(
                f"{root} holds no scenes; expected MultiCamVideo's layout below it: {_LAYOUT}"
            )
        self._captions = {} if captions is None else _read_captions(captions)
        # videos loaded so far whose caption is empty
        self.num_uncaptioned = 0

    @property
    def names(self) -> Sequence[str]:
        return tuple(self._folders)

    def load(self, name: str) -> Scene:
        folder = self._folders[name]
        rig = self._rig(folder)
        frames: list[Tensor] = []
        poses: list[Tensor] = []
        captions: list[str] = []
        skipped: list[str] = []
        for camera, of_camera in rig.items():
            video = folder / "videos" / f"{camera}.mp4"
            try:
                frames.append(self._frames(video, len(of_camera)))
            except VideoError as error:
                skipped.append(f"{camera}: {error}")
                continue
            poses.append(of_camera[: self.num_frames])
            captions.append(self._captions.get(video.relative_to(self.root).as_posix(), ""))
        extra = sorted(p.stem for p in folder.glob("videos/*.mp4") if p.stem not in rig)
        skipped += [f"{camera}: camera_extrinsics.json has no such camera" for camera in extra]
        if len(frames) < 2:
            reasons = "; ".join(skipped) or "its rig has one camera"
            raise TrainingError(
                f"{folder} has {len(frames)} usable videos, at least 2 are needed: {reasons}"
            )
        self.num_uncaptioned += captions.count("")
        lens = self._lens(folder)
        return Scene(
            torch.stack(frames),
            torch.stack(poses),
            tuple(captions),
            tuple(skipped),
            None if lens is None else lens.expand(len(frames), 4).contiguous(),
        )

    def _lens(self, folder: Path) -> Tensor | None:
        """Normalised intrinsics [4] from a folder's name, f24_aperture5 (BASE_MODELS 6).

        All cameras of a scene share one, in front of a square sensor. None: the name has none.
        """
        named = re.match(r"f(\d+(?:\.\d+)?)_", folder.parent.name)
        if named is None:
            return None
        pixels = float(named[1]) / _SENSOR * max(self.size)
        height, width = self.size
        return torch.tensor([pixels / width, pixels / height, 0.0, 0.0], dtype=torch.float32)

    def _rig(self, folder: Path) -> dict[str, Tensor]:
        path = folder / "cameras" / "camera_extrinsics.json"
        try:
            rig = load_rig(path)
        except CameraError as error:
            raise TrainingError(f"{folder} has no usable cameras: {error}") from error
        count = len(next(iter(rig.values())))
        if count < self.num_frames:
            raise TrainingError(
                f"{path} has poses of {count} frames, the window is {self.num_frames}; choose a "
                "smaller --frames"
            )
        return rig

    def _frames(self, video: Path, num_poses: int) -> Tensor:
        """The window [T, height, width, 3].

        Raises:
            VideoError: missing, damaged, or not as many frames as poses.
        """
        if not video.exists():
            raise VideoError(f"{video.name} is missing")
        clip = read_video(video, max_pixels=_MAX_PIXELS)
        if len(clip.frames) != num_poses:
            raise VideoError(
                f"{video.name} has {len(clip.frames)} frames, its camera {num_poses} poses"
            )
        return cover_and_crop(clip.frames[: self.num_frames], self.size)[0]


def _read_captions(path: Path) -> dict[str, str]:
    """Captions by file name.

    Raises:
        TrainingError: unreadable, or without the two columns.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TrainingError(f"cannot read captions from {path}: {error}") from error
    if not rows or not {"file_name", "text"} <= set(rows[0]):
        columns = ", ".join(rows[0]) if rows else "no rows"
        raise TrainingError(f"{path} has {columns}; expected rows with columns file_name and text")
    return {Path(row["file_name"]).as_posix(): row["text"] or "" for row in rows}
