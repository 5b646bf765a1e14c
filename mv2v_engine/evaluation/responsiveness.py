"""Do the blocks agree on which frames matter: Table 1 of the paper, on any checkpoint.

Merging at a block is safe if the frames that it finds unresponsive stay so in every later block.
For the first block of each third of the transformer: Pearson and Spearman correlation of its
responsiveness with each later block's, and the overlap of the halves that respond least.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mv2v_engine.models.block import Block
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.merging import responsiveness


@contextmanager
def recorded_responsiveness(transformer: MV2VTransformer) -> Iterator[list[Tensor]]:
    """Collect R_t (Eq. 5) of every block: one tensor [blocks, frames] a forward, while inside.

    For plans of joint conditioning and without merging, where all blocks see the same frames, and
    a batch of one.
    """
    forwards: list[Tensor] = []
    current: list[Tensor] = []

    def record(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(block, Block)
        with torch.no_grad():
            scores = responsiveness(transformer, block, inputs[0])
        current.append(scores[0].cpu())
        if len(current) == len(transformer.blocks):
            forwards.append(torch.stack(current))
            current.clear()

    offload = transformer.offload
    running = transformer.blocks if offload is None else offload.places
    handles = [block.register_forward_pre_hook(record) for block in running]
    try:
        yield forwards
    finally:
        for handle in handles:
            handle.remove()


def pearson(first: Tensor, second: Tensor) -> float:
    """Linear correlation of two vectors; 0 where one of them is constant."""
    first, second = (x.double() - x.double().mean() for x in (first, second))
    return float(first @ second / (first.norm() * second.norm()).clamp_min(1e-30))


def spearman(first: Tensor, second: Tensor) -> float:
    """Correlation of ranks; equal values share their mean rank."""
    return pearson(_ranks(first), _ranks(second))


def _ranks(values: Tensor) -> Tensor:
    below = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    return below + (equal - 1) / 2


def bottom_overlap(first: Tensor, second: Tensor, share: float = 0.5) -> float:
    """Share of one vector's lowest entries that are among the other's lowest; chance is `share`."""
    count = max(1, int(share * len(first)))
    lowest = [set(values.argsort(stable=True)[:count].tolist()) for values in (first, second)]
    return len(lowest[0] & lowest[1]) / count


def block_agreement(scores: Tensor) -> dict[str, dict[str, float]]:
    """Agreement of the first block of each third with all later ones, means over those.

    scores: [blocks, frames] of one forward. Keys are 1-indexed as in the paper: "1 vs 2-30".
    """
    blocks = len(scores)
    table = {}
    for first in dict.fromkeys((0, blocks // 3, 2 * blocks // 3)):
        later = scores[first + 1 :]
        if not len(later):
            continue
        measures = {"pearson": pearson, "spearman": spearman, "bottom_half": bottom_overlap}
        last = "" if len(later) == 1 else f"-{blocks}"
        table[f"{first + 1} vs {first + 2}{last}"] = {
            name: sum(measure(scores[first], other) for other in later) / len(later)
            for name, measure in measures.items()
        }
    return table


def mean_agreement(tables: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The mean of several forwards' tables."""
    if not tables:
        return {}
    return {
        group: {name: sum(t[group][name] for t in tables) / len(tables) for name in values}
        for group, values in tables[0].items()
    }
