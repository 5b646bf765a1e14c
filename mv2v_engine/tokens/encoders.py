"""Encoders: what turns remembered videos into tokens, by arithmetic alone.

A plan names an encoder for each of its segments. "patches" are the tokenizers (METHOD 3), one
latent frame at a time; "history" is TinyHistory's (METHOD 17), whose tokens may cover several. The
modules are in `tokens.tokenizers` and `models.history`; whatever counts tokens asks here.

F H W latent grid, k the spatial patch of a token, t the latent frames that it covers.
"""

from __future__ import annotations

import itertools
import math

from mv2v_engine.shapes import HistoryConfig
from mv2v_engine.tokens.layout import Grid, encoded_grid

# latent frames of a history that are encoded at once where no gradient is asked for
FRAMES_AT_ONCE = 32


def history_strides(patch: int, frames: int) -> tuple[Grid, ...]:
    """Strides (frames, rows, columns) of the four convolutions: time is halved first, then space.

    patch, frames: k and t of a token, powers of two.
    """
    times, spaces = frames.bit_length() - 1, patch.bit_length() - 1
    halvings = [(2, 1, 1)] * times + [(1, 2, 2)] * spaces
    return tuple(halvings + [(1, 1, 1)] * (4 - len(halvings)))


def history_layers(
    config: HistoryConfig, channels: int, grid: Grid, patch: int, frames: int
) -> list[tuple[int, int]]:
    """Elements that come out of every convolution, and multiply-adds of each of them.

    channels: of the latents.
    """
    (count, rows, columns), layers = encoded_grid("history", grid, patch, frames), []
    size, given = [count * frames, rows * patch, columns * patch], channels
    for made, stride in zip(config.channels, history_strides(patch, frames), strict=True):
        size = [extent // step for extent, step in zip(size, stride, strict=True)]
        layers.append((math.prod(size) * made, 27 * given))
        given = made
    return layers


def history_peak(config: HistoryConfig, channels: int, grid: Grid, patch: int, frames: int) -> int:
    """Elements that the convolutions hold at once: an input, what comes out, and its SiLU."""
    if not config.has_convolutions:
        return 0
    part = (min(grid[0], FRAMES_AT_ONCE), *grid[1:])
    sizes = [math.prod(part) * channels]
    sizes += [size for size, _ in history_layers(config, channels, part, patch, frames)]
    return max(before + 2 * after for before, after in itertools.pairwise(sizes))


def history_past(config: HistoryConfig, channels: int, grid: Grid, patch: int, frames: int) -> int:
    """Elements that the convolutions keep of a history for the part that comes after it."""
    if not config.has_convolutions:
        return 0
    _, rows, columns = encoded_grid("history", grid, patch, frames)
    (rows, columns), given, total = (rows * patch, columns * patch), channels, 0
    for made, (step, *stride) in zip(config.channels, history_strides(patch, frames), strict=True):
        total += given * (3 - step) * rows * columns
        rows, columns, given = rows // stride[0], columns // stride[1], made
    return total


def history_flops(
    config: HistoryConfig, channels: int, width: int, grid: Grid, patch: int, frames: int
) -> int:
    """FLOPs of encoding a history, two a multiply-add; pooling is not counted.

    channels: of the latents. width: C, of the tokens.
    """
    count, rows, columns = encoded_grid("history", grid, patch, frames)
    length, hidden, total = count * rows * columns, config.channels[-1], 0
    if config.branches == "kernel":
        total += length * frames * patch**2 * channels * width
    if config.branches in ("both", "lr"):
        total += length * 4 * channels * width
    if config.has_convolutions:
        layers = history_layers(config, channels, grid, patch, frames)
        total += sum(elements * each for elements, each in layers)
        # attention within a frame, then the way to the tokens' width
        total += length * (4 * hidden**2 + 2 * rows * columns * hidden + hidden * width)
    return 2 * total
