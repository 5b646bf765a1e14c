"""A small random model that edits, an engine on it, and long clips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mv2v_engine import Engine

# of a window; frames of 32 x 48 are latents of 4 x 6
WINDOW, SIZE = 5, (32, 48)


@pytest.fixture(scope="session")
def edit_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]
) -> Path:
    """Takes the source on the target's channels; windows of 5 frames, 2 steps."""
    return make_checkpoint(
        tmp_path_factory.mktemp("checkpoint") / "editor",
        name="editor",
        has_text=True,
        sampling={"num_frames": WINDOW, "size": SIZE, "num_inference_steps": 2, "fps": 12.0},
        in_channels=32,
        source_channels=16,
        camera_conditioning="none",
    )


@pytest.fixture(scope="session")
def editor(edit_checkpoint: Path) -> Engine:
    return Engine.from_pretrained(edit_checkpoint, device="cpu")


def long_clip(num_frames: int, seed: int = 0, size: tuple[int, int] = SIZE) -> Tensor:
    """uint8 [num_frames, *size, 3]: a smooth picture that moves and slowly changes its colours."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, 3, 4, 6, generator=generator)
    begin, end = torch.nn.functional.interpolate(coarse, size, mode="bilinear")
    share = torch.linspace(0, 1, num_frames)[:, None, None, None]
    frames = torch.stack([begin.roll(number, -1) for number in range(num_frames)])
    mixed = frames * (1 - share) + end * share
    return (mixed * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
