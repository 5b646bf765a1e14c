"""Editing pairs: a long clip, an instruction, the edited clip, and all that is true of both.

Everything follows from the seed: world, camera, instruction, and the choice that the instruction
leaves open. Seeds from HELD_OUT on are never trained on.

T frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mv2v_engine.camera.poses import invert
from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.synthetic.colours import COLOUR_NAMES, colour_index
from mv2v_engine.synthetic.edit_worlds import (
    WINDOW,
    EditWorld,
    edit_camera,
    loop_camera,
    make_edit_world,
)
from mv2v_engine.synthetic.edits import TARGET, Edit, apply_edit
from mv2v_engine.synthetic.instructions import (
    KINDS,
    TEMPLATES,
    WALL_NOUNS,
    EditKind,
    Instruction,
    values_of,
)
from mv2v_engine.synthetic.render import (
    Rendering,
    frame_time,
    object_poses,
    pixel_directions,
    render,
    render_changes,
)
from mv2v_engine.synthetic.worlds import NUM_WALLS, Grade, World

_WALL_SHARE = 0.35  # share of recolouring instructions that are about a wall or the floor
# apart from the seeds of worlds
_INSTRUCTIONS_FROM, _CHOICES_FROM = 1 << 40, 1 << 41


@dataclass(frozen=True, eq=False)
class EditClip:
    """One editing pair; every frame of both clips with its depth and surfaces.

    edit: the edited world and which surfaces the edit concerns.
    """

    seed: int
    instruction: Instruction
    camera: CameraTrajectory
    edit_world: EditWorld
    edit: Edit
    source: Rendering
    edited: Rendering

    @property
    def num_frames(self) -> int:
        return len(self.source.frames)

    @property
    def prompt(self) -> str:
        return self.instruction.prompt

    @property
    def source_mask(self) -> Tensor:
        """bool [T, height, width]: the source's pixels that show what the edit changes."""
        return surface_mask(self.source, (*self.edit.changed, *self.edit.removed))

    @property
    def edited_mask(self) -> Tensor:
        """bool [T, height, width]: the edited clip's pixels that show what the edit made."""
        return surface_mask(self.edited, (*self.edit.changed, *self.edit.added))

    @property
    def mask(self) -> Tensor:
        """bool [T, height, width]: pixels of the edited thing in either clip."""
        return self.source_mask | self.edited_mask


def surface_mask(rendering: Rendering, surfaces: Sequence[int]) -> Tensor:
    """bool [T, height, width]: where a rendering shows one of the surfaces."""
    wanted = torch.tensor(surfaces, dtype=torch.long, device=rendering.surface.device)
    return torch.isin(rendering.surface, wanted)


def grown(mask: Tensor, pixels: int) -> Tensor:
    """A mask [T, height, width] and all within `pixels` of it, diagonals too."""
    pooled = torch.nn.functional.max_pool2d(
        mask[:, None].float(), 2 * pixels + 1, stride=1, padding=pixels
    )
    return pooled[:, 0] > 0


def draw_instruction(edit_world: EditWorld, seed: int, kind: EditKind | None = None) -> Instruction:
    """An instruction that the world can follow; all kinds are equally likely."""
    generator = torch.Generator().manual_seed(_INSTRUCTIONS_FROM + seed)

    def pick(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))

    drawn = KINDS[pick(len(KINDS))]
    kind = drawn if kind is None else kind
    targets = edit_world.target_phrases
    on_wall = float(torch.rand(1, generator=generator)) < _WALL_SHARE
    if kind in ("colour", "paint") and on_wall:
        targets = tuple(WALL_NOUNS)
    target = targets[pick(len(targets))]
    values = values_of(kind)
    if kind == "colour":
        # what is already red, even in part, is not asked to become red
        textures, surface = edit_world.world.textures, WALL_NOUNS.get(target, TARGET)
        tones = torch.stack([textures.colour_a_S3[surface], textures.colour_b_S3[surface]])
        has = colour_index(tones).tolist()
        values = tuple(value for i, value in enumerate(COLOUR_NAMES) if i not in has)
    return Instruction(
        kind=kind,
        target=target,
        value=values[pick(len(values))],
        phrasing=pick(len(TEMPLATES[kind])),
    )


def choice_seed(seed: int, alternative: int = 0) -> int:
    """The seed of a clip's open choice; other alternatives are other valid answers to its words."""
    return _CHOICES_FROM + 64 * seed + alternative


def make_edit_clip(
    seed: int,
    *,
    num_frames: int = 5 * WINDOW,
    size: tuple[int, int] = (96, 160),
    kind: EditKind | None = None,
    device: torch.device | str = "cpu",
    grade: Grade = "textured",
) -> EditClip:
    """The editing pair of a seed.

    kind: of the edit; None draws it. grade: of the room.
    """
    edit_world = make_edit_world(seed, num_frames=num_frames, grade=grade)
    instruction = draw_instruction(edit_world, seed, kind)
    return _filmed(seed, edit_world, instruction, num_frames, size, device)


def make_cut_clip(
    seed: int,
    lengths: Sequence[int],
    *,
    size: tuple[int, int] = (96, 160),
    kind: EditKind = "colour",
) -> tuple[EditClip, ...]:
    """Shots of several worlds with one prompt, each shot with a target and a choice of its own.

    lengths: frames of each shot; the first is of the seed's world, the next of the next seed's, and
    so on. The clip is the shots' frames one after the other.
    """
    look = make_edit_world(seed, num_frames=lengths[0]).looks[0]
    shots: list[EditClip] = []
    for own_seed, num_frames in enumerate(lengths, start=seed):
        edit_world = make_edit_world(own_seed, num_frames=num_frames, target=look)
        said = shots[0].instruction if shots else draw_instruction(edit_world, seed, kind)
        shots.append(_filmed(own_seed, edit_world, said, num_frames, size, "cpu"))
    return tuple(shots)


def make_loop_clip(
    seed: int,
    *,
    num_frames: int = 120,
    degrees: float = 60,
    size: tuple[int, int] = (96, 160),
    kind: EditKind | None = None,
    grade: Grade = "plain",
) -> EditClip:
    """An editing pair that can be repeated without a seam: nothing moves but the camera, which
    looks away from the target, longer than half of the time, and comes back."""
    edit_world = make_edit_world(seed, num_frames=num_frames, grade=grade)
    world = edit_world.world
    still = replace(world, swing_N3=0 * world.swing_N3, spin_N=0 * world.spin_N)
    edit_world = replace(edit_world, world=still)
    camera = loop_camera(num_frames=num_frames, size=size, degrees=degrees)
    instruction = draw_instruction(edit_world, seed, kind)
    return _of_camera(seed, edit_world, instruction, camera, "cpu")


def other_choice(clip: EditClip, alternative: int) -> EditClip:
    """The same clip and words, another valid choice: what an editor without memory may come to."""
    edit = apply_edit(clip.edit_world.world, clip.instruction, choice_seed(clip.seed, alternative))
    return _with_edit(clip, edit)


def _filmed(
    seed: int,
    edit_world: EditWorld,
    instruction: Instruction,
    num_frames: int,
    size: tuple[int, int],
    device: torch.device | str,
) -> EditClip:
    camera = edit_camera(edit_world, seed, num_frames=num_frames, size=size)
    return _of_camera(seed, edit_world, instruction, camera, device)


def _of_camera(
    seed: int,
    edit_world: EditWorld,
    instruction: Instruction,
    camera: CameraTrajectory,
    device: torch.device | str,
) -> EditClip:
    source = render(edit_world.world, camera, device=device)
    edit = apply_edit(edit_world.world, instruction, choice_seed(seed))
    unedited = EditClip(seed, instruction, camera, edit_world, edit, source, source)
    return _with_edit(unedited, edit)


def _with_edit(clip: EditClip, edit: Edit) -> EditClip:
    where = surface_mask(clip.source, (*edit.changed, *edit.removed))
    if edit.added:
        where |= _around(edit.world, clip.camera, edit.added).to(where.device)
    edited = render_changes(edit.world, clip.camera, clip.source, grown(where, 2))
    return EditClip(
        clip.seed, clip.instruction, clip.camera, clip.edit_world, edit, clip.source, edited
    )


def _around(world: World, camera: CameraTrajectory, surfaces: Sequence[int]) -> Tensor:
    """bool [T, height, width]: pixels whose ray meets the bounding sphere of one of the objects."""
    index = torch.tensor(surfaces) - NUM_WALLS
    radius_N = world.half_size_N3[index].norm(dim=-1)
    to_camera = invert(camera.poses)
    hits = []
    for frame in range(camera.num_frames):
        centre_N3 = object_poses(world, frame_time(camera, frame))[0][index]
        centre_N3 = centre_N3 @ to_camera[frame, :, :3].T + to_camera[frame, :, 3]
        rays = torch.nn.functional.normalize(pixel_directions(camera, frame), dim=-1)
        along = rays @ centre_N3.T
        distance = (centre_N3.square().sum(-1) - along.square()).clamp_min(0).sqrt()
        hits.append(((distance < radius_N) & (along > -radius_N)).any(-1))
    return torch.stack(hits)
