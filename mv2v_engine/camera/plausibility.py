"""What looks wrong with a camera's path, before a model is asked to follow it.

Poses are relative to the source's first frame, in metres. A path of another world, another unit or
another order has the form of one all the same; its size gives it away. The bounds lie well beyond
what a video model can follow from one source, whose scene is some four metres deep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mv2v_engine.camera.poses import rotation_degrees
from mv2v_engine.errors import CameraError

# the first pose, from the source's first frame
MAX_START_METRES, MAX_START_DEGREES = 10.0, 90.0
MAX_REACH = 20.0  # metres, of any pose from the first one
# between neighbouring frames
MAX_STEP_METRES, MAX_STEP_DEGREES = 4.0, 60.0
_IS_FLIPPED = 30.0  # degrees within which a camera counts as backwards and upside down


def check_plausible(poses: Tensor, name: str, *, is_source: bool, advice: str) -> None:
    """Refuse a path [T, 3, 4] that no video of this scene can have, in words that say why.

    is_source: it is the source's own, which is taken relative to its first pose, wherever that is.
    advice: how to have it all the same.

    Raises:
        CameraError: naming all that looks wrong.
    """
    found = [] if is_source else _start(poses[0])
    found += _reach(poses) + _jump(poses)
    if found:
        raise CameraError(f"camera {name!r} looks wrong: {'; '.join(found)}; {advice}")


def _start(first: Tensor) -> list[str]:
    metres, degrees = float(first[:, 3].norm()), float(rotation_degrees(first[:, :3]))
    if metres <= MAX_START_METRES and degrees <= MAX_START_DEGREES:
        return []
    flipped = torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=first.dtype, device=first.device))
    is_flipped = float(rotation_degrees(flipped @ first[:, :3])) < _IS_FLIPPED
    axes = (
        ", or are its axes OpenGL's (axes=opengl), or its quaternions in the other order"
        if is_flipped
        else ""
    )
    return [
        f"its first pose lies {metres:.3g} metres from the source's first frame and is turned by "
        f"{degrees:.0f} degrees, at most {MAX_START_METRES:g} metres and {MAX_START_DEGREES:g} "
        f"degrees are plausible: are its poses a world's (relative begins at the source){axes}"
    ]


def _reach(poses: Tensor) -> list[str]:
    metres = float((poses[:, :, 3] - poses[0, :, 3]).norm(dim=-1).max())
    if metres <= MAX_REACH:
        return []
    return [
        f"in {len(poses)} frames it comes {metres:.4g} metres away from its first pose, at most "
        f"{MAX_REACH:g} are plausible: is its unit centimetres (scale=0.01) or another"
    ]


def _jump(poses: Tensor) -> list[str]:
    if len(poses) < 2:
        return []
    metres = (poses[1:, :, 3] - poses[:-1, :, 3]).norm(dim=-1)
    turned = poses[:-1, :, :3].transpose(1, 2) @ poses[1:, :, :3]
    degrees = rotation_degrees(turned)
    at = int((degrees / MAX_STEP_DEGREES).maximum(metres / MAX_STEP_METRES).argmax())
    if float(metres[at]) <= MAX_STEP_METRES and float(degrees[at]) <= MAX_STEP_DEGREES:
        return []
    return [
        f"from frame {at} to {at + 1} it jumps by {float(metres[at]):.3g} metres and "
        f"{float(degrees[at]):.0f} degrees, at most {MAX_STEP_METRES:g} metres and "
        f"{MAX_STEP_DEGREES:g} degrees are plausible: are its frames in a video's order"
    ]
