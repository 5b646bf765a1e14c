"""FLOPs of the plan equal the FLOPs that torch counts in a real forward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mv2v_engine.config import MergerConfig, TransformerConfig
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.token_merge import MergeRecord
from mv2v_engine.testing import randomise, tiny_config
from mv2v_engine.tokens.flops import block_flops, conditioning_flops, flop_table
from mv2v_engine.tokens.plan import TokenPlan, turn_plan

GRID = (3, 12, 20)


def _sdpa(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """4 Lq Lk D of every head: the CPU kernel has no formula in torch's own table."""
    batch, heads, queries, dim = q
    return 4 * int(batch * heads * queries * dim * k[2])


def _counted(plan: TokenPlan, config: TransformerConfig) -> tuple[int, list[MergeRecord]]:
    torch.manual_seed(0)
    model = MV2VTransformer(config)
    randomise(model)
    records: list[MergeRecord] = []
    latents = [torch.randn(1, config.in_channels, *s.grid) for s in plan.segments]
    cameras = torch.randn(1, len(plan.segments) + 1, GRID[0], 12) if config.has_camera else None
    text = torch.randn(1, config.text_len, config.text_dim)
    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.no_grad():
        model(latents, torch.tensor([500.0]), text, plan=plan, cameras=cameras, records=records)
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


def test_joint_scope_is_counted_from_what_happened() -> None:
    config = tiny_config()
    plan = turn_plan(config, GRID, (4, 8), fraction=0.5, scope="joint")
    counted, records = _counted(plan, config)
    assert sum(flop_table(plan, [record.step for record in records]).values()) == counted


def test_static_steps_and_conditioning_add_up() -> None:
    config = tiny_config()
    plan = turn_plan(config, GRID, (4, 8), merge="off", conditioning="static")
    counted, _ = _counted(plan, config)
    joint = flop_table(plan)
    # a full static forward embeds two timesteps, and its halves encode the cameras separately
    time = 2 * (config.freq_dim * config.dim + 7 * config.dim**2)
    rest = joint["tokenize"] + joint["embedding"] + time + 2 * joint["camera"] + joint["head"]
    assert block_flops(plan) + conditioning_flops(plan) + rest == counted
    assert conditioning_flops(replace(plan, conditioning="joint")) == 0


def test_the_blocks_are_the_tables_blocks() -> None:
    plan = turn_plan(tiny_config(), GRID, (4, 8), fraction=0.5)
    table = flop_table(plan)
    blocks = table["self_attention"] + table["linear"] + table["cross_attention"]
    assert plan.flops() == block_flops(plan) == blocks
