"""Camera modules of a block, and what a plan's frames bring of cameras to it (METHOD 5).

B batch, V camera tracks, F latent frames of a video, R frames of the whole plan, P numbers of one.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mv2v_engine.config import TransformerConfig
from mv2v_engine.models.feed_forward import Linear
from mv2v_engine.tokens.plan import TokenPlan

POSE_DIM = 12
_MATRIX = 16
Role = Literal["query", "key", "output"]


def camera_encoder(dim: int) -> nn.Linear:
    """`cam_encoder`: zero at the start, as ReCamMaster's code has it."""
    encoder = nn.Linear(POSE_DIM, dim)
    nn.init.zeros_(encoder.weight)
    nn.init.zeros_(encoder.bias)
    return encoder


def camera_projector(dim: int) -> Linear:
    """`projector` after self-attention: the identity at the start."""
    projector = Linear(dim, dim)
    nn.init.eye_(projector.weight)
    nn.init.zeros_(projector.bias)
    return projector


def frame_dim(config: TransformerConfig) -> int:
    """Numbers of a frame within the model: its pose, and with PRoPE a matrix and its inverse."""
    if config.camera_attention == "none" or config.has_phases:
        return config.camera_dim
    return POSE_DIM + 2 * _MATRIX


def frame_cameras(plan: TokenPlan, cameras_BVFP: Tensor) -> Tensor:
    """The camera of every frame of the plan [B, R, `frame_dim`] from the tracks [B, V, F, P]."""
    shape = plan.shape
    if cameras_BVFP.shape[3] != plan.camera_dim:
        has = "its pose" if plan.camera_dim == POSE_DIM else "its pose, then its intrinsics"
        has += " of each of its frames" if shape.has_phases else ""
        raise ValueError(
            f"with camera_attention={shape.camera_attention!r} a camera has {plan.camera_dim} "
            f"numbers, {has} (`CameraTrajectory.vectors`); got tracks of shape "
            f"{tuple(cameras_BVFP.shape)}"
        )
    by_segment = []
    for segment in plan.segments:
        track, count = segment.camera or 0, segment.grid[0]
        if track >= cameras_BVFP.shape[1] or count > cameras_BVFP.shape[2]:
            raise ValueError(
                f"{segment.role} needs camera track {track} of {count} frames, "
                f"got tracks of shape {tuple(cameras_BVFP.shape)}"
            )
        # a token of several frames has the camera of its first one
        by_segment.append(cameras_BVFP[:, track, : count : segment.frames_per_token])
    return with_matrices(shape, torch.cat(by_segment, dim=1))


def with_matrices(config: TransformerConfig, cameras_BRP: Tensor) -> Tensor:
    """The numbers of every camera that blocks read [B, R, `frame_dim`], with PRoPE its matrices."""
    if config.camera_attention == "none":
        return cameras_BRP
    cameras_BRP = cameras_BRP.float()
    if config.has_phases:
        return cameras_BRP
    matrices = _projections(cameras_BRP, config)
    return torch.cat([cameras_BRP[..., :POSE_DIM], *(each.flatten(-2) for each in matrices)], -1)


def _projections(cameras_BRP: Tensor, config: TransformerConfig) -> tuple[Tensor, Tensor]:
    """P = [K 0; 0 1] [R t; 0 1], from the world to the image, and its inverse [B, R, 4, 4].

    The world's unit is `scene_scale`. The dual form has P's inverse transpose in P's place.
    """
    pose, lens = cameras_BRP.split([POSE_DIM, 4], -1)
    rotation, place = pose.unflatten(-1, (3, 4)).split([3, 1], -1)  # camera to world
    place = place / config.scene_scale
    fx, fy, cx, cy = lens.unbind(-1)
    zero, one = torch.zeros_like(fx), torch.ones_like(fx)
    k = torch.stack([fx, zero, cx, zero, fy, cy, zero, zero, one], -1).unflatten(-1, (3, 3))
    k_inverse = torch.stack(
        [1 / fx, zero, -cx / fx, zero, 1 / fy, -cy / fy, zero, zero, one], -1
    ).unflatten(-1, (3, 3))
    # sums written out: a product on a GPU may round to fewer digits
    to_image = _product(k, rotation.transpose(-1, -2))
    projection = torch.cat([to_image, -_product(to_image, place)], -1)
    inverse = torch.cat([_product(rotation, k_inverse), place], -1)
    last = torch.stack([zero, zero, zero, one], -1)[..., None, :]
    projection, inverse = (torch.cat([each, last], -2) for each in (projection, inverse))
    if config.camera_attention.endswith("_dual"):
        return inverse.transpose(-1, -2), projection.transpose(-1, -2)
    return projection, inverse


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (a[..., :, :, None] * b[..., None, :, :]).sum(-2)


def projection(cameras_BRP: Tensor, role: Role) -> Tensor:
    """The matrix for a frame's q ("query"), for its k and v ("key"), or for the result ("output").

    What `frame_cameras` gives with PRoPE -> [B, R, 4, 4]: P^T, P^-1 and P, so that the logit of a
    query of camera i and a key of camera j is q^T P_i P_j^-1 k.
    """
    forward, inverse = cameras_BRP[..., POSE_DIM:].unflatten(-1, (2, 4, 4)).unbind(-3)
    if role == "query":
        forward = forward.transpose(-1, -2)
    chosen: Tensor = inverse if role == "key" else forward
    return chosen
