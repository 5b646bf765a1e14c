"""A linear map from a VAE's latents to colours: what a video under way looks like, for next to
nothing.

Each cell of the latent grid becomes one pixel, so that the picture is as small as the grid. Wan's
maps are published ones; any other is fitted to frames and their latents by least squares.

C latent channels, F latent frames, H W latent rows and columns, T pixel frames.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mv2v_engine.arguments import short_repr
from mv2v_engine.errors import CheckpointError
from mv2v_engine.files import save_json

FILE = "latent_rgb.json"
# weight of the squared factors beside the mean squared error: one colour alone leaves them open
_RIDGE = 1e-3


@dataclass(frozen=True, eq=False)
class LatentRGB:
    """rgb = latents @ factors + bias, in -1..1, for normalised latents.

    factors: float32 [C, 3]. bias: float32 [3].
    """

    factors: Tensor
    bias: Tensor

    __repr__ = short_repr

    def to(self, device: torch.device) -> LatentRGB:
        return LatentRGB(self.factors.to(device), self.bias.to(device))

    def picture(self, latents_CHW: Tensor) -> Tensor:
        """One latent frame as a picture uint8 [H, W, 3], on the map's device.

        Numbers that are not finite have no colour of their own.
        """
        rgb = torch.einsum("chw,ck->hwk", latents_CHW, self.factors) + self.bias
        return ((rgb.clamp(-1, 1) + 1) * 127.5).nan_to_num(0).round().to(torch.uint8)

    @staticmethod
    def fitted(clips: Iterable[tuple[Tensor, Tensor]]) -> LatentRGB:
        """The map that comes nearest to the mean colour of every latent cell's pixels.

        clips: normalised latents [C, F, H, W] and the frames uint8 [T, height, width, 3] that they
            were made of, with T = 1 + rate (F - 1).
        """
        squares, products, count = None, None, 0
        for latents, frames in clips:
            cells = latents.flatten(1).T.double().cpu()
            cells = torch.cat([cells, torch.ones_like(cells[:, :1])], dim=1)
            colours = cell_colours(frames, latents.shape[1:]).flatten(1).T.double()
            square, product = cells.T @ cells, cells.T @ colours
            squares = square if squares is None else squares + square
            products = product if products is None else products + product
            count += len(cells)
        if squares is None or products is None:
            raise ValueError("a map is fitted to one clip or more, got none")
        ridge = torch.full((len(squares),), _RIDGE * count, dtype=torch.float64, device="cpu")
        ridge[-1] = 0
        solved = torch.linalg.solve(squares + ridge.diag(), products).float()
        return LatentRGB(solved[:-1], solved[-1])

    @staticmethod
    def read(path: Path, channels: int) -> LatentRGB:
        """A map that `save` has written.

        Raises:
            CheckpointError: it is none, or of another number of channels.
        """
        try:
            stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            kind: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
            found = LatentRGB(*(torch.tensor(stored[name], **kind) for name in ("factors", "bias")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} holds no factors and bias ({error!r}); copy it again, or delete it: "
                "previews are then fitted to their source"
            ) from error
        shapes = found.factors.shape, found.bias.shape
        is_finite = bool(found.factors.isfinite().all() and found.bias.isfinite().all())
        if shapes != ((channels, 3), (3,)) or not is_finite:
            raise CheckpointError(
                f"{path} holds factors {list(shapes[0])} and bias {list(shapes[1])}, expected "
                f"finite ones [{channels}, 3] and [3]; copy it again, or delete it"
            )
        return found

    def save(self, path: Path) -> None:
        """Write the map as JSON, to four digits behind the point."""
        rounded = [[round(x, 4) for x in row] for row in self.factors.tolist()]
        save_json(path, {"factors": rounded, "bias": [round(x, 4) for x in self.bias.tolist()]})


def cell_colours(frames: Tensor, grid: Iterable[int]) -> Tensor:
    """The mean colour of each latent cell [3, F, H, W] in -1..1, on the CPU."""
    num_latents, rows, columns = grid
    rate = (len(frames) - 1) // max(num_latents - 1, 1)
    done = []
    for index in range(num_latents):
        first, stop = max(rate * (index - 1) + 1, 0), rate * index + 1
        mean = frames[first:stop].float().mean(dim=0).permute(2, 0, 1)
        done.append(F.adaptive_avg_pool2d(mean[None], (rows, columns))[0])
    return torch.stack(done, dim=1).cpu() / 127.5 - 1


def _published(factors: str, bias: tuple[float, float, float]) -> LatentRGB:
    kind: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    rows = torch.tensor([float(number) for number in factors.split()], **kind)
    return LatentRGB(rows.reshape(-1, 3), torch.tensor(bias, **kind))


# a row a channel: red, green, blue (ComfyUI, comfy/latent_formats.py)
def wan21() -> LatentRGB:
    """The published map of Wan2.1's latents."""
    return _published(_WAN21, (-0.1835, -0.0868, -0.3360))


def wan22() -> LatentRGB:
    """The published map of the latents of Wan2.2's 5B model."""
    return _published(_WAN22, (0.0317, -0.0878, -0.1388))


_WAN21 = """
    -0.1299 -0.1692 0.2932  0.0671 0.0406 0.0442  0.3568 0.2548 0.1747
    0.0372 0.2344 0.1420  0.0313 0.0189 -0.0328  0.0296 -0.0956 -0.0665
    -0.3477 -0.4059 -0.2925  0.0166 0.1902 0.1975  -0.0412 0.0267 -0.1364
    -0.1293 0.0740 0.1636  0.0680 0.3019 0.1128  0.0032 0.0581 0.0639
    -0.1251 0.0927 0.1699  0.0060 -0.0633 0.0005  0.3477 0.2275 0.2950
    0.1984 0.0913 0.1861
"""
_WAN22 = """
    0.0119 0.0103 0.0046  -0.1062 -0.0504 0.0165  0.0140 0.0409 0.0491
    -0.0813 -0.0677 0.0607  0.0656 0.0851 0.0808  0.0264 0.0463 0.0912
    0.0295 0.0326 0.0590  -0.0244 -0.0270 0.0025  0.0443 -0.0102 0.0288
    -0.0465 -0.0090 -0.0205  0.0359 0.0236 0.0082  -0.0776 0.0854 0.1048
    0.0564 0.0264 0.0561  0.0006 0.0594 0.0418  -0.0319 -0.0542 -0.0637
    -0.0268 0.0024 0.0260  0.0539 0.0265 0.0358  -0.0359 -0.0312 -0.0287
    -0.0285 -0.1032 -0.1237  0.1041 0.0537 0.0622  -0.0086 -0.0374 -0.0051
    0.0390 0.0670 0.2863  0.0069 0.0144 0.0082  0.0006 -0.0167 0.0079
    0.0313 -0.0574 -0.0232  -0.1454 -0.0902 -0.0481  0.0714 0.0827 0.0447
    -0.0304 -0.0574 -0.0196  0.0401 0.0384 0.0204  -0.0758 -0.0297 -0.0014
    0.0568 0.1307 0.1372  -0.0055 -0.0310 -0.0380  0.0239 -0.0305 0.0325
    -0.0663 -0.0673 -0.0140  -0.0416 -0.0047 -0.0023  0.0166 0.0112 -0.0093
    -0.0211 0.0011 0.0331  0.1833 0.1466 0.2250  -0.0368 0.0370 0.0295
    -0.3441 -0.3543 -0.2008  -0.0479 -0.0489 -0.0420  -0.0660 -0.0153 0.0800
    -0.0101 0.0068 0.0156  -0.0690 -0.0452 -0.0927  -0.0145 0.0041 0.0015
    0.0421 0.0451 0.0373  0.0504 -0.0483 -0.0356  -0.0837 0.0168 0.0055
"""
