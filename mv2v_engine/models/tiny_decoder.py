"""The decoder of TAEHV's tiny autoencoders: latents to pixels by 2D convolutions and little memory.

`taew2_1`, `taew2_2` and LightX2V's `lighttaew` files (github.com/madebyollin/taehv). Layers are
numbered as in those files. Three stages of three blocks; after each, rows and columns double, and
one frame becomes `stride` of them. A block sees the frame before its own, so frames may come one by
one. It takes normalised latents, and gives colours in 0..1.

B frames beside each other, C channels, H W rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mv2v_engine.errors import CheckpointError

_FIRST, _GROW, _LAST = 1, (7, 13, 19), 22
_BLOCKS = ((3, 4, 5), (9, 10, 11), (15, 16, 17))


class TinyShape(NamedTuple):
    """What a file's tensors tell.

    channels: of the latents. widths: of the three stages, and behind them. strides: frames that
    one becomes, stage by stage. patch: pixels a side that the last layer's channels hold.
    """

    channels: int
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    patch: int

    @property
    def temporal_stride(self) -> int:
        return self.strides[0] * self.strides[1] * self.strides[2]

    @property
    def spatial_stride(self) -> int:
        return 8 * self.patch

    @staticmethod
    def of(shapes: Mapping[str, tuple[int, ...]]) -> TinyShape:
        """The shape of a decoder with tensors of these shapes.

        Raises:
            CheckpointError: a tensor that tells it is missing, or they contradict each other.
        """
        try:
            width, channels = shapes[f"{_FIRST}.weight"][:2]
            widths = [width, *(shapes[f"{place + 1}.weight"][0] for place in _GROW)]
            grown = [shapes[f"{place}.conv.weight"][0] for place in _GROW]
            values = shapes[f"{_LAST}.weight"][0]
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"it has no layer that tells its shape ({error})") from error
        strides = [count // max(before, 1) for count, before in zip(grown, widths, strict=False)]
        patch = round((values / 3) ** 0.5)
        if 0 in strides or 3 * patch**2 != values:
            raise CheckpointError(
                f"its layers of {grown} and {values} values are no whole frames and pixels"
            )
        return TinyShape(channels, tuple(widths), tuple(strides), patch)


class MemoryBlock(nn.Module):
    """Three convolutions over a frame and the one before it, beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [_conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU()]
        self.conv = nn.Sequential(*layers, _conv(width, width))

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """x: [B, C, H, W] in order of time. past: the frame before the first [1, C, H, W]."""
        before = torch.cat([past, x[:-1]])
        out: Tensor = F.relu(self.conv(torch.cat([x, before], dim=1)) + x)
        return out


class Grow(nn.Module):
    """Rows and columns double, and a frame becomes `stride` frames."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        grown: Tensor = self.conv(F.interpolate(x, scale_factor=2.0))
        out: Tensor = grown.unflatten(1, (self.stride, -1)).flatten(0, 1)
        return out


class TinyDecoder(nn.ModuleDict):
    """Layers by their numbers in the file, so that its names are those of the state."""

    def __init__(self, shape: TinyShape) -> None:
        super().__init__()
        self.shape, widths = shape, shape.widths
        self[str(_FIRST)] = _conv(shape.channels, widths[0])
        for blocks, place, (width, following), stride in zip(
            _BLOCKS, _GROW, pairwise(widths), shape.strides, strict=True
        ):
            for number in blocks:
                self[str(number)] = MemoryBlock(width)
            self[str(place)] = Grow(width, stride)
            self[str(place + 1)] = _conv(width, following, bias=False)
        self[str(_LAST)] = _conv(widths[-1], 3 * shape.patch**2)

    def decode(
        self,
        latents_CFHW: Tensor,
        check: Callable[[], None] | None = None,
        past: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """Normalised latents [C, F, H, W] to colours [T, 3, height, width], T = 1 + rate (F - 1).

        check: called before every latent frame. past: what earlier latents of the same video left,
        by the layers' numbers, behind which T = rate F; empty before the first ones, which fill
        it. None: these are all.
        """
        begins = not past
        frames = torch.cat(list(self.stream(latents_CFHW.unbind(1), check, past)))
        return frames[self.shape.temporal_stride - 1 :] if begins else frames

    def stream(
        self,
        latents: Iterator[Tensor] | tuple[Tensor, ...],
        check: Callable[[], None] | None,
        past: dict[int, Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """The frames [rate, 3, height, width] of each latent frame [C, H, W], as they come.

        Of the video's first, all but the last come before the video begins. past: as `decode`.
        """
        past = {} if past is None else past
        for latent in latents:
            if check is not None:
                check()
            yield self._frames(latent[None], past)

    def _frames(self, latent: Tensor, past: dict[int, Tensor]) -> Tensor:
        # far outliers are bent to 3, as where it was trained
        x = F.relu(self[str(_FIRST)](torch.tanh(latent / 3) * 3))
        for blocks, place in zip(_BLOCKS, _GROW, strict=True):
            for number in blocks:
                before = past.get(number, torch.zeros_like(x[:1]))
                past[number] = x[-1:].clone()
                x = self[str(number)](x, before)
            x = self[str(place + 1)](self[str(place)](x))
        out: Tensor = F.pixel_shuffle(self[str(_LAST)](F.relu(x)), self.shape.patch)
        return out


def _conv(width_in: int, width: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(width_in, width, 3, padding=1, bias=bias)
