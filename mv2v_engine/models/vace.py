"""VACE's own blocks (arXiv 2503.07598): their hints of a source are added to the main blocks'.

They walk beside the main blocks: the context's tokens pass through all of them, and what each
leaves goes through a linear layer and is added to the target's tokens behind its main block.

B batch, L target tokens, C width.
"""

from __future__ import annotations

from dataclasses import replace

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

    def hint(self, context: Sequence) -> tuple[Sequence, Tensor]:
        """The context behind this block, and its hint [B, L, C]."""
        x, _ = self(context)
        return replace(context, x=x), self.proj_out(x)
