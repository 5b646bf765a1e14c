"""Responsiveness of conditioning frames (METHOD 6, Eq. 4-5).

K_t = mean of the frame's keys; R_t = max over target queries of softmax over frames of
q K_t / sqrt(D). Keys and queries come before RoPE, since averaging rotated keys cancels phases.
Queries are taken in chunks: target x frames never stands in memory for all targets at once.

B batch, Q target queries, L conditioning tokens, C width, N heads, F frames.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mv2v_engine.ops.backend import check_tensors, define, implementation

_CHUNK = 1024


def frame_means(k_BLC: Tensor, frames: list[int], tokens: list[int]) -> Tensor:
    """Mean key of every frame, float32 [B, F, C]; runs of `frames` with `tokens` each."""
    lengths = [count * per_frame for count, per_frame in zip(frames, tokens, strict=True)]
    means = [
        run.float().unflatten(1, (count, per_frame)).mean(2)
        for run, count, per_frame in zip(k_BLC.split(lengths, 1), frames, tokens, strict=True)
    ]
    return torch.cat(means, dim=1)


def frame_responsiveness_reference(
    q_BQC: Tensor, k_BLC: Tensor, frames: list[int], tokens: list[int], num_heads: int
) -> Tensor:
    means_BNFD = frame_means(k_BLC, frames, tokens).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    scale = means_BNFD.shape[-1] ** -0.5
    best = q_BQC.new_zeros((len(q_BQC), sum(frames)), dtype=torch.float32)
    for chunk in q_BQC.split(_CHUNK, dim=1):
        chunk_BNQD = chunk.float().unflatten(-1, (num_heads, -1)).transpose(1, 2)
        share = (chunk_BNQD @ means_BNFD.transpose(-1, -2) * scale).softmax(-1)
        best = torch.maximum(best, share.mean(1).amax(1))
    return best


def _fake(q: Tensor, k: Tensor, frames: list[int], tokens: list[int], num_heads: int) -> Tensor:
    return q.new_empty((q.shape[0], sum(frames)), dtype=torch.float32)


_frame_responsiveness = define(
    "frame_responsiveness",
    "(Tensor q, Tensor k, int[] frames, int[] tokens, int num_heads) -> Tensor",
    frame_responsiveness_reference,
    _fake,
)


def frame_responsiveness(
    q: Tensor,
    k: Tensor,
    *,
    frames: list[int],
    tokens: list[int],
    num_heads: int = 1,
    backend: str = "reference",
) -> Tensor:
    """q [B, Q, C], k [B, L, C] -> responsiveness [B, F] in 0..1, float32.

    frames, tokens: the runs of k, `frames[r]` frames of `tokens[r]` tokens. num_heads: 1 scores
    all channels as one vector, as Eq. 5 is written; more average the heads' softmaxes.

    Raises:
        TypeError, ValueError: a dtype, device or shape is not the one above, or there is no query,
            no frame, or a frame of no token.
        KernelUnavailableError: the backend was asked for by name and cannot run here.
    """
    check_tensors(q, floating={"k": k})
    if q.ndim != 3 or k.ndim != 3 or (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2]):
        raise ValueError(
            "q must have shape [B, Q, C] and k [B, L, C], "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if num_heads < 1 or q.shape[2] % num_heads:
        raise ValueError(f"{num_heads} heads do not divide a width of {q.shape[2]}")
    if not q.shape[1]:
        raise ValueError("q must hold at least one query, got none")
    if not frames or len(frames) != len(tokens) or min(*frames, *tokens) < 1:
        raise ValueError(
            "frames and tokens must be equally many positive counts, at least one, "
            f"got {frames} and {tokens}"
        )
    covered = sum(count * per_frame for count, per_frame in zip(frames, tokens, strict=True))
    if covered != k.shape[1]:
        raise ValueError(f"runs {frames} x {tokens} cover {covered} tokens, k has {k.shape[1]}")
    run = implementation(
        backend, "frame_responsiveness", q, frame_responsiveness_reference, _frame_responsiveness
    )
    result: Tensor = run(q, k, frames, tokens, num_heads)
    return result
