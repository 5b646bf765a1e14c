"""The linear layers of a block, whose products may be of narrower numbers than their tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Linear):
    """A linear layer that gives its tokens' dtype.

    With float32 tokens and a weight and bias of bfloat16 the factors are rounded to bfloat16,
    summed in float32, and the sums rounded once more before they are float32 again.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        return F.linear(narrowed(x, weight), weight, self.bias).to(x.dtype)


def narrowed(x: Tensor, weight: Tensor) -> Tensor:
    """Float32 tokens as a bfloat16 weight's products take them; others as they are."""
    is_mixed = weight.dtype == torch.bfloat16 and x.dtype == torch.float32
    return x.to(torch.bfloat16) if is_mixed else x
