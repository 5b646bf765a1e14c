"""Cameras that film a world: ten synchronised ones per scene, from the preset families."""

from __future__ import annotations

import torch

from mv2v_engine.camera.trajectories import CameraTrajectory, named_trajectory

# The presets' own amounts; a scene scales each by a random factor.
_FAMILIES: tuple[tuple[str, float], ...] = (
    ("pan", 19.88),
    ("pan", -19.88),
    ("tilt", 9.94),
    ("tilt", -9.94),
    ("zoom", 1.988),
    ("zoom", -1.988),
    ("crane", 0.994),
    ("crane", -0.994),
)
_ARCS: tuple[tuple[str, float], ...] = (("arc", 29.82), ("arc", -29.82))


def scene_cameras(
    seed: int,
    *,
    num_cameras: int = 10,
    num_frames: int = 17,
    size: tuple[int, int] = (96, 160),
    scale: tuple[float, float] = (0.5, 1.2),
    arcs: int = 1,
) -> list[CameraTrajectory]:
    """The cameras of a scene: a static one, then moves of shuffled families and random extent.

    All start from the same pose, as ReCamMaster's presets start from the source's first frame.
    `scale` bounds the factor on each preset's own amount. Arcs, which are the hardest to follow,
    come `arcs` times as often as every other family.
    """
    families = _FAMILIES + _ARCS * arcs
    generator = torch.Generator().manual_seed(seed)
    cameras = [named_trajectory("static", num_frames, size)]
    while len(cameras) < num_cameras:
        for index in torch.randperm(len(families), generator=generator).tolist():
            kind, amount = families[index]
            factor = scale[0] + (scale[1] - scale[0]) * float(torch.rand(1, generator=generator))
            cameras.append(named_trajectory(f"{kind}:{amount * factor:.4f}", num_frames, size))
    return cameras[:num_cameras]
