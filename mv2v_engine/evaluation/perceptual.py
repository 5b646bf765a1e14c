"""ST-LPIPS: how different two pictures look to a network that a small shift does not trouble.

Shift-tolerant LPIPS (Ghildyal and Liu, ECCV 2022) with AlexNet's features: every stride is taken
after a blur, so that no pixel's place decides. The weights are those inside the wheel of
`stlpips-pytorch`, read from where it is installed and never imported, since its code asks for
torchvision and more that it does not declare.

N frames, C channels.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mv2v_engine.defaults import inference
from mv2v_engine.errors import CheckpointError

_PACKAGE, _WEIGHTS = "stlpips_pytorch", "weights/vST0.0/alex_shift_tolerant.pth"
_EVERY = 4  # frames between those that are compared; the first, where all cameras agree, is not

# convolutions by their names in the file, their padding, and whether a pooling comes before
_LAYERS = (
    ("slice1.0", 2, False),
    ("slice2.5", 2, True),
    ("slice3.9", 1, True),
    ("slice4.11", 1, False),
    ("slice5.13", 1, False),
)


class PerceptualDistance:
    """ST-LPIPS of frames; made by `load_perceptual_distance`. weights: the file's tensors."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self._shift, self._scale = (weights[f"scaling_layer.{n}"] for n in ("shift", "scale"))
        self._layers = [
            (weights[f"net.{name}.weight"], weights[f"net.{name}.bias"], padding, is_pooled)
            for name, padding, is_pooled in _LAYERS
        ]
        self._heads = [weights[f"lin{index}.model.1.weight"] for index in range(len(_LAYERS))]

    @inference
    def features(self, frames: Tensor) -> list[Tensor]:
        """Features of every fourth frame of uint8 [T, height, width, 3], from the fifth on: one
        tensor [N, C, ., .] for each layer, of unit length over C."""
        image = frames[_EVERY::_EVERY].permute(0, 3, 1, 2).float() / 127.5 - 1
        activations = self._activations((image - self._shift) / self._scale)
        return [F.normalize(x, dim=1) for x in activations]

    @inference
    def distance(self, first: list[Tensor], second: list[Tensor]) -> float:
        """Mean over frames; 0 is the same picture. Both as `features` gives them."""
        layers = zip(first, second, self._heads, strict=True)
        return float(sum(F.conv2d((a - b) ** 2, head).mean() for a, b, head in layers))

    def _activations(self, x: Tensor) -> Iterator[Tensor]:
        for index, (weight, bias, padding, is_pooled) in enumerate(self._layers):
            if is_pooled:
                x = _halved(F.max_pool2d(x, 3, stride=1))
            x = F.conv2d(x, weight, bias, padding=padding)
            x = (x if index else _halved(x)).relu()
            yield x


def _halved(x: Tensor) -> Tensor:
    """Every second pixel after a blur by the binomial filter 1 2 1 in both directions."""
    line = torch.tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(line, line).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=x.shape[1])


def load_perceptual_distance() -> PerceptualDistance | None:
    """None without the extra `[eval]`.

    Raises:
        CheckpointError: the package is there and its weights cannot be read.
    """
    spec = find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / _WEIGHTS
    try:
        return PerceptualDistance(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, EOFError, pickle.UnpicklingError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"cannot read the weights of ST-LPIPS in {path} ({error!r}); "
            "pip install --force-reinstall stlpips-pytorch==0.0.2"
        ) from error
