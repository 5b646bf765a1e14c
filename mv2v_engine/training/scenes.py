"""Scenes filmed by several cameras at once, and the first source of them: procedural worlds.

`python -m mv2v_engine.training.scenes --out runs/scenes --worlds 0:300` renders them ahead, one
safetensors file a world. The other source is MultiCamVideo's folders, in `multicam`.

K cameras, T frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from mv2v_engine.files import make_folder, save_tensors
from mv2v_engine.parallel.device import usable_device
from mv2v_engine.parser import Parser, count
from mv2v_engine.synthetic.cameras import scene_cameras
from mv2v_engine.synthetic.render import render
from mv2v_engine.synthetic.worlds import Grade, make_world
from mv2v_engine.training.command import run_command, seeds
from mv2v_engine.training.stored import reading, stored_in


@dataclass(frozen=True, eq=False)
class Scene:
    """frames uint8 [K, T, height, width, 3]; poses [K, T, 3, 4] camera-to-world in one world.

    captions: one a camera, or none at all. skipped: why cameras of the scene are not here.
    intrinsics: normalised, [K, 4] (METHOD 5); None is the default lens.
    """

    frames: Tensor
    poses: Tensor
    captions: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    intrinsics: Tensor | None = None


class SceneSource(Protocol):
    """Where scenes come from; the latent cache is made from any such source."""

    @property
    def names(self) -> Sequence[str]:
        """Names of all scenes, each fit for a file's name."""

    def load(self, name: str) -> Scene:
        """One scene.

        Raises:
            TrainingError: it is damaged or incomplete; the message says how.
        """


class RenderedScenes:
    """The folder that this module's command fills."""

    def __init__(self, folder: Path) -> None:
        self._paths = {path.stem: path for path in stored_in(folder, "scene", "scenes")}

    @property
    def names(self) -> Sequence[str]:
        return tuple(self._paths)

    def load(self, name: str) -> Scene:
        return load_scene(self._paths[name])


class WorldScenes:
    """Worlds of some seeds, each rendered on `device` when it is loaded and kept nowhere."""

    def __init__(
        self,
        seeds: Sequence[int],
        grade: Grade,
        num_cameras: int,
        *,
        arcs: int = 1,
        device: str = "cpu",
    ) -> None:
        self._seeds = {f"scene_{grade}_{seed:07d}": seed for seed in seeds}
        self.grade, self.num_cameras, self.arcs = grade, num_cameras, arcs
        self.device = device

    @property
    def names(self) -> Sequence[str]:
        return tuple(self._seeds)

    def load(self, name: str) -> Scene:
        return render_scene(
            self._seeds[name],
            num_cameras=self.num_cameras,
            device=self.device,
            grade=self.grade,
            arcs=self.arcs,
        )


def render_scene(
    seed: int,
    *,
    num_cameras: int,
    device: str = "cpu",
    grade: Grade = "textured",
    arcs: int = 1,
) -> Scene:
    """All cameras of one world."""
    world = make_world(seed, grade)
    cameras = scene_cameras(seed, num_cameras=num_cameras, arcs=arcs)
    frames = torch.stack([render(world, camera, device=device).frames for camera in cameras])
    return Scene(frames.cpu(), torch.stack([camera.poses for camera in cameras]))


def scene_path(folder: Path, seed: int) -> Path:
    return folder / f"scene_{seed:07d}.safetensors"


def load_scene(path: Path) -> Scene:
    """A scene written by this module.

    Raises:
        TrainingError: the file is damaged or holds something else.
    """
    with reading(path, "rendered scene", "scenes") as file:
        return Scene(file.get_tensor("frames"), file.get_tensor("poses"))


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--worlds", type=seeds, default="0:300", help="first:last seed")
    parser.add_argument("--cameras", type=count, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = str(usable_device(args.device))
    make_folder(args.out)
    for seed in tqdm(args.worlds, unit="world"):
        path = scene_path(args.out, seed)
        if not path.exists():
            scene = render_scene(seed, num_cameras=args.cameras, device=device)
            save_tensors(path, {"frames": scene.frames, "poses": scene.poses})


if __name__ == "__main__":
    run_command(main)
