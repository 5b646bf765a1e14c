"""Camera modules of a block (METHOD 5) and the camera rows of a plan's frames.

B batch, V camera tracks, F latent frames of a video, R frames of the whole plan.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mv2v_engine.tokens.plan import TokenPlan

POSE_DIM = 12


def camera_encoder(dim: int) -> nn.Linear:
    """`cam_encoder`: zero at the start, as ReCamMaster's code has it."""
    encoder = nn.Linear(POSE_DIM, dim)
    nn.init.zeros_(encoder.weight)
    nn.init.zeros_(encoder.bias)
    return encoder


def camera_projector(dim: int) -> nn.Linear:
    """`projector` after self-attention: the identity at the start."""
    projector = nn.Linear(dim, dim)
    nn.init.eye_(projector.weight)
    nn.init.zeros_(projector.bias)
    return projector


def frame_cameras(plan: TokenPlan, cameras_BVFP: Tensor) -> Tensor:
    """The 12-vector of every frame of the plan [B, R, 12] from the tracks [B, V, F, 12]."""
    rows = []
    for segment in plan.segments:
        track = segment.camera or 0
        if track >= cameras_BVFP.shape[1] or segment.num_frames > cameras_BVFP.shape[2]:
            raise ValueError(
                f"{segment.role} needs camera track {track} of {segment.num_frames} frames, "
                f"got tracks of shape {tuple(cameras_BVFP.shape)}"
            )
        rows.append(cameras_BVFP[:, track, : segment.num_frames])
    return torch.cat(rows, dim=1)
