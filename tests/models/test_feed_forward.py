"""The feed-forward in chunks of tokens: the same numbers and work, fewer hidden rows at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mv2v_engine.counting import LiveBytes
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.feed_forward import FeedForward
from mv2v_engine.testing import assert_within_budget, randomise, tiny_config

DIM, HIDDEN, BATCH, LENGTH = 24, 112, 2, 50


@pytest.fixture
def layer() -> FeedForward:
    layer = FeedForward(DIM, HIDDEN)
    randomise(layer)
    return layer.double()


def _input(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, LENGTH, DIM, generator=generator, dtype=torch.float64).to(dtype)


def _calls(layer: FeedForward) -> list[int]:
    """Rows of every hidden product from here on."""
    rows: list[int] = []
    layer.net[0].register_forward_hook(lambda _, given, __: rows.append(given[0].shape[-2]))
    return rows


@pytest.mark.parametrize("chunk", [1, 33, 99, 100, None])
@torch.no_grad()
def test_any_chunk_gives_the_same(layer: FeedForward, chunk: int | None) -> None:
    exact = layer(_input(torch.float64))
    layer.chunk = chunk
    torch.testing.assert_close(layer(_input(torch.float64)), exact, rtol=1e-13, atol=1e-13)


@torch.no_grad()
def test_bfloat16_is_as_exact_as_in_one_piece(layer: FeedForward) -> None:
    x, half = _input(torch.bfloat16), layer.bfloat16()
    whole = half(x)
    half.chunk = 33
    chunked = half(x)
    assert_within_budget(chunked, half.double()(x.double()), whole)


@torch.no_grad()
def test_every_row_passes_once_and_few_are_alive(layer: FeedForward) -> None:
    x = _input(torch.float64)
    with FlopCounterMode(display=False) as whole, LiveBytes() as before:
        layer(x)
    rows = _calls(layer)
    layer.chunk = 33
    with FlopCounterMode(display=False) as chunked, LiveBytes() as after:
        layer(x)
    assert rows == [33, 33, 33, 1]
    assert chunked.get_total_flops() == whole.get_total_flops() > 0
    # the GELU's input and output of a chunk, and the result
    assert after.peak == 8 * (2 * 33 * HIDDEN + BATCH * LENGTH * DIM)
    assert before.peak == 8 * 2 * BATCH * LENGTH * HIDDEN


def test_gradients_and_compilers_take_all_at_once(
    layer: FeedForward, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, x = _calls(layer), _input(torch.float64)
    layer.chunk = 33
    layer(x).sum().backward()
    assert rows == [LENGTH] and layer.net[2].weight.grad is not None
    with torch.no_grad(), monkeypatch.context() as compiling:
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        layer(x)
    assert rows == [LENGTH] * 2


@torch.no_grad()
def test_a_model_hands_its_chunk_to_every_block() -> None:
    model = MV2VTransformer(tiny_config())
    blocks: Any = model.blocks
    rows = [_calls(block.ffn) for block in blocks]
    model.set_feed_forward_chunk(33)
    for block in blocks:
        block.ffn(_input(torch.float32))
    assert rows == [[33, 33, 33, 1]] * len(blocks)
