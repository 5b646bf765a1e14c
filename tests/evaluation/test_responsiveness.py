"""Agreement of blocks: exact on made-up scores, and the recorded scores are the model's own."""

from __future__ import annotations

import pytest
import torch

from mv2v_engine.evaluation.responsiveness import (
    block_agreement,
    bottom_overlap,
    mean_agreement,
    pearson,
    recorded_responsiveness,
    spearman,
)
from mv2v_engine.models.merging import MergeRecord
from mv2v_engine.testing import tiny_config
from mv2v_engine.tokens.plan import turn_plan
from tests.models.drawn import random_inputs, random_model


def test_correlations_by_hand() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert pearson(x, 5 - 2 * x) == pytest.approx(-1)
    assert pearson(x, torch.tensor([1.0, 3.0, 2.0, 4.0])) == pytest.approx(0.8)
    assert spearman(x, x.exp()) == pytest.approx(1) and pearson(x, x.exp()) < 0.95
    # equal values share a rank: 1.5, 1.5, 3, 4
    tied = torch.tensor([1.0, 1.0, 2.0, 3.0])
    assert spearman(x, tied) == pytest.approx(0.948683, abs=1e-6)
    assert pearson(x, torch.ones(4)) == 0


def test_overlap_of_the_lower_halves() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert bottom_overlap(x, x) == 1
    assert bottom_overlap(x, -x) == 0
    assert bottom_overlap(x, torch.tensor([1.0, 4.0, 3.0, 2.0])) == 0.5


def test_block_groups_are_the_thirds() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(30, 12, generator=generator)
    scores[20:] = scores[20]
    table = block_agreement(scores)
    assert list(table) == ["1 vs 2-30", "11 vs 12-30", "21 vs 22-30"]
    assert table["21 vs 22-30"] == pytest.approx({"pearson": 1, "spearman": 1, "bottom_half": 1})
    assert abs(table["1 vs 2-30"]["pearson"]) < 0.4
    assert list(block_agreement(scores[:3])) == ["1 vs 2-3", "2 vs 3"]
    middle = mean_agreement([table, {k: dict.fromkeys(v, 0.0) for k, v in table.items()}])
    assert middle["21 vs 22-30"]["pearson"] == pytest.approx(0.5)
    assert mean_agreement([]) == {}


def test_what_is_recorded_is_what_merging_uses() -> None:
    config = tiny_config()
    model, grid = random_model(config), (2, 4, 6)
    plan = turn_plan(config, grid, (4,), merge="off")
    *inputs, cameras = random_inputs(plan)
    with torch.no_grad():
        with recorded_responsiveness(model) as forwards:
            model(*inputs, plan=plan, cameras=cameras)
            model(*inputs, plan=plan, cameras=cameras)
        model(*inputs, plan=plan, cameras=cameras)
        records: list[MergeRecord] = []
        merging = turn_plan(config, grid, (4,), fraction=0.5)
        model(*inputs, plan=merging, cameras=cameras, records=records)
        model.offload_blocks(torch.device("cpu"))
        with recorded_responsiveness(model) as offloaded:
            model(*inputs, plan=plan, cameras=cameras)
    assert len(offloaded) == 1 and torch.equal(offloaded[0], forwards[0])
    # nothing is recorded after the block is left
    assert len(forwards) == 2 and forwards[0].shape == (3, 4)
    assert torch.equal(forwards[0], forwards[1])
    first = records[0]
    assert torch.equal(forwards[0][first.step.block], first.responsiveness[0])
