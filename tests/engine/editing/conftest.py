"""An engine on the small random model that edits, and long clips."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mv2v_engine import Engine
from tests.conftest import EDIT_SIZE, EDIT_WINDOW

# frames of 32 x 48 are latents of 4 x 6
WINDOW, SIZE = EDIT_WINDOW, EDIT_SIZE


@pytest.fixture(scope="session")
def editor(editor_folder: Path) -> Engine:
    return Engine.from_pretrained(editor_folder, device="cpu")


def long_clip(num_frames: int, seed: int = 0, size: tuple[int, int] = SIZE) -> Tensor:
    """uint8 [num_frames, *size, 3]: a smooth picture that moves and slowly changes its colours."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, 3, 4, 6, generator=generator)
    begin, end = torch.nn.functional.interpolate(coarse, size, mode="bilinear")
    share = torch.linspace(0, 1, num_frames)[:, None, None, None]
    frames = torch.stack([begin.roll(number, -1) for number in range(num_frames)])
    mixed = frames * (1 - share) + end * share
    return (mixed * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
