"""Attention and VideoFOV's counts as benchmark cases; see `op_cases`.

Attention's backends are those that the operation itself reports, with its reasons.
"""

from __future__ import annotations

import torch
from bench_retrieval import retrieval_inputs
from fused_cases import FUSED
from op_cases import DTYPE, MAKERS, Make, OpCase, random_tensors, sample
from torch import Tensor

from mv2v_engine.ops.attention import attention, attention_varlen
from mv2v_engine.ops.attention_backends import availability
from mv2v_engine.ops.backend import missing_reason
from mv2v_engine.ops.fov_overlap import fov_overlap
from mv2v_engine.tokens.plan import TokenPlan


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every score in memory: for a few queries. Heads of [L, N, D]."""
    scores = torch.einsum("lnd,snd->nls", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("nls,snd->lnd", scores.softmax(-1), v)


def attention_cases(plan: TokenPlan, device: torch.device) -> list[OpCase]:
    """One sequence of the plan's length; and as many tokens as two unequal requests, packed."""
    heads, dim = plan.shape.num_attention_heads, plan.shape.attention_head_dim
    new = random_tensors(device)
    q, k, v = (new(plan.length, heads, dim) for _ in range(3))
    lengths = [plan.length - plan.length // 4, plan.length // 4]
    return [_dense_case(plan, q, k, v), _packed_case(plan, q, k, v, lengths)]


def _backends(plan: TokenPlan, device: torch.device, *, packed: bool) -> dict[str, str | None]:
    """Every library in the order in which it is asked; what `auto` falls back to if none serves."""
    heads, dim = plan.shape.num_attention_heads, plan.shape.attention_head_dim
    found = availability(device, dtype=DTYPE, num_heads=heads, head_dim=dim, packed=packed)
    return found if None in found.values() else {"auto": None, **found}


def _dense_case(plan: TokenPlan, q: Tensor, k: Tensor, v: Tensor) -> OpCase:
    rows = sample(len(q), q.device)
    return OpCase(
        op="attention",
        workload=f"{len(q):,} tokens, {q.shape[1]} heads",
        tokens=plan.length,
        width=plan.shape.dim,
        phases=((4 * q.nbytes, 4 * len(q) ** 2 * plan.shape.dim),),
        backends=_backends(plan, q.device, packed=False),
        run=lambda backend: attention(q[None], k[None], v[None], backend=backend),
        expected=lambda dtype: plain_attention(q[rows].to(dtype), k.to(dtype), v.to(dtype)),
        pick=lambda out: out[0, rows],
    )


def _packed_case(plan: TokenPlan, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> OpCase:
    starts = torch.tensor([0, *lengths], device=q.device).cumsum(0).int()
    firsts = [0, lengths[0]]
    rows = [first + sample(size, q.device) for first, size in zip(firsts, lengths, strict=True)]

    def run(backend: str) -> tuple[Tensor, Tensor]:
        return attention_varlen(
            q,
            k,
            v,
            cu_seqlens_q=starts,
            cu_seqlens_k=starts,
            max_seqlen_q=max(lengths),
            max_seqlen_k=max(lengths),
            backend=backend,
        )

    def expected(dtype: torch.dtype) -> Tensor:
        parts = []
        for first, size, chosen in zip(firsts, lengths, rows, strict=True):
            keys = slice(first, first + size)
            parts.append(plain_attention(q[chosen].to(dtype), k[keys].to(dtype), v[keys].to(dtype)))
        return torch.cat(parts)

    return OpCase(
        op="attention_varlen",
        workload=f"{' + '.join(f'{size:,}' for size in lengths)} tokens, {q.shape[1]} heads",
        tokens=plan.length,
        width=plan.shape.dim,
        phases=((4 * q.nbytes, 4 * sum(size**2 for size in lengths) * plan.shape.dim),),
        backends=_backends(plan, q.device, packed=True),
        run=run,
        expected=expected,
        pick=lambda result: result[0][torch.cat(rows)],
    )


def fov_overlap_cases(plan: TokenPlan, device: torch.device) -> list[OpCase]:
    """Fifty videos against the requested one; counts are the same to the last one everywhere."""
    videos, num_frames = (50, 81) if plan.shape.dim >= 1536 else (3, 5)
    points, planes, frames = retrieval_inputs(videos, num_frames)
    points, planes = points.to(device), planes.to(device)
    native = missing_reason("cuda", "fov_overlap", device)
    return [
        OpCase(
            op="fov_overlap",
            workload=f"{len(points):,} points, {videos} videos of {num_frames} frames",
            tokens=plan.length,
            width=plan.shape.dim,
            phases=(),
            backends={"reference": None, "cuda": native},
            run=lambda backend: fov_overlap(points, planes, frames=frames, backend=backend),  # type: ignore[arg-type]
            expected=lambda dtype: fov_overlap(
                points.cpu(), planes.cpu(), frames=frames, backend="reference"
            ).to(points.device, dtype),
            pick=lambda counts: counts,
        )
    ]


ALL_MAKERS: dict[str, Make] = MAKERS | FUSED | {"attention": attention_cases}
# what is the same for every plan is measured once
ONCE: dict[str, Make] = {"fov_overlap": fov_overlap_cases}
