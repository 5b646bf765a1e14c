"""A vectorised ray caster with exact depth, on CPU or GPU.

Every ray meets six walls and N quadric or box objects in closed form; the nearest hit is shaded
by its solid texture and one directional light. Time runs from 0 to 1 over a clip, the same for
all cameras, so that cameras of one world are synchronised.

T frames, P pixels of a frame, N objects, S surfaces.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.synthetic.worlds import BOX, CYLINDER, NUM_WALLS, SPHERE, World

_FAR = 1e4

# x, y and z apart, each contiguous over objects and pixels: faster than a last axis of three
Axes = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Rendering:
    """frames uint8 [T, height, width, 3]; depth along the optical axis, metres, at pixel centres;
    surface: index of the surface seen (walls 0-5, then objects)."""

    frames: Tensor
    depth: Tensor
    surface: Tensor


def object_poses(world: World, time: float) -> tuple[Tensor, Tensor]:
    """Centres [N, 3] in metres and yaw [N] in radians at a time in 0..1."""
    angle = 2 * torch.pi * world.rate_N * time + world.phase_N
    centre = world.centre_N3 + world.swing_N3 * (angle.sin() - world.phase_N.sin())[:, None]
    return centre, world.yaw_N + world.spin_N * time


def _to_local(vectors: Tensor, yaw_N: Tensor) -> Tensor:
    """Rotate [P, N, 3] by -yaw about y into each object's own axes."""
    cos, sin = yaw_N.cos(), yaw_N.sin()
    x, y, z = vectors.unbind(-1)
    return torch.stack([cos * x - sin * z, y, sin * x + cos * z], dim=-1)


def _walls(world: World, origin_3: Tensor, rays_3P: Tensor) -> Tensor:
    """Distances [6, P] to the walls from inside the room: -x, -y, -z, +x, +y, +z."""
    rays = torch.where(rays_3P.abs() < 1e-9, 1e-9, rays_3P)
    low = (world.room_min_3 - origin_3)[:, None] / rays
    high = (world.room_max_3 - origin_3)[:, None] / rays
    distance = torch.cat([low, high])
    return torch.where(distance > 1e-4, distance, _FAR)


def _objects(world: World, origin_N3: Tensor, rays_3NP: Axes) -> Tensor:
    """Distances [N, P] in object axes: spheres and cylinders by a quadratic, boxes by slabs."""
    distance = torch.full_like(rays_3NP[0], _FAR)
    for kind, meet in ((SPHERE, _spheres), (BOX, _boxes), (CYLINDER, _cylinders)):
        which = (world.kind_N == kind).nonzero()[:, 0]
        if len(which):
            rays = (rays_3NP[0][which], rays_3NP[1][which], rays_3NP[2][which])
            distance[which] = meet(_axes(world.half_size_N3[which]), _axes(origin_N3[which]), rays)
    return torch.where(distance > 1e-3, distance, _FAR)


def _axes(vectors_N3: Tensor) -> Axes:
    """x, y and z apart, each [N, 1]."""
    x, y, z = vectors_N3[:, :, None].unbind(1)
    return x, y, z


def _slabs(half: Tensor, origin: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays enter and leave the slab -half..half of one axis."""
    safe = torch.where(rays.abs() < 1e-9, 1e-9, rays)
    near, far = (-half - origin) / safe, (half - origin) / safe
    return torch.minimum(near, far), torch.maximum(near, far)


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, map(torch.mul, first, second))


def _round(
    radius: Tensor, origin: Sequence[Tensor], rays: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Where rays enter and leave |x| <= radius in the axes given; never, if they miss it."""
    a, b = _dot(rays, rays).clamp_min(1e-12), _dot(rays, origin)
    square = b * b - a * (_dot(origin, origin) - radius**2)
    root, missed = square.clamp_min(0).sqrt(), square < 0
    return torch.where(missed, _FAR, (-b - root) / a), torch.where(missed, -_FAR, (-b + root) / a)


def _spheres(half: Axes, origin: Axes, rays: Axes) -> Tensor:
    return _round(half[0], origin, rays)[0]


def _boxes(half: Axes, origin: Axes, rays: Axes) -> Tensor:
    slabs = [_slabs(*axis) for axis in zip(half, origin, rays, strict=True)]
    enter = torch.maximum(torch.maximum(slabs[0][0], slabs[1][0]), slabs[2][0])
    leave = torch.minimum(torch.minimum(slabs[0][1], slabs[1][1]), slabs[2][1])
    return torch.where(enter <= leave, enter, _FAR)


def _cylinders(half: Axes, origin: Axes, rays: Axes) -> Tensor:
    side_in, side_out = _round(half[0], origin[::2], rays[::2])
    cap_in, cap_out = _slabs(half[1], origin[1], rays[1])
    enter, leave = torch.maximum(side_in, cap_in), torch.minimum(side_out, cap_out)
    return torch.where(enter <= leave, enter, _FAR)


def object_normals(kind_P: Tensor, half_P3: Tensor, point_P3: Tensor) -> Tensor:
    """Outward normals [P, 3] at points on objects, in object axes."""
    scaled = point_P3 / half_P3
    face = torch.nn.functional.one_hot(scaled.abs().argmax(-1), 3) * scaled.sign()
    radial = torch.stack([point_P3[:, 0], 0 * point_P3[:, 0], point_P3[:, 2]], dim=-1)
    on_cap = scaled[:, 1].abs() > 1 - 1e-3
    up = torch.zeros_like(face)
    up[:, 1] = scaled[:, 1].sign()
    normal = torch.where((kind_P == SPHERE)[:, None], point_P3, face)
    round_side = (kind_P == CYLINDER)[:, None]
    normal = torch.where(round_side, torch.where(on_cap[:, None], up, radial), normal)
    return torch.nn.functional.normalize(normal, dim=-1)


def object_index(surface: Tensor) -> Tensor:
    """Which object a surface is; 0 for walls."""
    return (surface - NUM_WALLS).clamp_min(0)


def surface_normals(world: World, yaw_N: Tensor, surface_P: Tensor, local_P3: Tensor) -> Tensor:
    """World normals [P, 3], towards the camera's side; local points matter for objects only."""
    inward = torch.eye(3, device=local_P3.device).repeat(2, 1)
    inward[3:] *= -1
    normal = inward[surface_P.clamp_max(NUM_WALLS - 1)]
    is_object = surface_P >= NUM_WALLS
    index = object_index(surface_P[is_object])
    own = object_normals(world.kind_N[index], world.half_size_N3[index], local_P3[is_object])
    normal[is_object] = _to_local(own[:, None], -yaw_N[index][:, None])[:, 0]
    return normal


def shading(world: World, normal_P3: Tensor) -> Tensor:
    """How much of a surface's own colour is seen [P], 0.55 to 1.05, by its world normal."""
    return 0.55 + 0.5 * (normal_P3 @ world.light_3).clamp_min(0)


def _shade(world: World, surface_P: Tensor, local_P3: Tensor, normal_P3: Tensor) -> Tensor:
    """Colours [P, 3] in 0..1 from the texture at a surface's local point and its world normal."""
    textures = world.textures
    # the waves of all surfaces in one product, then the one that is seen
    every = (local_P3 @ textures.waves_S33.flatten(0, 1).T).unflatten(-1, (-1, 3))
    phase = every.gather(1, surface_P[:, None, None].expand(-1, 1, 3))[:, 0]
    waves = (phase + textures.phases_S3[surface_P]).sin()
    weights = textures.weights_S2[surface_P]
    signal = weights[:, 0] * waves.mean(-1) * 1.6 + weights[:, 1] * waves.prod(-1) * 2.0
    mix = 0.5 + 0.5 * (textures.sharpness_S[surface_P] * signal).tanh()
    colour = torch.lerp(
        textures.colour_a_S3[surface_P], textures.colour_b_S3[surface_P], mix[:, None]
    )
    return colour * shading(world, normal_P3)[:, None]


def _trace(
    world: World, time: float, pose_34: Tensor, directions_P3: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Colour [P, 3], depth [P] and surface [P] of camera-axes directions with z = 1."""
    origin = pose_34[:, 3]
    rays_3P = pose_34[:, :3] @ directions_P3.T
    centre, yaw = object_poses(world, time)
    local_origin = _to_local((origin - centre)[None], yaw)[0]
    cos, sin = yaw.cos()[:, None], yaw.sin()[:, None]
    x, y, z = rays_3P
    local_rays = (cos * x - sin * z, y.expand(len(yaw), -1), sin * x + cos * z)
    walls = _walls(world, origin, rays_3P)
    objects = _objects(world, local_origin, local_rays)
    depth, surface = torch.cat([walls, objects]).min(0)
    point = origin + depth[:, None] * rays_3P.T

    is_object = (surface >= NUM_WALLS)[:, None]
    index = object_index(surface)
    seen = torch.stack([axis.gather(0, index[None])[0] for axis in local_rays], dim=-1)
    local_point = local_origin[index] + depth[:, None] * seen
    normal = surface_normals(world, yaw, surface, local_point)
    colour = _shade(world, surface, torch.where(is_object, local_point, point), normal)
    return colour, depth, surface


def pixel_directions(trajectory: CameraTrajectory, frame: int) -> Tensor:
    """Camera-axes directions [height, width, 3] with z = 1, through pixel centres."""
    height, width = trajectory.size
    k = _intrinsics(trajectory, frame)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([(x - k[0, 2]) / k[0, 0], (y - k[1, 2]) / k[1, 1], torch.ones_like(x)], -1)


def _intrinsics(trajectory: CameraTrajectory, frame: int) -> Tensor:
    return (
        trajectory.intrinsics if trajectory.intrinsics.ndim == 2 else trajectory.intrinsics[frame]
    )


def _edges(surface: Tensor) -> Tensor:
    """Where a pixel's surface [height, width] differs from that of a neighbour."""
    edge = torch.zeros_like(surface, dtype=torch.bool)
    down, right = surface[1:] != surface[:-1], surface[:, 1:] != surface[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= right
    edge[:, :-1] |= right
    return edge


def _soften(
    world: World,
    trajectory: CameraTrajectory,
    frame: int,
    edge_P: Tensor,
    samples: int,
) -> Tensor:
    """Colours [number of edges, 3] of a frame's edge pixels, each the mean of `samples` squared."""
    device = edge_P.device
    offset = (torch.arange(samples, device=device) + 0.5) / samples - 0.5
    offsets_Q2 = torch.cartesian_prod(offset, offset)
    k = _intrinsics(trajectory, frame)
    step = torch.stack([offsets_Q2[:, 1] / k[0, 0], offsets_Q2[:, 0] / k[1, 1]], dim=-1)
    directions = pixel_directions(trajectory, frame).to(device).flatten(0, 1)
    fine = directions[edge_P][:, None].repeat(1, len(step), 1)
    fine[..., :2] += step
    pose = trajectory.poses[frame].to(device)
    colour = _trace(world, frame_time(trajectory, frame), pose, fine.flatten(0, 1))[0]
    return colour.view(-1, len(step), 3).mean(1)


def frame_time(trajectory: CameraTrajectory, frame: int) -> float:
    """When a frame is filmed: 0 at the first, 1 at the last."""
    return frame / max(trajectory.num_frames - 1, 1)


def _to_uint8(colour: Tensor) -> Tensor:
    return (colour.clamp(0, 1) * 255).round().to(torch.uint8)


def render(
    world: World,
    trajectory: CameraTrajectory,
    *,
    samples: int = 3,
    device: torch.device | str = "cpu",
) -> Rendering:
    """Film a world with one ray a pixel, and `samples` squared where surfaces meet.

    Textures are smooth, so only silhouettes need antialiasing; depth is that of the centre ray.
    """
    world = world.to(device)
    height, width = trajectory.size
    frames, depths, surfaces = [], [], []
    for frame in range(trajectory.num_frames):
        pose = trajectory.poses[frame].to(device)
        directions = pixel_directions(trajectory, frame).to(device).flatten(0, 1)
        colour, depth, surface = _trace(world, frame_time(trajectory, frame), pose, directions)
        surface = surface.view(height, width)
        if samples > 1:
            edge = _edges(surface).flatten()
            colour[edge] = _soften(world, trajectory, frame, edge, samples)
        frames.append(_to_uint8(colour).view(height, width, 3))
        depths.append(depth.view(height, width))
        surfaces.append(surface)
    return Rendering(torch.stack(frames), torch.stack(depths), torch.stack(surfaces))


def render_changes(
    world: World,
    trajectory: CameraTrajectory,
    before: Rendering,
    where: Tensor,
    *,
    samples: int = 3,
) -> Rendering:
    """Film what an edit changed, and take the rest from `before`: what `render` gives, but faster.

    where: bool [T, height, width], every pixel whose surface or colour may differ from `before`
    and those beside it. Elsewhere a sliver of a changed surface that no pixel's centre meets keeps
    its old colour.
    """
    world = world.to(before.frames.device)
    after = Rendering(before.frames.clone(), before.depth.clone(), before.surface.clone())
    for frame in range(trajectory.num_frames):
        changed = where[frame].flatten()
        if not bool(changed.any()):
            continue
        pose = trajectory.poses[frame].to(changed.device)
        directions = pixel_directions(trajectory, frame).to(changed.device).flatten(0, 1)
        colour, depth, surface = _trace(
            world, frame_time(trajectory, frame), pose, directions[changed]
        )
        image = after.frames[frame].view(-1, 3)
        image[changed] = _to_uint8(colour)
        after.depth[frame].view(-1)[changed] = depth
        after.surface[frame].view(-1)[changed] = surface
        edge = _edges(after.surface[frame]).flatten() & changed
        if samples > 1 and bool(edge.any()):
            image[edge] = _to_uint8(_soften(world, trajectory, frame, edge, samples))
    return after
