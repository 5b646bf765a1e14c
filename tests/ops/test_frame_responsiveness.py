"""Responsiveness against a float64 loop over queries and frames, as Eq. 4-5 are written."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mv2v_engine.ops import frame_responsiveness as module
from mv2v_engine.ops.frame_responsiveness import frame_responsiveness
from mv2v_engine.testing import assert_within_budget

CASES = [  # batch, queries, width, runs of (frames, tokens per frame)
    pytest.param(1, 1, 2, [(1, 1)], id="smallest"),
    pytest.param(2, 37, 24, [(3, 60), (3, 15), (2, 6)], id="three-grids"),
    pytest.param(1, 9, 12, [(2, 15), (1, 60), (4, 15)], id="a-grid-twice"),
]


def _inputs(
    batch: int, queries: int, width: int, runs: list[tuple[int, int]], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    torch.manual_seed(queries)
    length = sum(frames * tokens for frames, tokens in runs)
    q, k = torch.randn(batch, queries, width), torch.randn(batch, length, width)
    return (2 * q).to(dtype), k.to(dtype)


def _naive(q: Tensor, k: Tensor, runs: list[tuple[int, int]], num_heads: int) -> Tensor:
    """One query and one frame after the other, in the dtype given."""
    frames, start = [], 0
    for count, tokens in runs:
        for _ in range(count):
            frames.append(k[:, start : start + tokens])
            start += tokens
    result = torch.zeros(len(q), len(frames), dtype=q.dtype)
    dim = q.shape[-1] // num_heads
    for sample in range(len(q)):
        means = [frame[sample].mean(0) for frame in frames]
        for query in q[sample]:
            shares = torch.zeros(len(frames), dtype=q.dtype)
            for head in range(num_heads):
                part = slice(head * dim, (head + 1) * dim)
                scores = [torch.dot(query[part], mean[part]) / math.sqrt(dim) for mean in means]
                shares += torch.stack(scores).softmax(0) / num_heads
            result[sample] = torch.maximum(result[sample], shares)
    return result


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("num_heads", [1, 2], ids=["concat", "mean"])
@pytest.mark.parametrize(("batch", "queries", "width", "runs"), CASES)
def test_matches_a_loop(
    batch: int,
    queries: int,
    width: int,
    runs: list[tuple[int, int]],
    num_heads: int,
    backend: str,
) -> None:
    q, k = _inputs(batch, queries, width, runs, torch.float32)
    frames, tokens = [list(column) for column in zip(*runs, strict=True)]
    got = frame_responsiveness(
        q, k, frames=frames, tokens=tokens, num_heads=num_heads, backend=backend
    )
    oracle = _naive(q.double(), k.double(), runs, num_heads)
    assert_within_budget(got, oracle, _naive(q, k, runs, num_heads))
    assert got.dtype == torch.float32 and bool(((got > 0) & (got <= 1)).all())


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_more_queries_and_frames_than_a_tile(dtype: torch.dtype, backend: str) -> None:
    frames, tokens = [70, 61, 19], [1, 3, 2]
    q, k = _inputs(1, 131, 20, list(zip(frames, tokens, strict=True)), dtype)
    lengths = [per_frame for n, per_frame in zip(frames, tokens, strict=True) for _ in range(n)]
    means = torch.stack([frame.mean(1) for frame in k.double().split(lengths, 1)], 1)
    oracle = _shares(q.double(), means)
    # kernels on 16-bit keys hold a mean as two 16-bit parts
    first = _part(means, dtype)
    eager = _shares(q.float(), (first + _part(means - first, dtype)).float())
    got = frame_responsiveness(q, k, frames=frames, tokens=tokens, backend=backend)
    assert_within_budget(got, oracle, eager)


def _part(means: Tensor, dtype: torch.dtype) -> Tensor:
    """What of the means a dtype holds; bfloat16 cut off, as the interpreter does (a GPU rounds)."""
    if dtype != torch.bfloat16:
        return means.to(dtype).double()
    return (means.float().view(torch.int32) & ~0xFFFF).view(torch.float32).double()


def _shares(q: Tensor, means: Tensor) -> Tensor:
    return (q @ means.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1).amax(1)


def test_bfloat16_inputs_are_scored_in_float32() -> None:
    runs = [(3, 60), (3, 15)]
    q, k = _inputs(1, 11, 24, runs, torch.bfloat16)
    got = frame_responsiveness(q, k, frames=[3, 3], tokens=[60, 15])
    oracle = _naive(q.double(), k.double(), runs, 1)
    assert_within_budget(got, oracle, _naive(q.float(), k.float(), runs, 1))


def test_chunks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = _inputs(2, 1025, 16, [(5, 4)], torch.float32)
    whole = frame_responsiveness(q, k, frames=[5], tokens=[4])
    one_by_one = torch.stack(
        [frame_responsiveness(q[:, i : i + 1], k, frames=[5], tokens=[4]) for i in range(1025)]
    ).amax(0)
    torch.testing.assert_close(whole, one_by_one)
    for chunk in (1, 7, 1024, 4096):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        torch.testing.assert_close(
            frame_responsiveness(q, k, frames=[5], tokens=[4]), whole, rtol=1e-6, atol=0
        )


def test_equal_frames_get_equal_scores() -> None:
    q, k = _inputs(1, 9, 12, [(1, 15)], torch.float32)
    got = frame_responsiveness(q, k.repeat(1, 4, 1), frames=[4], tokens=[15])
    assert torch.equal(got, torch.full((1, 4), 0.25))


@pytest.mark.parametrize("num_heads", [1, 2])
def test_opcheck(num_heads: int) -> None:
    q, k = _inputs(2, 5, 8, [(2, 3), (1, 4)], torch.float32)
    operation = torch.ops.mv2v.frame_responsiveness.default
    torch.library.opcheck(operation, (q, k, [2, 1], [3, 4], num_heads))
