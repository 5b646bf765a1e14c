"""The merge operation against a loop over frames and windows, every kind of weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from mv2v_engine.ops.token_merge import token_merge
from mv2v_engine.testing import assert_within_budget

GRIDS = [(2, 2), (4, 10), (3, 5), (1, 7), (5, 4)]
WIDTH, ROTARY = 12, 6
KERNELS: dict[str, tuple[int, int]] = {"1x2": (1, 2), "3x3": (3, 3)}


def _inputs(
    grid: tuple[int, int], dtype: torch.dtype, *, frames: int = 5, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(grid[0] * 31 + grid[1])
    x = torch.randn(batch, frames, grid[0] * grid[1], WIDTH).to(dtype)
    rope = torch.randn(1, frames, grid[0] * grid[1], ROTARY)
    order = torch.stack([torch.randperm(frames) for _ in range(batch)])
    return x, rope, order[:, :3].sort(1).values, order[:, 3:].sort(1).values


def _weight(kind: str, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, tuple[int, int]]:
    torch.manual_seed(1)
    kernel = KERNELS.get(kind, (2, 2))
    bias = torch.randn(WIDTH).to(dtype)
    if kind == "average":
        return None, None, kernel
    if kind == "pooled":
        return torch.randn(WIDTH, WIDTH).to(dtype), bias, kernel
    inner = {"depth-wise": 1, "groups": WIDTH // 3}.get(kind, WIDTH)
    weight = torch.randn(WIDTH, inner, *kernel).to(dtype)
    return weight, None if kind == "no bias" else bias, kernel


def _windows(frame_PC: Tensor, grid: tuple[int, int], kernel: tuple[int, int]) -> Tensor:
    """[windows, kernel rows, kernel columns, C]; indices past the border read the border."""
    image = frame_PC.reshape(*grid, -1)
    windows = []
    for top in range(0, grid[0], kernel[0]):
        for left in range(0, grid[1], kernel[1]):
            rows = [min(top + i, grid[0] - 1) for i in range(kernel[0])]
            columns = [min(left + i, grid[1] - 1) for i in range(kernel[1])]
            windows.append(image[rows][:, columns])
    return torch.stack(windows)


def _naive(
    x: Tensor,
    rope: Tensor,
    kept: Tensor,
    merged: Tensor,
    grid: tuple[int, int],
    kernel: tuple[int, int],
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows, ropes = [], []
    for sample in range(len(x)):
        tokens = [x[sample, index] for index in kept[sample]]
        turns = [rope[0, index] for index in kept[sample]]
        for index in merged[sample]:
            windows = _windows(x[sample, index], grid, kernel)
            if weight is None:
                fused = windows.mean((1, 2))
            elif weight.ndim == 2:
                fused = windows.mean((1, 2)) @ weight.T
            else:
                groups, inner = WIDTH // weight.shape[1], weight.shape[1]
                outs = WIDTH // groups
                parts = [
                    torch.einsum(
                        "wrsc,ocrs->wo",
                        windows[..., g * inner : (g + 1) * inner],
                        weight[g * outs : (g + 1) * outs],
                    )
                    for g in range(groups)
                ]
                fused = torch.cat(parts, -1)
            tokens.append(fused if bias is None else fused + bias)
            turns.append(_windows(rope[0, index], grid, kernel).mean((1, 2)))
        rows.append(torch.cat(tokens))
        ropes.append(torch.cat(turns))
    return torch.stack(rows), torch.stack(ropes)


def _eager(
    x: Tensor,
    rope: Tensor,
    kept: Tensor,
    merged: Tensor,
    grid: tuple[int, int],
    kernel: tuple[int, int],
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Plain torch: the loop, and torch's own convolution, whose rounding differs by algorithm."""
    tokens, turns = _naive(x, rope, kept, merged, grid, kernel, weight, bias)
    if weight is not None and weight.ndim == 4:
        axes = [
            torch.arange(-(-size // step) * step).clamp_max(size - 1)
            for size, step in zip(grid, kernel, strict=True)
        ]
        frames = torch.stack([row[index] for row, index in zip(x, merged, strict=True)])
        images = frames.flatten(0, 1).unflatten(1, grid)[:, axes[0]][:, :, axes[1]]
        groups = WIDTH // weight.shape[1]
        fused = conv2d(images.movedim(-1, 1), weight, bias, stride=kernel, groups=groups)
        fused = fused.flatten(2).transpose(1, 2).reshape(len(x), -1, WIDTH)
        tokens = torch.cat([tokens[:, : -fused.shape[1]], fused], 1)
    return tokens, turns


KINDS = ["dense", "no bias", "depth-wise", "groups", "pooled", "average", "1x2", "3x3"]


# every kind on whole and on odd grids, the usual one on all grids
LOOPS = [(kind, grid) for kind in KINDS for grid in GRIDS if kind == "dense" or grid in GRIDS[1:3]]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("kind", "grid"), LOOPS, ids=str)
def test_matches_a_loop(kind: str, grid: tuple[int, int], backend: str) -> None:
    x, rope, kept, merged = _inputs(grid, torch.float32)
    weight, bias, kernel = _weight(kind, torch.float32)
    got = token_merge(
        x, rope, kept, merged, grid=grid, kernel=kernel, weight=weight, bias=bias, backend=backend
    )
    wide = [None if t is None else t.double() for t in (weight, bias)]
    oracle = _naive(x.double(), rope.double(), kept, merged, grid, kernel, *wide)
    eager = _eager(x, rope, kept, merged, grid, kernel, weight, bias)
    for value, exact, plain in zip(got, oracle, eager, strict=True):
        assert_within_budget(value, exact, plain)
    # kept frames pass untouched
    assert torch.equal(got[0][:, : 3 * grid[0] * grid[1]], eager[0][:, : 3 * grid[0] * grid[1]])


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("kind", ["dense", "pooled", "average"])
def test_bfloat16(kind: str, backend: str) -> None:
    x, rope, kept, merged = _inputs((4, 10), torch.bfloat16)
    weight, bias, kernel = _weight(kind, torch.bfloat16)
    got = token_merge(
        x,
        rope,
        kept,
        merged,
        grid=(4, 10),
        kernel=kernel,
        weight=weight,
        bias=bias,
        backend=backend,
    )
    wide = [None if t is None else t.double() for t in (weight, bias)]
    oracle = _naive(x.double(), rope.double(), kept, merged, (4, 10), kernel, *wide)
    eager = _eager(x, rope, kept, merged, (4, 10), kernel, weight, bias)
    assert_within_budget(got[0], oracle[0], eager[0])
    assert got[1].dtype == torch.float32  # positions are never rounded


def test_an_empty_selection_discards() -> None:
    x, rope, kept, merged = _inputs((3, 5), torch.float32)
    tokens, turns = token_merge(x, rope, kept, merged[:, :0], grid=(3, 5), backend="auto")
    assert tokens.shape == (2, 3 * 15, WIDTH) and turns.shape == (2, 3 * 15, ROTARY)
    assert torch.equal(tokens, torch.stack([x[b, kept[b]].flatten(0, 1) for b in range(2)]))


def test_all_frames_may_merge() -> None:
    x, rope, kept, _ = _inputs((3, 5), torch.float32)
    everything = torch.arange(5).expand(2, -1)
    tokens, turns = token_merge(x, rope, kept[:, :0], everything, grid=(3, 5), backend="auto")
    assert tokens.shape == (2, 5 * 6, WIDTH) and turns.shape == (2, 5 * 6, ROTARY)


@pytest.mark.parametrize("kind", ["dense", "average"])
@pytest.mark.parametrize("num_merged", [2, 0])
def test_opcheck(kind: str, num_merged: int) -> None:
    x, rope, kept, merged = _inputs((3, 5), torch.float32)
    weight, bias, kernel = _weight(kind, torch.float32)
    arguments = (x, rope, kept, merged[:, :num_merged], weight, bias, [3, 5], list(kernel))
    torch.library.opcheck(torch.ops.mv2v.token_merge.default, arguments)


def test_strided_inputs() -> None:
    x, rope, kept, merged = _inputs((3, 5), torch.float32)
    weight, bias, _ = _weight("dense", torch.float32)
    turned = x.movedim(-1, 0).contiguous().movedim(0, -1)

    def run(x: Tensor, rope: Tensor, kept: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return token_merge(
            x, rope, kept, merged, grid=(3, 5), weight=weight, bias=bias, backend="auto"
        )

    assert weight is not None
    expected = run(x, rope.repeat(2, 1, 1, 1), kept, weight)
    for got in (
        run(turned, rope, kept.t().contiguous().t(), weight.to(memory_format=torch.channels_last)),
        run(x, rope.expand(2, -1, -1, -1), kept, weight),
    ):
        for value, plain in zip(got, expected, strict=True):
            torch.testing.assert_close(value, plain)
