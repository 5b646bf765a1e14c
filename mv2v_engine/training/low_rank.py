"""Low-rank updates (LoRA) of a transformer's blocks, trained in place of their weights.

They are parametrisations: a layer's weight is W + up down wherever it is read, and merging them
leaves plain weights of the same names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.feed_forward import Linear


class LowRank(nn.Module):
    """Adds up [rows, rank] times down [rank, columns] to a weight; zero at the start."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        rank = min(rank, rows, columns)
        down = torch.empty(rank, columns, dtype=torch.float32, device=weight.device)
        self.down = nn.Parameter(down.normal_().div_(columns**0.5))
        self.up = nn.Parameter(torch.zeros(rows, rank, dtype=torch.float32, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).to(weight.dtype)


def _layers(model: MV2VTransformer) -> list[Linear]:
    """The blocks' own: what attends to a history is trained whole."""
    return [
        module
        for name, module in model.blocks.named_modules()
        if isinstance(module, Linear) and "attn_history" not in name
    ]


def add_low_rank(model: MV2VTransformer, rank: int) -> None:
    """Give every linear layer of the blocks an update of this rank, or of the layer's own."""
    for layer in _layers(model):
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))


@torch.no_grad()
def merge_low_rank(model: MV2VTransformer) -> None:
    """Put the updates into the weights, which are plain ones again."""
    for layer in _layers(model):
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
