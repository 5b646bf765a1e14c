"""VACE's own blocks (arXiv 2503.07598): their hints of a source are added to the main blocks'.

They walk beside the main blocks: the context's tokens pass through all of them, and what each
leaves goes through a linear layer and is added to the target's tokens behind its main block.

B batch, L target tokens, C width.
"""

from __future__ import annotations

from collections.abc import Sequence as Series
from dataclasses import replace

import torch
from torch import Tensor, nn

from mv2v_engine.config import TransformerConfig
from mv2v_engine.models.block import Block
from mv2v_engine.models.sequence import Sequence


class VaceBlock(Block):
    """A Wan block over the context, and the layer that makes a hint of it.

    proj_in: of the first block alone; it takes the context's tokens before the target's are added.
    """

    def __init__(self, config: TransformerConfig, *, is_first: bool) -> None:
        super().__init__(config)
        self.proj_in = nn.Linear(config.dim, config.dim) if is_first else None
        self.proj_out = nn.Linear(config.dim, config.dim)


class Hints:
    """The context's walk beside the main blocks.

    blocks: VACE's own, each beside the main block of that index in `layers`.
    """

    def __init__(self, blocks: nn.ModuleList, layers: Series[int], context: Sequence) -> None:
        self._beside, self._context = dict(zip(layers, blocks, strict=True)), context

    def added(self, index: int, x: Tensor) -> Tensor:
        """The tokens [B, L, C] behind main block `index`, with the hint that it has, if any."""
        if index not in self._beside:
            return x
        block = self._beside[index]
        assert isinstance(block, VaceBlock)
        own, _ = block(self._context)
        self._context = replace(self._context, x=own)
        hint = block.proj_out(own)
        return torch.cat([x[:, : hint.shape[1]] + hint, x[:, hint.shape[1] :]], 1)
