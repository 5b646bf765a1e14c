"""Eight bits are held against the float32 turn of the same noise and memory, of both tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bench_quantize import latents_psnr, measure


def test_the_peak_is_the_range() -> None:
    exact = torch.tensor([0.0, 10.0, 5.0, 5.0])
    assert latents_psnr(exact + 0.1, exact) == pytest.approx(40, abs=1e-3)


@pytest.mark.parametrize("task", ["views", "edits"])
def test_rows(
    tiny_checkpoint: Path, make_checkpoint: Callable[..., Path], tmp_path: Path, task: str
) -> None:
    folder = tiny_checkpoint
    if task == "edits":
        shape = {"in_channels": 32, "source_channels": 16, "camera_conditioning": "none"}
        folder = make_checkpoint(tmp_path / "editor", has_text=True, text_len=16, **shape)
    whole, again, int8, fp8 = measure(str(folder), range(2_000_000, 2_000_001), 2)
    assert whole["time_ratio"] == 1 and whole["latents_psnr"] is again["latents_psnr"] is None
    assert int8["megabytes"] == fp8["megabytes"] < whole["megabytes"]
    assert 30 < fp8["latents_psnr"] < int8["latents_psnr"] < 100
    assert (whole["agreement"] is None) == (task == "edits")
