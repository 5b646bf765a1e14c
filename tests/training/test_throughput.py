"""The share of a device's rate that the log reports."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mv2v_engine.training import throughput
from mv2v_engine.training.loop import LoopConfig, TrainingLoop
from mv2v_engine.training.throughput import compute_dtype, matmul_tflops, training_flops_factor


def test_frozen_weights_need_no_gradient() -> None:
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 12, bias=False))
    assert training_flops_factor(model) == 3
    model[0].requires_grad_(False)
    assert training_flops_factor(model) == pytest.approx(2 + 96 / 128)


def test_a_products_rate_is_measured() -> None:
    rate = matmul_tflops(torch.device("cpu"), torch.float32)
    assert 1e-3 < rate < 100  # a slow core, a large server


def test_a_gpus_products_are_made_in_bfloat16() -> None:
    assert compute_dtype(torch.device("cuda")) == torch.bfloat16
    assert compute_dtype(torch.device("cpu")) in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("seconds", "expected", "tries"),
    [(0.5, torch.bfloat16, 1), (0.8, torch.float32, 20), (25.0, torch.float32, 1)],
)
def test_products_are_made_in_bfloat16_where_that_is_quicker(
    monkeypatch: pytest.MonkeyPatch, seconds: float, expected: torch.dtype, tries: int
) -> None:
    """They are measured once where one takes as long as many in float32 do."""
    made = []

    def take(a: Tensor, b: Tensor) -> float:
        made.append(a.dtype)
        return seconds if a.dtype == torch.bfloat16 else 1.0

    monkeypatch.setattr(throughput, "_seconds", take)
    assert compute_dtype.__wrapped__(torch.device("cpu")) == expected
    assert made.count(torch.bfloat16) == tries


def test_the_log_says_what_share_a_run_gets(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    config = LoopConfig(out=tmp_path, max_steps=4, log_every=2, accumulate=3, peak_tflops=2.0)
    loop = TrainingLoop(model, [torch.optim.SGD(model.parameters(), lr=0.1)], config)

    def step(generator: torch.Generator) -> dict[str, Tensor]:
        loss = model(torch.randn(5, 3, generator=generator)).square().mean()
        return {"loss": loss, "forward_tflop": torch.tensor(0.01)}

    loop.run(step)
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    for row in rows:
        share = 0.01 * 3 * 3 * float(row["steps_per_second"]) / 2.0
        assert float(row["peak_share"]) == pytest.approx(share, rel=1e-2)
