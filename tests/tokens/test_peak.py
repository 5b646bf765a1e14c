"""Predicted bytes of the forwards against those of the real model without memory, counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mv2v_engine.config import TINY, WAN_1_3B, HistoryConfig
from mv2v_engine.counting import LiveBytes
from mv2v_engine.models import rope
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.kept import ConditioningCache
from mv2v_engine.models.quantized import quantize_linears
from mv2v_engine.tokens.flops import conditioning_bytes
from mv2v_engine.tokens.peak import Execution, forward_peak_bytes
from mv2v_engine.tokens.plan import TokenPlan, novel_view_plan, turn_plan
from tests.torch_state import default_dtype

BFLOAT16, CHUNK = torch.bfloat16, 16_384
# merges before blocks 1 and 2, in a tenth of the time of all thirty
SHALLOW = replace(WAN_1_3B, num_layers=3, merge_blocks=None)
SHALLOW_TINY = replace(TINY, num_layers=3, merge_blocks=None)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No oneDNN under the reference; a table made under fake tensors is of no use to others."""
    monkeypatch.setattr("mv2v_engine.ops.linear_gelu._HAS_BFLOAT16", False)
    rope.table_on.cache_clear()
    yield
    rope.table_on.cache_clear()


def counted(
    plan: TokenPlan, dtype: torch.dtype, chunk: int | None, backend: str, quantize: Any = None
) -> int:
    """Peak of a whole forward, and with static conditioning of a later one over what it kept.

    Operations that are one opaque call run on the meta device; the reference's attention would be
    another one there, with all its scores, so that it runs on fake tensors of a CPU.
    """
    shape = plan.shape
    with default_dtype(dtype):
        device = FakeTensorMode() if backend == "reference" else torch.device("meta")
        with device, torch.no_grad():
            model = MV2VTransformer(shape)
            if quantize is not None:
                quantize_linears(model, quantize)
            model.set_backend(backend)
            model.set_feed_forward_chunk(chunk)
            given = [torch.empty(1, shape.in_channels, *s.grid) for s in plan.segments]
            size = (1, len(plan.segments), plan.target.num_frames, shape.camera_dim)
            cameras = torch.empty(size, dtype=torch.float32) if shape.has_camera else None
            text, timestep = torch.empty(1, shape.text_len, shape.text_dim), torch.empty(1)
            keep = ConditioningCache(plan) if plan.conditioning == "static" else None
            with LiveBytes() as live:
                model(given, timestep, text, plan=plan, cameras=cameras, kept=keep)
                if keep is not None:
                    model([given[0]], timestep, text, plan=plan, kept=keep)
    return live.peak


def _assert_predicted(
    plan: TokenPlan,
    dtype: torch.dtype,
    chunk: int | None,
    backend: str = "auto",
    quantize: Any = None,
) -> None:
    count = counted(plan, dtype, chunk, backend, quantize)
    is_quantized = quantize is not None
    execution = Execution(
        dtype.itemsize, chunk, is_fused=backend == "auto", is_quantized=is_quantized
    )
    found = forward_peak_bytes(plan, execution)
    print(f"\n{count:,} bytes counted, {found / count:.4f} of them predicted")
    assert found == pytest.approx(count, rel=0.02)


@pytest.mark.parametrize("conditioning", ["joint", "static"])
@pytest.mark.parametrize(("memory", "merge"), [(0, "off"), (3, "conv"), (10, "conv"), (10, "off")])
def test_full_size(memory: int, merge: Any, conditioning: Any) -> None:
    plan = novel_view_plan(memory=memory, merge=merge, conditioning=conditioning, shape=SHALLOW)
    _assert_predicted(plan, BFLOAT16, CHUNK)


@pytest.mark.parametrize("attention", ["prope", "prope_fused"])
@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_cameras_inside_attention(conditioning: Any, attention: Any) -> None:
    shape = replace(SHALLOW, camera_attention=attention)
    plan = novel_view_plan(memory=3, conditioning=conditioning, shape=shape)
    _assert_predicted(plan, BFLOAT16, CHUNK)
    tiny = replace(SHALLOW_TINY, camera_attention=attention)
    plan = novel_view_plan(
        memory=4, conditioning=conditioning, shape=tiny, frames=17, size=(96, 160)
    )
    _assert_predicted(plan, torch.float32, None, "reference")


@pytest.mark.parametrize("conditioning", ["joint", "static"])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_weights_that_are_made_when_they_are_used(kind: Any, conditioning: Any) -> None:
    """One layer's at a time; of few tokens it is most of a peak."""
    plan = novel_view_plan(memory=3, conditioning=conditioning, shape=SHALLOW)
    _assert_predicted(plan, BFLOAT16, CHUNK, quantize=kind)
    few = novel_view_plan(
        memory=1, conditioning=conditioning, shape=SHALLOW, frames=5, size=(96, 160)
    )
    _assert_predicted(few, BFLOAT16, CHUNK, quantize=kind)


@pytest.mark.parametrize("conditioning", ["joint", "static"])
@pytest.mark.parametrize("blocks", [(), (0, 2)])
def test_a_history(conditioning: Any, blocks: tuple[int, ...]) -> None:
    history = HistoryConfig(cross_attention=blocks)
    shape = replace(SHALLOW, camera_conditioning="none", history=history)
    plan = turn_plan(
        shape, (21, 60, 104), (4,) * 4, merge="off", conditioning=conditioning, history="4x4x2"
    )
    _assert_predicted(plan, BFLOAT16, CHUNK)


def test_full_size_by_the_reference() -> None:
    plan = novel_view_plan(memory=3, conditioning="static", shape=SHALLOW)
    _assert_predicted(plan, BFLOAT16, CHUNK, "reference")


def test_all_tokens_at_once() -> None:
    _assert_predicted(novel_view_plan(memory=3, shape=SHALLOW), BFLOAT16, None)


@pytest.mark.parametrize(
    ("conditioning", "dtype"), [("joint", torch.float32), ("static", BFLOAT16)]
)
def test_tiny(conditioning: Any, dtype: torch.dtype) -> None:
    plan = novel_view_plan(
        memory=4, conditioning=conditioning, shape=SHALLOW_TINY, frames=17, size=(96, 160)
    )
    _assert_predicted(plan, dtype, None, "reference")


def test_ten_memories_at_full_depth() -> None:
    """Joint, a few tensors of all tokens; static, besides, what it keeps of thirty blocks."""
    execution = Execution(2, CHUNK)
    static = novel_view_plan(memory=10, conditioning="static", merge="off")
    _assert_predicted(static, BFLOAT16, CHUNK)
    kept = conditioning_bytes(static, 2)
    assert 13e9 < kept < forward_peak_bytes(static, execution) < kept + 1.75e9
    joint = novel_view_plan(memory=10)
    assert forward_peak_bytes(joint, execution) < 1.75e9
    assert forward_peak_bytes(joint, replace(execution, chunk=None)) > 3.1e9


def test_merging_bounds_what_static_keeps() -> None:
    execution, plan = Execution(2, CHUNK), novel_view_plan(memory=10, conditioning="static")
    unmerged = forward_peak_bytes(replace(plan, merge="off"), execution)
    assert forward_peak_bytes(plan, execution) < 0.7 * unmerged
    # lengths that depend on data are taken as if nothing merged
    assert forward_peak_bytes(replace(plan, scope="joint"), execution) == unmerged
