"""Kept joint conditioning: the target over it, how it drifts, and what may go wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mv2v_engine.config import TransformerConfig
from mv2v_engine.models import dit
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.forward_pass import TargetResidual
from mv2v_engine.models.joint_cache import JointCache
from mv2v_engine.models.token_merge import MergeRecord
from mv2v_engine.testing import as_cameras, randomise, relative_error, tiny_config
from mv2v_engine.tokens.flops import conditioning_bytes
from mv2v_engine.tokens.plan import TokenPlan, turn_plan

GRID = (3, 6, 10)


def _model(**changes: Any) -> tuple[MV2VTransformer, TransformerConfig]:
    config = tiny_config(**changes)
    model = MV2VTransformer(config).eval().requires_grad_(False)
    randomise(model)
    return model, config


def _plan(config: TransformerConfig, **arguments: Any) -> TokenPlan:
    fields: dict[str, Any] = {"tokenizers": (4, 8), "fraction": 0.5}
    return turn_plan(config, GRID, **fields | arguments)


def _inputs(plan: TokenPlan, seed: int) -> tuple[tuple[list[Tensor], Tensor, Tensor], Any]:
    """Conditioning that stays, and a target, timestep and text of this seed."""
    fixed, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    videos = [torch.randn(1, 4, *s.grid, generator=fixed) for s in plan.segments[1:]]
    cameras = torch.randn(1, len(plan.segments), GRID[0], 12, generator=fixed)
    noisy = torch.randn(1, 4, *GRID, generator=own)
    timestep = 1000 * torch.rand(1, generator=own)
    text = torch.randn(1, 6, 10, generator=own)
    given = as_cameras(cameras, plan.shape) if plan.shape.has_camera else None
    keywords = {"plan": plan, "cameras": given}
    return ([noisy, *videos], timestep, text), keywords


@pytest.mark.parametrize(
    ("changes", "arguments"),
    [
        ({}, {"merge": "off"}),
        ({}, {}),
        ({"camera_conditioning": "none"}, {"merge": "discard"}),
        ({"camera_attention": "prope_fused"}, {"fraction": 0.5}),
        ({}, {"scope": "joint"}),
        ({}, {"tokenizers": (), "source": False}),
    ],
    ids=["off", "conv", "discard, no camera", "prope", "joint scope", "target alone"],
)
def test_the_same_step_again_is_the_whole_forward(changes: Any, arguments: Any) -> None:
    model, config = _model(**changes)
    plan = _plan(config, **arguments)
    given, keywords = _inputs(plan, 1)
    cache, residual = JointCache(plan, probes=False), TargetResidual()
    records: list[MergeRecord] = []
    expected = model(*given, **keywords)
    with torch.no_grad():
        assert torch.equal(
            model(*given, **keywords, records=records, keep=cache, residual=residual), expected
        )
    latents, timestep, text = given
    kept = model.forward_target(latents[0], timestep, text, kept=cache)
    assert relative_error(kept, expected) < 1e-5
    again = model.forward_residual(latents[0], timestep, plan=plan, residual=residual)
    assert relative_error(again, expected) < 1e-5
    # and it is an approximation anywhere else
    other, keywords = _inputs(plan, 2)
    exact = model(*other, **keywords)
    if len(plan.segments) > 1:
        reused = model.forward_target(other[0][0], *other[1:], kept=cache)
        assert relative_error(reused, exact) > 1e-3
    reused = model.forward_residual(other[0][0], other[1], plan=plan, residual=residual)
    assert relative_error(reused, exact) > 1e-3

    steps = [record.step for record in records]
    held = sum(tensor.untyped_storage().nbytes() for block in cache.blocks for tensor in block)
    assert held == conditioning_bytes(plan, 4, steps, copies=1)
    cache.release()
    residual.release()
    assert cache.blocks == [] and residual.value is None


@torch.no_grad()
def test_a_refresh_measures_what_it_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = _model()
    plan = _plan(config)
    cache = JointCache(plan, probes=False)
    (first, keywords), (second, _) = _inputs(plan, 1), _inputs(plan, 2)
    model(*first, **keywords, keep=cache)
    before = list(cache.blocks)
    assert cache.is_filled and cache.drifts is None
    # the same step, but for frames chosen otherwise: what did not move has not drifted
    with monkeypatch.context() as patch:
        chosen = model.responsiveness
        patch.setattr(model, "responsiveness", lambda *given: -chosen(*given))
        model(*first, **keywords, keep=cache)
    assert cache.drifts is not None
    own, merged = cache.drifts[0], cache.drifts[1:]
    assert own.tolist() == [0, 0, 1] and (merged[:, 2] < 1).all() and (merged[:, 2] > 0).all()
    assert merged[0, :2].max() < 1e-5, "its K and V are those of the same tokens, elsewhere"

    model(*first, **keywords, keep=cache)
    model(*second, **keywords, keep=cache)
    assert (cache.drifts[:, :2] > 1e-3).all()
    changes = [
        relative_error(old, new) for old, new in zip(before[0], cache.blocks[0], strict=True)
    ]
    assert cache.drifts[0].tolist() == pytest.approx([*changes, 1], rel=1e-4)


@torch.no_grad()
def test_a_probe_compares_the_first_blocks_output() -> None:
    model, config = _model()
    plan = _plan(config)
    cache = JointCache(plan, probes=True)
    outputs = []
    for seed in (1, 2):
        given, keywords = _inputs(plan, seed)
        begun = model.begin(*given, **keywords)
        model.run_blocks(begun, stop=1)
        outputs.append(begun.sequence.x[:, plan.target.length :])
        drift = cache.probe(begun.sequence)
        if seed == 1:
            assert drift is None
            cache.keep_output(begun.sequence)
            begun.keep_in(cache)
            model.run_blocks(begun)
            assert torch.equal(model.finish(begun), model(*given, **keywords))
    assert drift is not None and float(drift) == pytest.approx(
        (outputs[1] - outputs[0]).norm() / outputs[1].norm()
    )
    # the first block's K and V are not kept: it is never run over them
    assert cache.is_filled and len(cache.blocks) == config.num_layers - 1
    begun.go_on_over(cache)
    model.run_blocks(begun)
    assert 1e-3 < relative_error(model.finish(begun), model(*given, **keywords)) < 1


def test_misuse_is_refused() -> None:
    model, config = _model()
    plan, static = _plan(config), _plan(config, conditioning="static")
    with pytest.raises(ValueError, match=r"JointCache keeps conditioning='joint', got .*'static'"):
        JointCache(static, probes=True)
    given, keywords = _inputs(plan, 1)
    with torch.no_grad(), pytest.raises(ValueError, match="made for another plan"):
        model(*given, **keywords, keep=JointCache(_plan(config, merge="off"), probes=False))
    with pytest.raises(ValueError, match="no forward has left a residual"):
        model.forward_residual(given[0][0], given[1], plan=plan, residual=TargetResidual())
    half = JointCache(plan, probes=False)
    with torch.no_grad():
        begun = model.begin(*given, **keywords)
        begun.keep_in(half)
        model.run_blocks(begun, stop=2)
    with torch.no_grad(), pytest.raises(ValueError, match="holds another forward's"):
        model(*given, **keywords, keep=half)


def test_nothing_waits_for_data() -> None:
    """A data-dependent shape or a host read raises under fake tensors."""
    config = tiny_config()
    plan = _plan(config)
    # a table made under fake tensors is of no use to anyone else
    dit._rotary_table.cache_clear()
    try:
        with FakeTensorMode(), torch.no_grad():
            model = MV2VTransformer(config)
            latents = [torch.empty(1, 4, *segment.grid) for segment in plan.segments]
            cameras = torch.empty(1, len(plan.segments), GRID[0], 12)
            given = (torch.empty(1), torch.empty(1, 6, 10))
            cache, residual = JointCache(plan, probes=False), TargetResidual()
            for _ in range(2):
                model(latents, *given, plan=plan, cameras=cameras, keep=cache, residual=residual)
            kept = model.forward_target(latents[0], *given, kept=cache)
            again = model.forward_residual(latents[0], given[0], plan=plan, residual=residual)
    finally:
        dit._rotary_table.cache_clear()
    assert cache.drifts is not None and cache.drifts.shape == (config.num_layers, 3)
    assert kept.shape == again.shape == latents[0].shape
