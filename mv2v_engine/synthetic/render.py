"""A vectorised ray caster with exact depth, on CPU or GPU.

Every ray meets six walls and N quadric or box objects in closed form; the nearest hit is shaded
by its solid texture and one directional light. Time runs from 0 to 1 over a clip, the same for
all cameras, so that cameras of one world are synchronised.

T frames, P pixels of a frame, N objects, S surfaces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.synthetic.worlds import CYLINDER, NUM_WALLS, SPHERE, World

_FAR = 1e4


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


def _walls(world: World, origin_3: Tensor, rays_P3: Tensor) -> Tensor:
    """Distances [P, 6] to the walls from inside the room: -x, -y, -z, +x, +y, +z."""
    rays = torch.where(rays_P3.abs() < 1e-9, torch.full_like(rays_P3, 1e-9), rays_P3)
    low = (world.room_min_3 - origin_3) / rays
    high = (world.room_max_3 - origin_3) / rays
    distance = torch.cat([low, high], dim=-1)
    return torch.where(distance > 1e-4, distance, _FAR)


def _objects(world: World, origin_P: Tensor, rays_P: Tensor) -> Tensor:
    """Distances [P, N] in object axes: spheres and cylinders by a quadratic, boxes by slabs."""
    half = world.half_size_N3
    safe = torch.where(rays_P.abs() < 1e-9, torch.full_like(rays_P, 1e-9), rays_P)
    near = (-half - origin_P) / safe
    far = (half - origin_P) / safe
    enter, leave = torch.minimum(near, far), torch.maximum(near, far)
    box = torch.where(enter.amax(-1) <= leave.amin(-1), enter.amax(-1), _FAR)

    def quadratic(axes: list[int]) -> tuple[Tensor, Tensor]:
        ray, origin = rays_P[..., axes], origin_P[..., axes]
        a = (ray * ray).sum(-1).clamp_min(1e-12)
        b = (ray * origin).sum(-1)
        c = (origin * origin).sum(-1) - half[:, 0] ** 2
        root = (b * b - a * c).clamp_min(0).sqrt()
        missed = b * b - a * c < 0
        return (
            torch.where(missed, _FAR, (-b - root) / a),
            torch.where(missed, -_FAR, (-b + root) / a),
        )

    sphere, _ = quadratic([0, 1, 2])
    side_in, side_out = quadratic([0, 2])
    enter_c = torch.maximum(side_in, enter[..., 1])
    leave_c = torch.minimum(side_out, leave[..., 1])
    cylinder = torch.where(enter_c <= leave_c, enter_c, _FAR)
    distance = torch.where(world.kind_N == SPHERE, sphere, box)
    distance = torch.where(world.kind_N == CYLINDER, cylinder, distance)
    return torch.where(distance > 1e-3, distance, _FAR)


def _object_normals(kind_P: Tensor, half_P3: Tensor, point_P3: Tensor) -> Tensor:
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


def _shade(world: World, surface_P: Tensor, local_P3: Tensor, normal_P3: Tensor) -> Tensor:
    """Colours [P, 3] in 0..1 from the texture at a surface's local point and its world normal."""
    textures = world.textures
    phase = (textures.waves_S33[surface_P] @ local_P3[..., None])[..., 0]
    waves = (phase + textures.phases_S3[surface_P]).sin()
    weights = textures.weights_S2[surface_P]
    signal = weights[:, 0] * waves.mean(-1) * 1.6 + weights[:, 1] * waves.prod(-1) * 2.0
    mix = 0.5 + 0.5 * (textures.sharpness_S[surface_P] * signal).tanh()
    colour = torch.lerp(
        textures.colour_a_S3[surface_P], textures.colour_b_S3[surface_P], mix[:, None]
    )
    lambert = (normal_P3 @ world.light_3).clamp_min(0)
    return colour * (0.55 + 0.5 * lambert)[:, None]


def _trace(
    world: World, time: float, pose_34: Tensor, directions_P3: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Colour [P, 3], depth [P] and surface [P] of camera-axes directions with z = 1."""
    origin = pose_34[:, 3]
    rays = directions_P3 @ pose_34[:, :3].T
    centre, yaw = object_poses(world, time)
    local_origin = _to_local((origin - centre)[None], yaw)
    local_rays = _to_local(rays[:, None].expand(-1, len(centre), -1), yaw)
    walls = _walls(world, origin, rays)
    objects = _objects(world, local_origin, local_rays)
    depth, surface = torch.cat([walls, objects], dim=-1).min(-1)
    point = origin + depth[:, None] * rays

    index = (surface - NUM_WALLS).clamp_min(0)
    is_object = (surface >= NUM_WALLS)[:, None]
    rows = torch.arange(len(rays), device=rays.device)
    local_point = (local_origin + depth[:, None, None] * local_rays)[rows, index]
    local_normal = _object_normals(world.kind_N[index], world.half_size_N3[index], local_point)
    object_normal = _to_local(local_normal[:, None], -yaw[index][:, None])[:, 0]
    axis = torch.nn.functional.one_hot(surface.clamp_max(NUM_WALLS - 1) % 3, 3).to(rays.dtype)
    inward = torch.where(surface < 3, 1.0, -1.0)[:, None] * axis
    normal = torch.where(is_object, object_normal, inward)
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
    offset = (torch.arange(samples, device=device) + 0.5) / samples - 0.5
    offsets_Q2 = torch.cartesian_prod(offset, offset)
    frames, depths, surfaces = [], [], []
    for frame in range(trajectory.num_frames):
        time = frame / max(trajectory.num_frames - 1, 1)
        pose = trajectory.poses[frame].to(device)
        directions = pixel_directions(trajectory, frame).to(device).flatten(0, 1)
        colour, depth, surface = _trace(world, time, pose, directions)
        surface = surface.view(height, width)
        if samples > 1:
            edge = _edges(surface).flatten()
            k = _intrinsics(trajectory, frame)
            step = torch.stack([offsets_Q2[:, 1] / k[0, 0], offsets_Q2[:, 0] / k[1, 1]], dim=-1)
            fine = directions[edge][:, None].repeat(1, len(step), 1)
            fine[..., :2] += step
            colour[edge] = (
                _trace(world, time, pose, fine.flatten(0, 1))[0].view(-1, len(step), 3).mean(1)
            )
        image = (colour.clamp(0, 1) * 255).round().to(torch.uint8)
        frames.append(image.view(height, width, 3))
        depths.append(depth.view(height, width))
        surfaces.append(surface)
    return Rendering(torch.stack(frames), torch.stack(depths), torch.stack(surfaces))
