"""FLOPs of the plan equal the FLOPs that torch counts in a real forward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mv2v_engine.config import MergerConfig, TransformerConfig
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.kept import ConditioningCache
from mv2v_engine.models.merging import MergeRecord
from mv2v_engine.testing import cpu_flops, randomise, tiny_config
from mv2v_engine.tokens.flops import block_flops, conditioning_flops, flop_table, kept_flop_table
from mv2v_engine.tokens.plan import TokenPlan, turn_plan

GRID = (3, 12, 20)


def _counted(
    plan: TokenPlan, config: TransformerConfig, keep: ConditioningCache | None = None
) -> tuple[int, list[MergeRecord]]:
    """FLOPs of a whole forward and its merges; of the target alone where `keep` is filled."""
    torch.manual_seed(0)
    model = MV2VTransformer(config)
    randomise(model)
    records: list[MergeRecord] = []
    latents = [torch.randn(1, config.in_channels, *s.grid) for s in plan.segments]
    size = (1, len(plan.segments) + 1, GRID[0], config.camera_dim)
    cameras = torch.randn(size) if config.has_camera else None
    text = torch.randn(1, config.text_len, config.text_dim)
    with FlopCounterMode(display=False, custom_mapping=cpu_flops()) as counter, torch.no_grad():
        timestep = torch.tensor([500.0])
        if keep is not None and keep.is_filled:
            model([latents[0]], timestep, text, plan=plan, kept=keep)
        else:
            model(latents, timestep, text, plan=plan, cameras=cameras, records=records, kept=keep)
    return int(counter.get_total_flops()), records


CASES: dict[str, dict[str, Any]] = {
    "target alone": {"tokenizers": (), "source": False},
    "off": {"merge": "off"},
    "conv": {"merge": "conv", "fraction": 0.5},
    "nothing to merge": {"merge": "conv", "fraction": 0.1},
    "everything merges": {"merge": "conv", "fraction": 1.0},
    "discard": {"merge": "discard", "fraction": 0.7},
    "without a source": {"source": False, "fraction": 0.4},
}


@pytest.mark.parametrize("name", CASES)
def test_a_joint_forward_costs_what_the_plan_says(name: str) -> None:
    config = tiny_config()
    plan = turn_plan(config, GRID, **{"tokenizers": (4, 8)} | CASES[name])
    counted, records = _counted(plan, config)
    assert sum(flop_table(plan).values()) == counted
    assert len(records) == len(plan.merge_steps)


@pytest.mark.parametrize(
    "merger",
    [
        None,
        MergerConfig(bias=False),
        MergerConfig(pooled=True),
        MergerConfig(shared=True),
        MergerConfig(groups=24),
        MergerConfig(kernel=(1, 2)),
        MergerConfig(kernel=(3, 3), groups=2),
    ],
    ids=["average", "no bias", "pooled", "shared", "depth-wise", "1x2", "3x3 groups"],
)
def test_every_kind_of_merger_is_counted(merger: MergerConfig | None) -> None:
    config = tiny_config(merger=merger)
    plan = turn_plan(config, GRID, (4, 8), fraction=0.5)
    assert sum(flop_table(plan).values()) == _counted(plan, config)[0]


@pytest.mark.parametrize("camera", ["own", "target", "none"])
def test_camera_modules_are_counted(camera: Any) -> None:
    config = tiny_config(camera_conditioning=camera, num_layers=4)
    plan = turn_plan(config, GRID, (2,), fraction=0.5)
    assert sum(flop_table(plan).values()) == _counted(plan, config)[0]


@pytest.mark.parametrize("conditioning", ["joint", "static"])
@pytest.mark.parametrize("attention", ["prope", "prope_fused_dual"])
@pytest.mark.parametrize("camera", ["own", "none"])
def test_cameras_inside_attention_are_counted(
    camera: Any, attention: Any, conditioning: Any
) -> None:
    config = tiny_config(
        camera_conditioning=camera, camera_attention=attention, attention_head_dim=16
    )
    plan = turn_plan(config, GRID, (2, 4), fraction=0.5, conditioning=conditioning)
    cache = ConditioningCache(plan) if conditioning == "static" else None
    assert sum(flop_table(plan).values()) == _counted(plan, config, cache)[0]
    if cache is not None:
        assert sum(kept_flop_table(plan).values()) == _counted(plan, config, cache)[0]


def test_joint_scope_is_counted_from_what_happened() -> None:
    config = tiny_config()
    plan = turn_plan(config, GRID, (4, 8), fraction=0.5, scope="joint")
    counted, records = _counted(plan, config)
    assert sum(flop_table(plan, [record.step for record in records]).values()) == counted


STATIC: dict[str, tuple[Any, dict[str, Any]]] = {
    "off": ("own", {"merge": "off"}),
    "conv": ("own", {"fraction": 0.5}),
    "discard": ("none", {"merge": "discard", "fraction": 0.7}),
    "joint scope": ("own", {"fraction": 0.5, "scope": "joint"}),
    "target alone": ("own", {"tokenizers": (), "source": False}),
}


@pytest.mark.parametrize("name", STATIC)
def test_static_forwards_cost_what_the_plan_says(name: str) -> None:
    camera, arguments = STATIC[name]
    config = tiny_config(camera_conditioning=camera)
    fields = {"tokenizers": (4, 8), "conditioning": "static"} | arguments
    plan = turn_plan(config, GRID, **fields)
    cache = ConditioningCache(plan)
    whole, records = _counted(plan, config, cache)
    steps = [record.step for record in records]
    assert sum(flop_table(plan, steps).values()) == whole
    later, none = _counted(plan, config, cache)
    assert none == []
    table = kept_flop_table(plan, steps)
    assert sum(table.values()) == later < whole
    # one count serves the turn's report and the cost against memory (METHOD 16)
    assert table["target_blocks"] == plan.flops(steps) == block_flops(plan, steps)
    assert conditioning_flops(replace(plan, conditioning="joint"), steps) == 0


def test_the_blocks_are_the_tables_blocks() -> None:
    plan = turn_plan(tiny_config(), GRID, (4, 8), fraction=0.5)
    table = flop_table(plan)
    blocks = table["self_attention"] + table["linear"] + table["cross_attention"]
    assert plan.flops() == block_flops(plan) == blocks
