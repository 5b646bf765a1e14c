"""The full-size configs run as they are: on fake tensors, with the FLOPs that the plan promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mv2v_engine.config import WAN_1_3B, WAN_5B, TransformerConfig
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.tokens.flops import flop_table
from mv2v_engine.tokens.plan import TokenPlan, editing_plan, novel_view_plan


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


@pytest.mark.parametrize(
    ("shape", "plan"),
    [
        pytest.param(WAN_1_3B, novel_view_plan(memory=10), id="1.3B-ten-memories"),
        pytest.param(WAN_5B, editing_plan(WAN_5B, (21, 30, 52), (4, 4, 4, 8)), id="5B-editing"),
    ],
)
def test_a_full_size_forward_never_waits_for_data(
    shape: TransformerConfig, plan: TokenPlan
) -> None:
    """A data-dependent shape or a host read raises under fake tensors."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode(), torch.no_grad():
            model = MV2VTransformer(shape)
            latents = [torch.empty(1, shape.in_channels, *s.grid) for s in plan.segments]
            cameras: Tensor | None = None
            if shape.has_camera:
                cameras = torch.empty(1, len(plan.segments), plan.target.num_frames, 12)
            # torch's own table leaves the CPU's fused attention out
            fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            with FlopCounterMode(display=False, custom_mapping={fused: _attention_flops}) as count:
                velocity = model(
                    latents,
                    torch.empty(1),
                    torch.empty(1, shape.text_len, shape.text_dim),
                    plan=plan,
                    cameras=cameras,
                )
    finally:
        torch.set_default_dtype(previous)
    assert tuple(velocity.shape) == (1, shape.out_channels, *plan.target.grid)
    assert count.get_total_flops() == sum(flop_table(plan).values())
