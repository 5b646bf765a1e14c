"""Kept conditioning K and V: the target alone gives what a whole static forward would."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine.config import TransformerConfig
from mv2v_engine.models import merging
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.kept import ConditioningCache, KeptLayout
from mv2v_engine.models.merging import MergeRecord
from mv2v_engine.testing import as_cameras, relative_error, tiny_config
from mv2v_engine.tokens.flops import conditioning_bytes
from mv2v_engine.tokens.plan import TokenPlan, novel_view_plan, turn_plan
from tests.models.drawn import random_model

GRID = (3, 12, 20)
# 3x5 tokens of the source, 2x3 of a memory padded to 8x12
ODD = (3, 6, 10)
Inputs = dict[str, Any]


def _model(config: TransformerConfig, dtype: torch.dtype = torch.float32) -> MV2VTransformer:
    model = random_model(config)
    for name, parameter in model.named_parameters():
        if not any(part in name for part in model.keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    return model


def _plan(config: TransformerConfig, **arguments: Any) -> TokenPlan:
    fields = {"grid": GRID, "tokenizers": (4, 8), "conditioning": "static"} | arguments
    return turn_plan(config, **fields)


def _conditions(plan: TokenPlan, batch: int = 1) -> tuple[list[Tensor], Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(batch, 4, *s.grid, generator=generator) for s in plan.segments[1:]]
    cameras = torch.randn(batch, len(plan.segments), 3, 12, generator=generator)
    return latents, as_cameras(cameras, plan.shape) if plan.shape.has_camera else None


def _step(plan: TokenPlan, seed: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy target, timestep and text: what changes within a turn."""
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.randn(batch, 4, *plan.target.grid, generator=generator)
    timestep = 1000 * torch.rand(batch, generator=generator)
    return noisy, timestep, torch.randn(batch, 6, 10, generator=generator)


def _filled(
    model: MV2VTransformer, plan: TokenPlan, batch: int = 1
) -> tuple[ConditioningCache, list[MergeRecord]]:
    cache, records = ConditioningCache(plan), list[MergeRecord]()
    latents, cameras = _conditions(plan, batch)
    noisy, timestep, text = _step(plan, 1, batch)
    inputs = ([noisy, *latents], timestep, text)
    with torch.no_grad():
        first = model(*inputs, plan=plan, cameras=cameras, records=records, kept=cache)
        assert torch.equal(first, model(*inputs, plan=plan, cameras=cameras))
    assert cache.is_filled
    return cache, records


PHASES: Inputs = {"camera_attention": "phases", "camera_conditioning": "none"}
CASES: dict[str, tuple[Inputs, Inputs]] = {
    "no merging": ({}, {"merge": "off"}),
    "conv": ({}, {"fraction": 0.5}),
    "conv, odd grid": ({}, {"grid": ODD, "tokenizers": (2, 4), "fraction": 0.7}),
    "conv, joint scope": ({}, {"fraction": 0.5, "scope": "joint"}),
    "discard": ({}, {"merge": "discard", "fraction": 0.5}),
    "no camera": ({"camera_conditioning": "none"}, {"fraction": 0.5}),
    "target camera": ({"camera_conditioning": "target"}, {"fraction": 0.5}),
    "target alone": ({}, {"tokenizers": (), "source": False}),
    "phases": (PHASES, {"fraction": 0.5}),
    "phases, odd grid": (PHASES, {"grid": ODD, "tokenizers": (2, 4), "fraction": 0.7}),
    "prope": ({"camera_attention": "prope", "attention_head_dim": 16}, {"fraction": 0.5}),
    "prope, fused": ({"camera_attention": "prope_fused_dual"}, {"fraction": 0.5}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_kept_equals_recomputed(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, arguments = CASES[name]
    config = tiny_config(**changes)
    plan, model = _plan(config, **arguments), _model(config, dtype)
    cache, records = _filled(model, plan)
    assert bool(records) == (plan.merge != "off" and len(plan.segments) > 1)

    kept = [tensor for block in cache.blocks for tensor in block]
    assert {tensor.dtype for tensor in kept} == {dtype}
    steps = [record.step for record in records]
    held = sum(tensor.untyped_storage().nbytes() for tensor in kept)
    assert held == conditioning_bytes(plan, dtype.itemsize, steps)

    latents, cameras = _conditions(plan)
    for seed in (2, 3):
        noisy, timestep, text = _step(plan, seed)
        scores = iter([record.responsiveness for record in records])
        # recomputed with the first forward's choice of frames
        with monkeypatch.context() as patch:
            patch.setattr(merging, "responsiveness", lambda *_, scores=scores: next(scores))
            expected = model([noisy, *latents], timestep, text, plan=plan, cameras=cameras)
        got = model([noisy], timestep, text, plan=plan, kept=cache)
        assert relative_error(got, expected) < 4 * torch.finfo(dtype).eps


def test_frames_stay_chosen() -> None:
    config = tiny_config()
    plan, model = _plan(config, fraction=0.5), _model(config)
    cache, first = _filled(model, plan)
    latents, cameras = _conditions(plan)
    noisy, timestep, text = _step(plan, 2)
    own: list[MergeRecord] = []
    free = model([noisy, *latents], timestep, text, plan=plan, cameras=cameras, records=own)
    assert any(not torch.equal(a.merged, b.merged) for a, b in zip(first, own, strict=True))
    got = model([noisy], timestep, text, plan=plan, kept=cache)
    assert relative_error(got, free) > 1e-4


def test_a_batch_keeps_for_every_sample() -> None:
    config = tiny_config()
    plan, model = _plan(config, fraction=0.5), _model(config)
    latents, cameras = _conditions(plan, batch=2)
    assert cameras is not None
    whole, _ = _filled(model, plan, batch=2)
    noisy, timestep, text = _step(plan, 2, batch=2)
    got = model([noisy], timestep, text, plan=plan, kept=whole)
    first_noisy, first_timestep, first_text = _step(plan, 1, batch=2)
    for i in range(2):
        one, cache = slice(i, i + 1), ConditioningCache(plan)
        own = [first_noisy[one], *(latent[one] for latent in latents)]
        with torch.no_grad():
            model(
                own, first_timestep[one], first_text[one], plan=plan, cameras=cameras[one],
                kept=cache,
            )  # fmt: skip
        single = model([noisy[one]], timestep[one], text[one], plan=plan, kept=cache)
        assert relative_error(got[one], single) < 1e-5


def test_training_recomputes() -> None:
    config = tiny_config()
    plan = _plan(config, tokenizers=(2, 4, 8), fraction=0.5)
    model = _model(config)
    _filled(model, plan)
    model.requires_grad_(True)
    latents, cameras = _conditions(plan)
    noisy, timestep, text = _step(plan, 1)
    model([noisy, *latents], timestep, text, plan=plan, cameras=cameras).pow(2).mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_misuse_is_refused() -> None:
    config = tiny_config()
    plan, model = _plan(config, merge="off"), _model(config)
    latents, cameras = _conditions(plan)
    noisy, timestep, text = _step(plan, 1)

    def fill(cache: ConditioningCache) -> None:
        model([noisy, *latents], timestep, text, plan=plan, cameras=cameras, kept=cache)

    with pytest.raises(ValueError, match="got a plan of 'joint'"):
        ConditioningCache(replace(plan, conditioning="joint"))
    with pytest.raises(ValueError, match=r"run under torch\.no_grad"):
        fill(ConditioningCache(plan))
    cache, _ = _filled(model, plan)
    half = ConditioningCache(plan)
    half.append(cache.of_block(0))
    with torch.no_grad():
        with pytest.raises(ValueError, match="holds another forward's"):
            fill(half)
        with pytest.raises(ValueError, match="made for another plan"):
            fill(ConditioningCache(replace(plan, merge="conv")))
    with pytest.raises(ValueError, match="target latents must have shape"):
        model([noisy[:, :, :2]], timestep, text, plan=plan, kept=cache)
    cache.release()
    with pytest.raises(ValueError, match="the plan has 4 segments, got 1"):
        model([noisy], timestep, text, plan=plan, kept=cache)


def test_bytes_of_a_full_size_turn() -> None:
    plan = novel_view_plan(memory=10, merge="off", conditioning="static")
    # K and V in bfloat16 of all but the target's 32,760 tokens, in 30 blocks
    assert conditioning_bytes(plan, 2) == 2 * 2 * (105_378 - 32_760) * 1536 * 30
    merged = novel_view_plan(memory=10, conditioning="static")
    assert conditioning_bytes(merged, 2) < 0.7 * conditioning_bytes(plan, 2)
    assert conditioning_bytes(novel_view_plan(memory=10), 2) == 0


@pytest.mark.parametrize("attention", ["none", "prope_fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layout_places_all_that_is_kept(dtype: torch.dtype, attention: str) -> None:
    """Disjoint, on CUDA's own alignment, and as it would be kept anywhere."""
    config = tiny_config(camera_attention=attention)
    plan, model = _plan(config, fraction=0.5), _model(config, dtype)
    cache, _ = _filled(model, plan)
    layout = KeptLayout(plan, dtype, torch.float32)
    buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    storage = layout.storage(buffer)
    placed = [tensor for pair in storage.blocks for tensor in pair]
    kept = [tensor for pair in cache.blocks for tensor in pair]
    assert storage.cameras is not None and cache.cameras is not None
    for ours, theirs in zip([*placed, storage.cameras], [*kept, cache.cameras], strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert (ours.data_ptr() - buffer.data_ptr()) % 512 == 0
        before = int(buffer.count_nonzero())
        ours.view(torch.uint8).fill_(1)
        assert int(buffer.count_nonzero()) == before + ours.nbytes
    assert layout.num_bytes < conditioning_bytes(plan, dtype.itemsize) + 512 * (len(kept) + 2)
