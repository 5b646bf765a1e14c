"""Muon for matrices and convolution filters, beside AdamW for the rest."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mv2v_engine.training.throughput import compute_dtype

# coefficients of the quintic iteration: steepest at zero, singular values end within 0.7 and 1.2
_COEFFICIENTS, _ITERATIONS, _EPSILON = (3.4445, -4.7750, 2.0315), 5, 1e-7


class Muon(torch.optim.Optimizer):
    """Moves every matrix by the orthogonal factor of its momentum (Jordan et al., 2024), as far as
    AdamW would (arXiv 2502.16982, section 2.2). A filter [out, in, ...] is a matrix
    [out, in * ...].

    torch.optim.Muon computes the same, matrix by matrix in bfloat16, which on CPUs without such
    products takes several times as long as the rest of a training step. Here matrices of one shape
    go together, in float32 where that is quicker.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, defaults)
        self._dtype = compute_dtype(self.param_groups[0]["params"][0].device)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> None:
        """One update; a matrix without a gradient stays as it is."""
        assert closure is None
        for group in self.param_groups:
            alike: defaultdict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.flatten(1).shape].append(parameter)
            for shape, parameters in alike.items():
                updates = torch.stack([self._momentum(p, group["momentum"]) for p in parameters])
                directions = _orthogonal(updates.to(self._dtype)).to(updates.dtype)
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                length = group["lr"] * 0.2 * math.sqrt(max(shape))
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.sub_(direction.view_as(parameter), alpha=length)

    def _momentum(self, parameter: Tensor, decay: float) -> Tensor:
        """Nesterov's, as a matrix."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average: Tensor = state["momentum_buffer"]
        average.lerp_(parameter.grad, 1 - decay)
        return parameter.grad.lerp(average, decay).flatten(1)


def _orthogonal(matrices_NAB: Tensor) -> Tensor:
    """U V^T of every matrix U S V^T, nearly, by Newton and Schulz's iteration."""
    is_tall = matrices_NAB.shape[1] > matrices_NAB.shape[2]
    x = matrices_NAB.mT if is_tall else matrices_NAB
    x = x / x.flatten(1).norm(dim=1).clamp(min=_EPSILON)[:, None, None]
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
