"""The linear layers of a block, whose products may be of narrower numbers than their tokens, and
its feed-forward, in chunks of tokens where no gradient is asked for.

C width, H hidden width, R rows: the tokens of all samples.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mv2v_engine.ops.linear_gelu import linear_gelu


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


class _GELU(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = Linear(dim, hidden)
        self.backend = "reference"

    def forward(self, x: Tensor) -> Tensor:
        weight = self.proj.weight
        return linear_gelu(narrowed(x, weight), weight, self.proj.bias, backend=self.backend)


class FeedForward(nn.Module):
    """Linear, tanh-GELU, Linear; the middle slot keeps diffusers' parameter names.

    chunk: tokens whose hidden rows [chunk, H] are alive at once; None takes all together. A graph
    for gradients keeps every hidden row anyway, and a compiler fuses for itself: both take all.
    Hidden rows are of the weights' dtype.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([_GELU(dim, hidden), nn.Identity(), Linear(hidden, dim)])
        self.chunk: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        is_whole = self.chunk is None or x.shape[:-1].numel() <= self.chunk
        if is_whole or torch.is_grad_enabled() or torch.compiler.is_compiling():
            out: Tensor = self.net[2](self.net[0](x))
            return out.to(x.dtype)
        return self._by_chunks(x)

    def _by_chunks(self, x: Tensor) -> Tensor:
        rows_RC, last = x.reshape(-1, x.shape[-1]), self.net[2]
        assert isinstance(last, Linear) and self.chunk is not None
        out_RC = rows_RC.new_empty(len(rows_RC), last.out_features)
        for start in range(0, len(rows_RC), self.chunk):
            rows = slice(start, start + self.chunk)
            hidden = self.net[0](rows_RC[rows])
            if hidden.dtype == out_RC.dtype:
                torch.addmm(last.bias, hidden, last.weight.t(), out=out_RC[rows])
            else:
                out_RC[rows] = last(hidden)
            del hidden  # or it would live beside the next one
        out: Tensor = out_RC.unflatten(0, x.shape[:-1])
        return out
