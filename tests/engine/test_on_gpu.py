"""A whole small turn on a GPU is the CPU's, and remembers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mv2v_engine import Engine
from mv2v_engine.testing import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("diffusers") is None, reason="the VAE needs the package diffusers"
    ),
]


def _latents(checkpoint: Path, device: str, frames: Tensor) -> tuple[list[Tensor], str]:
    """Two turns, the second of which sees the first."""
    engine = Engine.from_pretrained(checkpoint, device=device, dtype=torch.float32)
    session = engine.session(frames)
    with torch.backends.cudnn.flags(allow_tf32=False):
        turns = [session.render(camera, seed=3) for camera in ("pan_right", "arc_left")]
    return [turn.latents.cpu() for turn in turns], engine.backend


def test_two_turns_are_the_cpus(tiny_checkpoint: Path, source_frames: Tensor) -> None:
    expected, plain = _latents(tiny_checkpoint, "cpu", source_frames)
    got, backend = _latents(tiny_checkpoint, "cuda", source_frames)
    assert (plain, backend) == ("reference", "triton")
    for ours, theirs in zip(got, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-3
