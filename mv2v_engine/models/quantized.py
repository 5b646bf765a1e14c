"""Linear layers whose weights are stored in eight bits; all else about them is as before.

Weight-only: a layer makes its weight again, in the dtype of its tokens, whenever it is read, so
every backend and library computes with it as with a stored one. One layer's weight is whole at a
time.

R output channels (rows of the weight), C input channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mv2v_engine.config import QuantizeName
from mv2v_engine.models.feed_forward import Linear

# what keeps its dtype whatever the tokens' is
OWN_DTYPES = (".stored", ".scale")
_DTYPES: dict[QuantizeName, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class QuantizedLinear(Linear):
    """A linear layer with a weight [R, C] of eight bits and a scale a row.

    Parameters: `stored` [R, C] int8 or float8_e4m3fn, `bias` [R] of the tokens' dtype, or None.
    Buffer: `scale` [R, 1] float32. `weight` is made of them when it is read, with one rounding.
    """

    def __init__(self, linear: nn.Linear, kind: QuantizeName) -> None:
        """An empty one in the place of another, whose bias it takes over.

        kind: the format of eight bits.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, device = linear.bias, linear.weight.device
        self._dtype = linear.weight.dtype
        stored = torch.empty(linear.weight.shape, dtype=_DTYPES[kind], device=device)
        self.stored = nn.Parameter(stored, requires_grad=False)
        scale = torch.empty(self.out_features, 1, dtype=torch.float32, device=device)
        self.register_buffer("scale", scale)
        self.scale: Tensor

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[R, C] in the bias's dtype; without one, in that of the layer that it stands for."""
        dtype = self._dtype if self.bias is None else self.bias.dtype
        return self.stored.to(dtype).mul_(self.scale)

    @torch.no_grad()
    def quantize(self, weight_RC: Tensor) -> None:
        """Store a weight: the largest magnitude of a row becomes the largest number there is."""
        weight, dtype = weight_RC.float(), self.stored.dtype
        limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
        # a row of zeros has a scale, too
        least = torch.finfo(torch.float32).tiny
        self.scale = (weight.abs().amax(1, keepdim=True) / limits.max).clamp_min(least)
        scaled = weight / self.scale
        stored = (scaled if dtype.is_floating_point else scaled.round_()).to(dtype)
        self.stored = nn.Parameter(stored, requires_grad=False)

    def keep(self, stored_RC: Tensor, scale: Tensor) -> None:
        """Take a weight of eight bits as it is. scale: one number, or one a row."""
        rows = scale.float().reshape(-1, 1).expand(self.out_features, 1)
        self.scale = rows.contiguous()
        self.stored = nn.Parameter(stored_RC, requires_grad=False)


def quantize_linears(model: nn.Module, kind: QuantizeName) -> None:
    """Put empty quantised layers in the place of `large_linears`."""
    for name, linear in large_linears(model).items():
        model.set_submodule(name, QuantizedLinear(linear, kind))


def large_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a transformer's blocks, by name.

    Embeddings, the modulation, the head and the camera's encoder are not among them: few bytes,
    and everything passes through them.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith(("blocks.", "vace_blocks."))
        and not name.endswith("cam_encoder")
    }
