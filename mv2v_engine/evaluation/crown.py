"""What an edit put above the target: a hat of any make, wherever the wearer goes.

The words leave a hat's shape open, so that it has no true surface to compare on. Compared are
patches of the picture above its wearer, upright, facing the camera, and scaled with distance.

T frames, W windows, G pixels of a patch's side.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from mv2v_engine.camera.poses import invert
from mv2v_engine.synthetic.edit_clips import EditClip
from mv2v_engine.synthetic.edits import TARGET, hat_place
from mv2v_engine.synthetic.render import frame_time, object_poses

_GRID = 24
_ADDED_FROM = 0.1  # mean change of a pixel, of full scale, that means something was put there
_FEWEST_FRAMES = 3  # frames of a window that show the place
_PUT_FROM = 0.25  # share of a window's frames in which something is at a pixel of the patch
_LEAST_SHOWN = 0.7  # share of the patch


@dataclass(frozen=True, eq=False)
class Crown:
    """The square above the target's top, as large as the largest hat.

    grid: [T, G, G, 2] in grid_sample's coordinates. shown: bool [T, G, G], in the image and
    nothing stands before it. visible: bool [T], most of it is shown.
    box: bool [T, height, width], the pixels that it covers.
    """

    grid: Tensor
    shown: Tensor
    visible: Tensor
    box: Tensor

    def sample(self, frames: Tensor) -> Tensor:
        """Patches [T, G, G, 3] of frames [T, height, width, 3], 0..1."""
        planes = frames.permute(0, 3, 1, 2).float() / 255
        patches = torch.nn.functional.grid_sample(planes, self.grid, align_corners=False)
        return patches.permute(0, 2, 3, 1)


def crown_of(clip: EditClip) -> Crown:
    """Follow the place above the target through the clip."""
    world, camera = clip.edit_world.world, clip.camera
    height, width = camera.size
    top, radius = hat_place(world)
    offset = (torch.arange(_GRID) + 0.5) / _GRID * 2 - 1
    square = torch.stack(torch.meshgrid(offset, offset, indexing="xy"), dim=-1)
    to_camera = invert(camera.poses)
    rows, columns = torch.meshgrid(
        torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij"
    )
    grids, hidden, boxes = [], [], []
    for frame in range(camera.num_frames):
        centre = object_poses(world, frame_time(camera, frame))[0][0]
        centre = centre + torch.tensor([0.0, top - radius, 0.0])
        local = to_camera[frame, :, :3] @ centre + to_camera[frame, :, 3]
        depth = float(local[2].clamp_min(0.1))
        x, y = (camera.intrinsics @ local / depth)[:2].tolist()
        reach = float(camera.intrinsics[0, 0]) * radius / depth
        pixels = torch.tensor([x, y]) + reach * square
        grids.append(2 * pixels / torch.tensor([width, height]) - 1)
        box = ((columns - x).abs() < reach) & ((rows - y).abs() < reach) & (local[2] > 0)
        boxes.append(box)
        before = clip.source.depth[frame].cpu() < depth - radius
        before &= clip.source.surface[frame].cpu() != TARGET
        hidden.append(before if local[2] > 0 else torch.ones_like(before))
    grid = torch.stack(grids)
    behind = torch.nn.functional.grid_sample(
        torch.stack(hidden)[:, None].float(), grid, mode="nearest", align_corners=False
    )
    shown = (grid.abs() <= 1).all(-1) & (behind[:, 0] == 0)
    visible = shown.float().mean((1, 2)) >= _LEAST_SHOWN
    return Crown(grid, shown, visible, torch.stack(boxes))


def added_share(frames: Tensor, clip: EditClip, crown: Crown) -> Tensor:
    """Share [T] of the crown's pixels that are shown where the edit put something."""
    added = _added(frames, clip, crown) & crown.shown
    return added.sum((1, 2)) / crown.shown.sum((1, 2)).clamp_min(1)


def _added(frames: Tensor, clip: EditClip, crown: Crown) -> Tensor:
    change = crown.sample(frames) - crown.sample(clip.source.frames.cpu())
    return change.abs().mean(-1) > _ADDED_FROM


def crown_disagreement(
    frames: Tensor, clip: EditClip, crown: Crown, window_T: Tensor
) -> float | None:
    """Mean L1 (0..1) between windows' mean patches of what was put above the target.

    Where nothing was put counts as mid-grey, so that a hat differs from no hat, and a wide one
    from a narrow one; where neither window put anything does not count. None if fewer than two
    windows show the place.
    """
    added = _added(frames, clip, crown)[..., None]
    patches = crown.sample(frames)
    errors: list[Tensor] = []
    means = []
    for window in range(int(window_T.max()) + 1):
        frame = crown.visible & (window_T == window)
        if int(frame.sum()) >= _FEWEST_FRAMES:
            shown = crown.shown[frame][..., None]
            put = added[frame] & shown
            colour = (patches[frame] * put).sum(0) / put.sum(0).clamp_min(1)
            share = put.sum(0) / shown.sum(0).clamp_min(1)
            colour = torch.where(share > _PUT_FROM, colour, 0.5)
            means.append((colour, share, shown.any(0)))
    for (a, a_share, a_seen), (b, b_share, b_seen) in combinations(means, 2):
        counts = a_seen & b_seen & (a_share + b_share > 2 * _PUT_FROM)
        difference = (a - b).abs().mean(-1, keepdim=True)
        errors.append((difference * counts).sum() / counts.sum().clamp_min(1))
    return float(torch.stack(errors).mean()) if errors else None
