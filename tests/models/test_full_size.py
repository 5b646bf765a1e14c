"""The full-size configs run as they are: on fake tensors, with the FLOPs that the plan promises.

With the reference, torch's own operations are counted, in six blocks. With the kernels' backend
each operation is one opaque call whose fake is all that there is, as it is to a compiler or a graph
on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mv2v_engine.config import LUCY_5B, WAN_1_3B, TransformerConfig
from mv2v_engine.models import rope
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.sample import Sample
from mv2v_engine.testing import cpu_flops
from mv2v_engine.tokens.flops import flop_table
from mv2v_engine.tokens.plan import TokenPlan, novel_view_plan, window_plan
from tests.torch_state import default_dtype


def _dense_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    """FLOPs of shapes [B, L, N, D], where torch's attention has [B, N, L, D]."""
    return int(sdpa_flop_count(*((b, n, length, d) for b, length, n, d in (q, k, v))))


def _responsiveness_flops(
    q: Any, k: Any, frames: list[int], tokens: list[int], num_heads: int, **kwargs: Any
) -> int:
    """One product of every query and every frame's mean."""
    batch, queries, width = q
    return int(2 * batch * queries * sum(frames) * width)


def _merge_flops(
    x: Any,
    rope: Any,
    kept: Any,
    merged: Any,
    weight: Any,
    bias: Any,
    grid: list[int],
    kernel: list[int],
    **kwargs: Any,
) -> int:
    """One product for every merged token, of its window's cells and the weight."""
    windows = -(-grid[0] // kernel[0]) * -(-grid[1] // kernel[1])
    return int(2 * merged[0] * merged[1] * windows * math.prod(weight))


# torch's own table knows nothing of these operations
FORMULAS = cpu_flops() | {
    torch.ops.mv2v.attention: _dense_flops,
    torch.ops.mv2v.frame_responsiveness: _responsiveness_flops,
    torch.ops.mv2v.token_merge: _merge_flops,
}


@pytest.fixture(autouse=True)
def no_fake_tables() -> Iterator[None]:
    """A table made under fake tensors is kept for nobody."""
    before = rope.table_on.cache_info().currsize
    yield
    assert rope.table_on.cache_info().currsize == before


# a block of the reference is many operations: six of them, of which the third and fifth merge
VIEWS, EDITS = (replace(full, num_layers=6, merge_blocks=None) for full in (WAN_1_3B, LUCY_5B))
TEN_MEMORIES_OF_SIX = novel_view_plan(memory=10, shape=VIEWS)
EDITING_OF_SIX = window_plan(memory=4, shape=EDITS)
TEN_MEMORIES = novel_view_plan(memory=10)
STATIC_EDITING = window_plan(memory=4, conditioning="static")


@pytest.mark.parametrize(
    ("shape", "plan", "backend"),
    [
        pytest.param(VIEWS, TEN_MEMORIES_OF_SIX, "reference", id="1.3B-ten-memories"),
        pytest.param(WAN_1_3B, TEN_MEMORIES, "auto", id="1.3B-ten-memories-kernels"),
        pytest.param(EDITS, EDITING_OF_SIX, "reference", id="5B-editing"),
        pytest.param(LUCY_5B, STATIC_EDITING, "auto", id="5B-editing-static-kernels"),
    ],
)
def test_a_full_size_forward_never_waits_for_data(
    shape: TransformerConfig, plan: TokenPlan, backend: str
) -> None:
    """A data-dependent shape or a host read raises under fake tensors."""
    with default_dtype(torch.bfloat16), FakeTensorMode(), torch.no_grad():
        model = MV2VTransformer(shape)
        model.set_backend(backend)
        latents = [torch.empty(1, shape.channels_of(s.role), *s.grid) for s in plan.segments]
        cameras: Tensor | None = None
        if shape.has_camera:
            cameras = torch.empty(1, len(plan.segments), plan.target.num_frames, 12)
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as count:
            velocity = model(
                latents,
                torch.empty(1),
                torch.empty(1, shape.text_len, shape.text_dim),
                plan=plan,
                cameras=cameras,
            )
    assert tuple(velocity.shape) == (1, shape.out_channels, *plan.target.grid)
    assert count.get_total_flops() == sum(flop_table(plan).values())
    counted = {str(name) for name in count.get_flop_counts()["Global"]}
    names = ("attention", "frame_responsiveness", "linear_gelu", "token_merge")
    ours = {f"mv2v.{name}" for name in names}
    if backend != "auto":
        ours.remove("mv2v.linear_gelu")  # oneDNN's, where the CPU multiplies bfloat16
    assert counted & ours == (ours if backend == "auto" else set())


def test_a_full_size_pack_never_waits_for_data() -> None:
    """Ten memory videos beside two and none, on the kernels' operations."""
    with FakeTensorMode(), torch.no_grad():
        model = MV2VTransformer(replace(WAN_1_3B, num_layers=3, merge_blocks=None))
        model.set_backend("auto")
        samples = [
            Sample(
                latents=[torch.empty(1, 16, *segment.grid) for segment in plan.segments],
                timestep=torch.empty(1),
                encoder_hidden_states=torch.empty(1, 512, 4096),
                plan=plan,
                cameras=torch.empty(1, len(plan.segments), 21, 12),
            )
            for plan in (novel_view_plan(memory=n, shape=model.config) for n in (10, 2, 0))
        ]
        velocities = model.forward_samples(samples)
    assert [tuple(v.shape) for v in velocities] == [(1, 16, 21, 60, 104)] * 3
