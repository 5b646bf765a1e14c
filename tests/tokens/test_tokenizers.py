"""Tokenizers: replicate padding, order of tokens, and the FramePack-style initialisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mv2v_engine.tokens.tokenizers import Tokenizer, init_from_base


def _tokenizer(patch: int, *, channels: int = 3, dim: int = 5) -> Tokenizer:
    torch.manual_seed(patch)
    return Tokenizer(channels, dim, patch)


@pytest.mark.parametrize(
    ("patch", "size", "grid"),
    [
        (8, (60, 104), (8, 13)),
        (4, (60, 104), (15, 26)),
        (2, (60, 104), (30, 52)),
        (8, (12, 20), (2, 3)),
        (4, (5, 7), (2, 2)),
        (2, (5, 7), (3, 4)),
    ],
)
@torch.no_grad()
def test_every_token_sees_its_patch(
    patch: int, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    tokenizer, (rows, columns) = _tokenizer(patch).double(), size
    latents = torch.randn(2, 3, 2, rows, columns, dtype=torch.float64)
    tokens = tokenizer(latents)
    assert tokens.shape == (2, 2 * grid[0] * grid[1], 5)
    weight, bias = tokenizer.weight[:, :, 0], tokenizer.bias
    assert bias is not None
    for frame, row, column in [(0, 0, 0), (1, grid[0] - 1, grid[1] - 1), (1, 0, grid[1] - 1)]:
        # indices past the border read the border: replicate padding, bottom and right
        ys = (torch.arange(patch) + row * patch).clamp_max(rows - 1)
        xs = (torch.arange(patch) + column * patch).clamp_max(columns - 1)
        cells = latents[:, :, frame][:, :, ys][..., xs]
        expected = torch.einsum("bcyx,dcyx->bd", cells, weight) + bias
        index = (frame * grid[0] + row) * grid[1] + column
        torch.testing.assert_close(tokens[:, index], expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_constant_latent_embeds_alike_at_every_rate() -> None:
    base = nn.Conv3d(3, 5, (1, 2, 2), stride=(1, 2, 2)).double()
    channels = torch.randn(3, dtype=torch.float64)
    latents = channels[None, :, None, None, None].expand(1, 3, 2, 60, 104)
    expected = base(latents).flatten(2).transpose(1, 2)[0, 0]
    for patch in (2, 4, 8):
        tokenizer = _tokenizer(patch).double()
        init_from_base(tokenizer, base)
        tokens = tokenizer(latents)[0]
        torch.testing.assert_close(tokens, expected.expand_as(tokens), rtol=0, atol=1e-12)


@torch.no_grad()
def test_initialisation_repeats_the_base_kernel() -> None:
    base = nn.Conv3d(3, 5, (1, 2, 2), stride=(1, 2, 2))
    same, coarse = _tokenizer(2), _tokenizer(8)
    init_from_base(same, base)
    init_from_base(coarse, base)
    assert torch.equal(same.weight, base.weight)
    assert base.bias is not None and coarse.bias is not None
    assert torch.equal(coarse.bias, base.bias)
    for row in range(8):
        for column in range(8):
            expected = base.weight[:, :, 0, row // 4, column // 4] / 16
            torch.testing.assert_close(coarse.weight[:, :, 0, row, column], expected)


def test_latents_of_another_dtype_take_the_weights() -> None:
    tokenizer = _tokenizer(4).to(torch.bfloat16)
    assert tokenizer(torch.randn(1, 3, 1, 6, 8)).dtype == torch.bfloat16
