"""Cameras as actions of frames, attention over frames, and a state that runs through them.

Echo-Memory (2606.09803): in every block a linear layer of a frame's camera is added to its tokens;
where there is attention over frames, it is given these, each place of a frame by itself and without
positions, and only what it makes is added. Blocks with a state-space memory pass a decaying mean
through the frames, context first, after self-attention.

B batch, L tokens, F frames of a sample, P places of a frame, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mv2v_engine.models.sequence import Sequence

POSE_DIM = 12
# the unit of its translations, as the dataset's engine has them; inferred
_PER_METRE = 100.0
# the least and the most of a state-space memory's result that is added
_LEAST, _MOST = 0.1, 0.2


class CameraActions(nn.Module):
    """`action_mlp`: what a frame's camera adds to its tokens; zero at the start."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(POSE_DIM, dim)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, sequence: Sequence) -> Tensor:
        """[B, L, C]."""
        assert sequence.cameras is not None
        actions = planar(sequence.cameras[..., :POSE_DIM]).to(self.proj.weight.dtype)
        rows: Tensor = self.proj(actions)
        places = sequence.token_frames[..., None].expand(-1, -1, rows.shape[-1])
        return rows.gather(1, places)


def planar(cameras_BRP: Tensor) -> Tensor:
    """Row-major [R|t] as twelve numbers t, R of a camera that moves in the plane and turns in it.

    The axes are forward, left and up, of which the camera's height, pitch and roll are left out, as
    in training; a turn to the left is positive, as its authors' presets name it.
    """
    pose = cameras_BRP.float().unflatten(-1, (3, 4))
    # OpenCV's axes: x right, y down, z forward
    forward, left = pose[..., 2, 2], -pose[..., 0, 2]
    length = (forward.square() + left.square()).sqrt().clamp(min=1e-6)
    cos, sin = forward / length, left / length
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    x, y = _PER_METRE * pose[..., 2, 3], -_PER_METRE * pose[..., 0, 3]
    return torch.stack([x, y, zero, cos, -sin, zero, sin, cos, zero, zero, zero, one], -1)


def by_place(x_BLC: Tensor, num_frames: int) -> Tensor:
    """The tokens of all frames at each place: [B * P, F, C]."""
    places: Tensor = x_BLC.unflatten(1, (num_frames, -1)).transpose(1, 2).flatten(0, 1)
    return places


def by_frame(x_PFC: Tensor, batch: int) -> Tensor:
    """The inverse: [B, L, C]."""
    frames: Tensor = x_PFC.unflatten(0, (batch, -1)).transpose(1, 2).flatten(1, 2)
    return frames


class StateSpaceMemory(nn.Module):
    """`block_wise_ssm`, its causal second version: from the context through the target's frames."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.decay_logit = nn.Parameter(torch.zeros(dim))
        self.norm = nn.LayerNorm(dim)
        self.residual_logit = nn.Parameter(torch.zeros(1))

    def forward(self, x_BLC: Tensor, num_frames: int, num_target: int) -> Tensor:
        """Tokens [B, L, C] of frames of which the target's are the first ones."""
        frames = by_place(x_BLC, num_frames)
        ordered = torch.cat([frames[:, num_target:], frames[:, :num_target]], 1)
        update, gate = self.in_proj(self.norm(ordered)).chunk(2, -1)
        update, gate = update.tanh(), gate.sigmoid()
        decay = self.decay_logit.sigmoid()
        state, states = torch.zeros_like(update[:, 0]), []
        for each in update.unbind(1):
            state = decay * state + (1 - decay) * each
            states.append(state)
        result = self.out_proj(torch.stack(states, 1) * gate)
        context = num_frames - num_target
        result = torch.cat([result[:, context:], result[:, :context]], 1)
        scale = _LEAST + (_MOST - _LEAST) * self.residual_logit.sigmoid()
        return x_BLC + scale * by_frame(result, len(x_BLC))
