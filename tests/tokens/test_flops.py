"""FLOPs of the plan equal the FLOPs that torch counts in a real forward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mv2v_engine.config import MergerConfig
from mv2v_engine.models.kept import ConditioningCache
from mv2v_engine.models.merging import MergeRecord
from mv2v_engine.testing import cpu_flops, tiny_config
from mv2v_engine.tokens.flops import block_flops, conditioning_flops, flop_table, kept_flop_table
from mv2v_engine.tokens.plan import TokenPlan, turn_plan
from tests.models.drawn import random_inputs, random_model

GRID = (3, 12, 20)


def _counted(
    plan: TokenPlan, keep: ConditioningCache | None = None
) -> tuple[int, list[MergeRecord]]:
    """FLOPs of a whole forward and its merges; of the target alone where `keep` is filled."""
    model, records = random_model(plan.shape), list[MergeRecord]()
    latents, timestep, text, cameras = random_inputs(plan)
    with FlopCounterMode(display=False, custom_mapping=cpu_flops()) as counter, torch.no_grad():
        if keep is not None and keep.is_filled:
            model([latents[0]], timestep, text, plan=plan, kept=keep)
        else:
            model(latents, timestep, text, plan=plan, cameras=cameras, records=records, kept=keep)
    return int(counter.get_total_flops()), records


HALF = {"fraction": 0.5}
STATIC = {"conditioning": "static"}
NO_CAMERA = {"camera_conditioning": "none"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "target alone": ({}, {"tokenizers": (), "source": False}),
    "off": ({}, {"merge": "off"}),
    "conv": ({}, HALF),
    "nothing to merge": ({}, {"fraction": 0.1}),
    "everything merges": ({}, {"fraction": 1.0}),
    "discard": ({}, {"merge": "discard", "fraction": 0.7}),
    "without a source": ({}, {"source": False, "fraction": 0.4}),
    "joint scope": ({}, HALF | {"scope": "joint"}),
    "average": ({"merger": None}, HALF),
    "no bias": ({"merger": MergerConfig(bias=False)}, HALF),
    "pooled": ({"merger": MergerConfig(pooled=True)}, HALF),
    "shared": ({"merger": MergerConfig(shared=True)}, HALF),
    "depth-wise": ({"merger": MergerConfig(groups=24)}, HALF),
    "1x2": ({"merger": MergerConfig(kernel=(1, 2))}, HALF),
    "3x3 groups": ({"merger": MergerConfig(kernel=(3, 3), groups=2)}, HALF),
    "four blocks": ({"num_layers": 4}, HALF),
    "target camera": ({"camera_conditioning": "target", "num_layers": 4}, HALF),
    "no camera": (NO_CAMERA | {"num_layers": 4}, HALF),
    "static": ({}, STATIC | {"merge": "off"}),
    "static, conv": ({}, STATIC | HALF),
    "static, discard": (NO_CAMERA, STATIC | {"merge": "discard", "fraction": 0.7}),
    "static, joint scope": ({}, STATIC | HALF | {"scope": "joint"}),
    "static, target alone": ({}, STATIC | {"tokenizers": (), "source": False}),
}
for _camera in ("own", "none"):
    for _form in ("prope", "prope_fused_dual"):
        _shape = {"camera_attention": _form, "attention_head_dim": 16}
        _shape |= {"camera_conditioning": _camera}
        CASES |= {f"{_form}, {_camera}": (_shape, HALF)}
        CASES |= {f"{_form}, {_camera}, static": (_shape, STATIC | HALF)}


@pytest.mark.parametrize("name", CASES)
def test_a_forward_costs_what_the_plan_says(name: str) -> None:
    changes, arguments = CASES[name]
    plan = turn_plan(tiny_config(**changes), GRID, **{"tokenizers": (4, 8)} | arguments)
    cache = ConditioningCache(plan) if plan.conditioning == "static" else None
    counted, records = _counted(plan, cache)
    steps = [record.step for record in records]
    assert sum(flop_table(plan, steps).values()) == counted
    if plan.scope == "group":  # else the data decide
        assert sum(flop_table(plan).values()) == counted and len(steps) == len(plan.merge_steps)
    if cache is None:
        return
    later, none = _counted(plan, cache)
    assert none == []
    table = kept_flop_table(plan, steps)
    assert sum(table.values()) == later < counted
    # one count serves the turn's report and the cost against memory (METHOD 16)
    assert table["target_blocks"] == plan.flops(steps) == block_flops(plan, steps)
    assert conditioning_flops(replace(plan, conditioning="joint"), steps) == 0


def test_the_blocks_are_the_tables_blocks() -> None:
    plan = turn_plan(tiny_config(), GRID, (4, 8), fraction=0.5)
    table = flop_table(plan)
    blocks = table["self_attention"] + table["linear"] + table["cross_attention"]
    assert plan.flops() == block_flops(plan) == blocks
