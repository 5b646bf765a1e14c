"""The feed-forward of a Wan block. C width."""

from __future__ import annotations

from torch import Tensor, nn

from mv2v_engine.ops.linear_gelu import linear_gelu


class _GELU(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden)
        self.backend = "reference"

    def forward(self, x: Tensor) -> Tensor:
        return linear_gelu(x, self.proj.weight, self.proj.bias, backend=self.backend)


class FeedForward(nn.Module):
    """Linear, tanh-GELU, Linear; the middle slot keeps diffusers' parameter names."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([_GELU(dim, hidden), nn.Identity(), nn.Linear(hidden, dim)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net[2](self.net[0](x))
        return out
