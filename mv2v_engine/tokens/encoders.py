"""Encoders: what turns remembered videos into tokens, by arithmetic alone.

A plan names an encoder for each of its segments. "patches" are the tokenizers (METHOD 3), one
latent frame at a time; "history" is TinyHistory's (METHOD 17), whose tokens may cover several. The
modules are in `tokens.tokenizers` and `models.history`; whatever counts tokens asks here.

F H W latent grid, k the spatial patch of a token, t the latent frames that it covers.
"""

from __future__ import annotations

from typing import Literal

EncoderName = Literal["patches", "history"]
Grid = tuple[int, int, int]


def encoded_grid(encoder: EncoderName, grid: Grid, patch: int, frames: int) -> Grid:
    """Token (frames, rows, columns) of a video of a latent grid.

    patch, frames: k and t. Patches are padded to whole ones; of a history, rows and columns that
    fill no whole patch are cut off, at the bottom and on the right, and its last frame is repeated.
    """
    count, rows, columns = grid
    if encoder == "history":
        return -(-count // frames), rows // patch, columns // patch
    return -(-count // frames), -(-rows // patch), -(-columns // patch)
