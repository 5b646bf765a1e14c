"""Each operation at the shapes of real turns: inputs, float64 oracle, bytes and FLOPs at least.

A case's `plain` composition of library calls is its oracle in float64, and in the case's own dtype
the eager torch that error budgets and benchmarks compare with. Operations on single tokens are
checked on a sample of them.

B batch, L tokens, C width, N heads, D head dim, F frames, P tokens of a frame, M merged frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mv2v_engine.config import WAN_1_3B
from mv2v_engine.ops.adaln import adaln, adaln_reference
from mv2v_engine.ops.backend import missing_reason
from mv2v_engine.ops.frame_responsiveness import frame_responsiveness
from mv2v_engine.ops.gated_residual import gated_residual, gated_residual_reference
from mv2v_engine.ops.prope import prope, prope_reference
from mv2v_engine.ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from mv2v_engine.ops.rope import rope, rope_reference
from mv2v_engine.ops.token_merge import token_merge, token_merge_reference
from mv2v_engine.testing import tiny_config
from mv2v_engine.tokens.plan import TokenPlan, novel_view_plan, turn_plan

DTYPE = torch.bfloat16
SAMPLED = 64
EPS = 1e-6


@dataclass(frozen=True, kw_only=True, eq=False)
class OpCase:
    """One operation on one turn's shapes.

    phases: (bytes, FLOPs) that follow each other at least; bytes count every input and output
    once. backends: names that `run` takes, each with the reason why it cannot run here, or None.
    expected: `plain` in a dtype, for what `pick` takes of a result. functional: `plain` on the
    whole inputs. compilable: for torch.compile, the reference. None where they would not fit.
    """

    op: str
    workload: str
    tokens: int
    width: int
    phases: tuple[tuple[int, int], ...]
    backends: dict[str, str | None]
    run: Callable[[str], Any]
    expected: Callable[[torch.dtype], Tensor]
    pick: Callable[[Any], Tensor]
    functional: Callable[[], Any] | None = None
    compilable: Callable[[], Any] | None = None


Make = Callable[[TokenPlan, torch.device], list[OpCase]]


def plans(*, tiny: bool) -> Iterator[TokenPlan]:
    """Turns with three, no and ten memory videos at widths 1536 and 3072; tiny: one of width 24."""
    if tiny:
        yield turn_plan(tiny_config(), (3, 12, 20), (4, 8), fraction=0.5)
        return
    for num_heads in (12, 24):
        shape = replace(WAN_1_3B, num_attention_heads=num_heads)
        for memory in (3, 0, 10):
            yield novel_view_plan(memory=memory, shape=shape)


def sample(count: int, device: torch.device) -> Tensor:
    """Indices of evenly spread rows, first and last among them."""
    return torch.linspace(0, count - 1, min(count, SAMPLED), device=device).long()


def backends_of(op: str, device: torch.device) -> dict[str, str | None]:
    return {"reference": None, "triton": missing_reason("triton", op, device)}


def random_tensors(device: torch.device) -> Callable[..., Tensor]:
    """Random tensors of the case's dtype, the same in every run."""
    generator = torch.Generator(device).manual_seed(0)

    def new(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    return new


def frame_numbers(plan: TokenPlan, device: torch.device) -> Tensor:
    """Every token's frame in the frame table: int64 [1, L]."""
    table = plan.frame_table
    numbers = [index for index, span in enumerate(table) for _ in range(span.start, span.stop)]
    return torch.tensor(numbers, device=device)[None]


def plain_adaln(
    x: Tensor, scale: Tensor, shift: Tensor, camera: Tensor, frame: Tensor, eps: float
) -> Tensor:
    """Camera rows [F, C] of a batch of one."""
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    modulated = torch.addcmul(shift.to(x.dtype)[:, None], normed, 1 + scale.to(x.dtype)[:, None])
    return modulated + camera[0].to(x.dtype)[frame[0]]


def adaln_cases(plan: TokenPlan, device: torch.device) -> list[OpCase]:
    length, width = plan.length, plan.shape.dim
    new, frame = random_tensors(device), frame_numbers(plan, device)
    x, camera = new(1, length, width), new(1, len(plan.frame_table), width)
    scale, shift = new(1, width, dtype=torch.float32), new(1, width, dtype=torch.float32)
    rows = sample(length, device)

    def expected(dtype: torch.dtype) -> Tensor:
        return plain_adaln(
            x[:, rows].to(dtype), scale.to(dtype), shift.to(dtype), camera, frame[:, rows], EPS
        )

    case = OpCase(
        op="adaln",
        workload=f"{length:,} tokens with cameras",
        tokens=length,
        width=width,
        phases=((2 * x.nbytes + camera.nbytes + frame.nbytes, 0),),
        backends=backends_of("adaln", device),
        run=lambda backend: adaln(
            x, scale, shift, camera=camera, frame=frame, eps=EPS, backend=backend
        ),
        functional=lambda: plain_adaln(x, scale, shift, camera, frame, EPS),
        compilable=lambda: adaln_reference(x, scale, shift, camera, frame, None, EPS),
        expected=expected,
        pick=lambda out: out[:, rows],
    )
    return [case]


def plain_gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return torch.addcmul(x, y, gate.to(x.dtype)[:, None])


def gated_residual_cases(plan: TokenPlan, device: torch.device) -> list[OpCase]:
    length, width, new = plan.length, plan.shape.dim, random_tensors(device)
    x, y = new(1, length, width), new(1, length, width)
    gate, rows = new(1, width, dtype=torch.float32), sample(length, device)
    case = OpCase(
        op="gated_residual",
        workload=f"{length:,} tokens",
        tokens=length,
        width=width,
        phases=((3 * x.nbytes, 0),),
        backends=backends_of("gated_residual", device),
        run=lambda backend: gated_residual(x, y, gate, backend=backend),
        functional=lambda: plain_gated_residual(x, y, gate),
        compilable=lambda: gated_residual_reference(x, y, gate, None),
        expected=lambda dtype: plain_gated_residual(
            x[:, rows].to(dtype), y[:, rows].to(dtype), gate.to(dtype)
        ),
        pick=lambda out: out[:, rows],
    )
    return [case]


def plain_qk_norm_rope(x: Tensor, weight: Tensor, rope: Tensor, heads: int, eps: float) -> Tensor:
    """The rotation in float32 at least, as one product of complex numbers."""
    normed = F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
    wide = normed if x.dtype == torch.float64 else normed.float()
    pairs = torch.view_as_complex(wide.unflatten(-1, (heads, -1, 2)))
    turn = torch.complex(*rope.to(wide.dtype).chunk(2, -1))[:, :, None]
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def qk_norm_rope_cases(plan: TokenPlan, device: torch.device) -> list[OpCase]:
    length, width, heads = plan.length, plan.shape.dim, plan.shape.num_attention_heads
    new, rows = random_tensors(device), sample(length, device)
    x, weight = new(1, length, width), 1 + 0.1 * new(width)
    rope = new(1, length, width // heads, dtype=torch.float32)
    case = OpCase(
        op="qk_norm_rope",
        workload=f"{length:,} tokens, {heads} heads",
        tokens=length,
        width=width,
        phases=((2 * x.nbytes + rope.nbytes, 0),),
        backends=backends_of("qk_norm_rope", device),
        run=lambda backend: qk_norm_rope(
            x, weight, rope, num_heads=heads, eps=EPS, backend=backend
        ),
        functional=lambda: plain_qk_norm_rope(x, weight, rope, heads, EPS),
        compilable=lambda: qk_norm_rope_reference(x, weight, rope, heads, EPS),
        expected=lambda dtype: plain_qk_norm_rope(
            x[:, rows].to(dtype), weight.to(dtype), rope[:, rows], heads, EPS
        ),
        pick=lambda out: out[:, rows],
    )
    return [case]


def plain_rope(x: Tensor, table: Tensor) -> Tensor:
    """The rotation of `plain_qk_norm_rope` alone."""
    wide = x if x.dtype == torch.float64 else x.float()
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    turn = torch.complex(*table.to(wide.dtype).chunk(2, -1))[:, :, None]
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def rope_cases(plan: TokenPlan, device: torch.device) -> list[OpCase]:
    """The keys of all tokens of the plan, which a stream's cache holds unrotated."""
    length, shape, new = plan.length, plan.shape, random_tensors(device)
    heads, rows = (shape.num_attention_heads, shape.attention_head_dim), sample(length, device)
    x, table = new(1, length, *heads), new(1, length, heads[1], dtype=torch.float32)
    case = OpCase(
        op="rope",
        workload=f"{length:,} tokens, {heads[0]} heads",
        tokens=length,
        width=shape.dim,
        phases=((2 * x.nbytes + table.nbytes, 0),),
        backends=backends_of("rope", device),
        run=lambda backend: rope(x, table, backend=backend),
        functional=lambda: plain_rope(x, table),
        compilable=lambda: rope_reference(x, table),
        expected=lambda dtype: plain_rope(x[:, rows].to(dtype), table[:, rows]),
        pick=lambda out: out[:, rows],
    )
    return [case]


def plain_prope(x: Tensor, matrix: Tensor, frame: Tensor) -> Tensor:
    """All channels of a batch of one, in float32 at least."""
    wide = x if x.dtype == torch.float64 else x.float()
    quads = wide[0].unflatten(-1, (-1, 4)).flatten(1, 2)
    return torch.bmm(quads, matrix[0].mT.to(wide.dtype)[frame[0]]).view_as(x).to(x.dtype)


def prope_cases(plan: TokenPlan, device: torch.device) -> list[OpCase]:
    """The fused form's: every channel of every head."""
    length, shape, new = plan.length, plan.shape, random_tensors(device)
    heads, rows = (shape.num_attention_heads, shape.attention_head_dim), sample(length, device)
    x, frame = new(1, length, *heads), frame_numbers(plan, device)
    matrix = new(1, len(plan.frame_table), 4, 4, dtype=torch.float32)
    channels = shape.attention_head_dim
    case = OpCase(
        op="prope",
        workload=f"{length:,} tokens, {heads[0]} heads",
        tokens=length,
        width=shape.dim,
        phases=((2 * x.nbytes + matrix.nbytes + frame.nbytes, 0),),
        backends=backends_of("prope", device),
        run=lambda backend: prope(x, matrix, frame, channels=channels, backend=backend),
        functional=lambda: plain_prope(x, matrix, frame),
        compilable=lambda: prope_reference(x, matrix, frame, channels),
        expected=lambda dtype: plain_prope(x[:, rows].to(dtype), matrix, frame[:, rows]),
        pick=lambda out: out[:, rows],
    )
    return [case]


def plain_frame_responsiveness(
    q: Tensor, k: Tensor, frames: list[int], tokens: list[int]
) -> Tensor:
    """Every query at once; a batch of one, all channels as one vector, scores in float32."""
    lengths = [count * size for count, size in zip(frames, tokens, strict=True)]
    runs = zip(k[0].split(lengths), frames, tokens, strict=True)
    means = torch.cat([run.unflatten(0, (count, size)).mean(1) for run, count, size in runs])
    scores = q[0] @ means.T * q.shape[-1] ** -0.5
    wide = scores if q.dtype == torch.float64 else scores.float()
    best: Tensor = wide.softmax(-1).amax(0)[None]
    return best


def frame_responsiveness_cases(plan: TokenPlan, device: torch.device) -> list[OpCase]:
    """Means first, then the product: its queries and the keys cannot be read at once."""
    runs, width, new = plan.layout.runs[1:], plan.shape.dim, random_tensors(device)
    frames = [run.num_frames for run in runs]
    tokens = [run.tokens_per_frame for run in runs]
    q = new(1, plan.target.length, width)
    k = new(1, plan.length - plan.target.length, width)
    flops = 2 * plan.target.length * sum(frames) * width
    case = OpCase(
        op="frame_responsiveness",
        workload=f"{plan.target.length:,} queries, {sum(frames)} frames of {k.shape[1]:,} tokens",
        tokens=plan.length,
        width=width,
        phases=((k.nbytes, 0), (q.nbytes, flops)),
        backends=backends_of("frame_responsiveness", device),
        run=lambda backend: frame_responsiveness(
            q, k, frames=frames, tokens=tokens, backend=backend
        ),
        functional=lambda: plain_frame_responsiveness(q, k, frames, tokens),
        # the reference loops over chunks of queries, each of which would be compiled
        compilable=lambda: plain_frame_responsiveness(q, k, frames, tokens),
        expected=lambda dtype: plain_frame_responsiveness(q.to(dtype), k.to(dtype), frames, tokens),
        pick=lambda out: out,
    )
    return [case]


def plain_token_merge(
    x: Tensor, kept: Tensor, merged: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int]
) -> Tensor:
    """Windows of 2 x 2 side by side, times the flattened weight; a batch of one."""
    images = x[0, merged[0]].unflatten(1, grid)
    for dim, size in zip((1, 2), grid, strict=True):
        if size % 2:
            images = torch.cat([images, images.narrow(dim, size - 1, 1)], dim)
    cells = images.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 5, 2, 4)
    fused = F.linear(cells.flatten(3).flatten(0, 2), weight.flatten(1), bias)
    return torch.cat([x[0, kept[0]].flatten(0, 1), fused])[None]


def token_merge_cases(plan: TokenPlan, device: torch.device) -> list[OpCase]:
    """The source's frames at the plan's first merge, and all of them: the product by itself."""
    group = plan.merge_steps[0].groups[0]
    grid, width, new = (group.rows, group.columns), plan.shape.dim, random_tensors(device)
    per_frame, windows = grid[0] * grid[1], -(-grid[0] // 2) * -(-grid[1] // 2)
    x = new(1, group.num_frames, per_frame, width)
    rope = new(1, group.num_frames, per_frame, plan.shape.attention_head_dim, dtype=torch.float32)
    weight = new(width, width, 2, 2) / (4 * width) ** 0.5
    bias = new(width)
    order = torch.arange(group.num_frames, device=device).flip(0)[None]

    def case(num_merged: int) -> OpCase:
        merged, kept = order[:, :num_merged], order[:, num_merged:]
        out = kept.shape[1] * per_frame + num_merged * windows
        moved = (group.num_frames * per_frame + out) * (2 * width + 4 * rope.shape[-1])
        functional = x, kept, merged, weight, bias, grid
        arguments = x, rope, kept, merged, weight, bias, list(grid), [2, 2]
        return OpCase(
            op="token_merge",
            workload=f"{num_merged} of {group.num_frames} frames of {grid[0]} x {grid[1]}",
            tokens=plan.length,
            width=width,
            phases=((moved + weight.nbytes, 2 * num_merged * windows * 4 * width**2),),
            backends=backends_of("token_merge", device),
            run=lambda backend: token_merge(
                x, rope, kept, merged, grid=grid, weight=weight, bias=bias, backend=backend
            ),
            functional=lambda: (plain_token_merge(*functional),),
            compilable=lambda: token_merge_reference(*arguments),
            expected=lambda dtype: plain_token_merge(
                x.to(dtype), kept, merged, weight.to(dtype), bias.to(dtype), grid
            ),
            pick=lambda result: result[0],
        )

    return [case(group.num_merged), case(group.num_frames)]


MAKERS: dict[str, Make] = {
    "adaln": adaln_cases,
    "gated_residual": gated_residual_cases,
    "qk_norm_rope": qk_norm_rope_cases,
    "rope": rope_cases,
    "prope": prope_cases,
    "frame_responsiveness": frame_responsiveness_cases,
    "token_merge": token_merge_cases,
}
