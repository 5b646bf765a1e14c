"""Packs of unlike samples: each is what it is alone, whatever lies beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine.config import TransformerConfig
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.kept import ConditioningCache
from mv2v_engine.models.sample import Sample
from mv2v_engine.testing import (
    as_cameras,
    assert_within_budget,
    relative_error,
    tiny_config,
)
from mv2v_engine.tokens.plan import TokenPlan, turn_plan
from tests.models.drawn import random_model

GRID = (3, 12, 20)
SMALL = (2, 6, 10)
# another number of memory videos, merging, size, or no conditioning at all
PLANS: dict[str, dict[str, Any]] = {
    "two memories": {"grid": GRID, "tokenizers": (4, 8), "fraction": 0.5},
    "target alone": {"grid": SMALL, "tokenizers": (), "source": False},
    "no merging": {"grid": SMALL, "tokenizers": (4,), "merge": "off"},
    "discarding": {"grid": SMALL, "tokenizers": (2, 4, 8), "merge": "discard", "fraction": 0.6},
    "joint scope": {"grid": SMALL, "tokenizers": (4, 4), "fraction": 0.4, "scope": "joint"},
}
PACKS = [list(PLANS)[:1], ["target alone", "two memories"], list(PLANS)]


def _sample(config: TransformerConfig, name: str, conditioning: str, seed: int = 0) -> Sample:
    """Its own latents, timestep, cameras, and text of its own length."""
    arguments = PLANS[name] | {"conditioning": conditioning}
    plan: TokenPlan = turn_plan(config, **arguments)
    generator = torch.Generator().manual_seed(seed + 10 * list(PLANS).index(name))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    size = (1, len(plan.segments), plan.target.num_frames, 12)
    return Sample(
        latents=[draw(1, config.in_channels, *segment.grid) for segment in plan.segments],
        timestep=1000 * torch.rand(1, generator=generator),
        encoder_hidden_states=draw(1, 3 + list(PLANS).index(name), config.text_dim),
        plan=plan,
        cameras=as_cameras(draw(*size), config) if config.has_camera else None,
        records=[],
    )


@torch.no_grad()
def _kept(model: MV2VTransformer, sample: Sample) -> Sample:
    """The sample after a first static forward at another timestep, with other text and noise."""
    cache = ConditioningCache(sample.plan)
    first = replace(sample, timestep=sample.timestep / 2)
    noise = torch.zeros_like(first.latents[0])
    _alone(model, replace(first, latents=[noise, *first.latents[1:]]), kept=cache)
    return replace(sample, latents=sample.latents[:1], kept=cache)


@torch.no_grad()
def _alone(model: MV2VTransformer, sample: Sample, kept: ConditioningCache | None = None) -> Tensor:
    inputs = sample.timestep, sample.encoder_hidden_states
    if sample.kept is not None:
        return model(sample.latents, *inputs, plan=sample.plan, kept=sample.kept)
    more = {"plan": sample.plan, "cameras": sample.cameras}
    velocity: Tensor = model(sample.latents, *inputs, **more, records=sample.records, kept=kept)
    return velocity


@torch.no_grad()
def _packed(model: MV2VTransformer, samples: Sequence[Sample]) -> list[Tensor]:
    return model.forward_samples(samples)


CAMERAS: dict[str, dict[str, Any]] = {
    "own": {},
    "none": {"camera_conditioning": "none"},
    "prope": {"camera_attention": "prope", "attention_head_dim": 16},
}


@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize("names", PACKS, ids=lambda names: f"{len(names)}")
def test_joint_samples_are_as_exact_as_alone(
    names: list[str], camera: str, explicit: Callable[..., Any]
) -> None:
    config = tiny_config(**CAMERAS[camera])
    model = random_model(config)
    samples = [_sample(config, name, "joint") for name in names]
    got = _packed(model, samples)
    for sample, velocity in zip(samples, got, strict=True):
        own = replace(sample, records=[])
        alone = _alone(model, own)
        inputs = (sample.latents, float(sample.timestep), sample.encoder_hidden_states)
        oracle = explicit(model, *inputs, sample.plan, sample.cameras)
        assert_within_budget(velocity, oracle.velocity[None], alone)
        assert sample.records is not None and own.records is not None
        merged = [record.merged.tolist() for record in sample.records]
        assert merged == [record.merged.tolist() for record in own.records]
    assert sum(len(sample.records or ()) for sample in samples) >= 2


@pytest.mark.parametrize("camera", ["own", "prope"])
@pytest.mark.parametrize("names", PACKS, ids=lambda names: f"{len(names)}")
def test_static_samples_run_over_what_is_kept_for_them(
    names: list[str], camera: str, explicit: Callable[..., Any]
) -> None:
    config = tiny_config(**CAMERAS[camera])
    model = random_model(config)
    # what is merged is chosen by the first forward, so a merging sample has no oracle but itself
    whole = [_sample(config, name, "static") for name in names]
    samples = [_kept(model, sample) for sample in whole]
    for full, sample, velocity in zip(whole, samples, _packed(model, samples), strict=True):
        alone = _alone(model, sample)
        if full.plan.merge == "off" or not full.plan.num_memory:
            inputs = (full.latents, float(full.timestep), full.encoder_hidden_states)
            oracle = explicit(model, *inputs, full.plan, full.cameras).velocity[None]
            assert_within_budget(velocity, oracle, alone)
        assert_close_to(velocity, alone)


def assert_close_to(value: Tensor, alone: Tensor) -> None:
    """Two float32 sums of the same terms in another order, through three blocks."""
    torch.testing.assert_close(value, alone, rtol=1e-4, atol=1e-5)


def test_joint_and_static_samples_share_a_pack() -> None:
    config = tiny_config()
    model = random_model(config)
    samples = [
        _sample(config, "two memories", "joint"),
        _kept(model, _sample(config, "no merging", "static")),
        _kept(model, _sample(config, "target alone", "static")),
    ]
    for sample, velocity in zip(samples, _packed(model, samples), strict=True):
        assert_close_to(velocity, _alone(model, sample))


def test_unequal_guidance_branches_share_a_pack() -> None:
    """The negative branch may see less: here it has no memory."""
    config = tiny_config()
    model = random_model(config)
    positive = _sample(config, "two memories", "joint")
    plan = turn_plan(config, GRID, (), fraction=0.5)
    assert positive.cameras is not None
    negative = replace(
        positive,
        plan=plan,
        latents=positive.latents[: len(plan.segments)],
        encoder_hidden_states=torch.zeros(1, 2, config.text_dim),
    )
    for sample, velocity in zip(
        (positive, negative), _packed(model, [positive, negative]), strict=True
    ):
        assert_close_to(velocity, _alone(model, sample))


@pytest.mark.parametrize("conditioning", ["joint", "static"])
@pytest.mark.parametrize("poison", [float("nan"), 1e30])
def test_a_poisoned_sample_stays_by_itself(conditioning: str, poison: float) -> None:
    config = tiny_config()
    model = random_model(config)
    names = ["two memories", "no merging", "discarding"]
    samples = [_sample(config, name, conditioning) for name in names]
    if conditioning == "static":
        samples = [_kept(model, sample) for sample in samples]
    clean = _packed(model, samples)
    for index, sample in enumerate(samples):
        bad = replace(
            sample,
            latents=[torch.full_like(latent, poison) for latent in sample.latents],
            encoder_hidden_states=torch.full_like(sample.encoder_hidden_states, poison),
            cameras=None if sample.cameras is None else torch.full_like(sample.cameras, poison),
        )
        got = _packed(model, [*samples[:index], bad, *samples[index + 1 :]])
        for other, (value, expected) in enumerate(zip(got, clean, strict=True)):
            assert torch.equal(value, expected) == (other != index)


def test_a_sample_alone_in_a_pack_has_its_own_bits() -> None:
    config = tiny_config()
    model = random_model(config)
    joint = _sample(config, "two memories", "joint")
    for sample in (joint, _kept(model, _sample(config, "two memories", "static"))):
        assert torch.equal(_packed(model, [sample])[0], _alone(model, sample))
    assert _packed(model, []) == []


def test_registered_operations_give_the_same() -> None:
    config = tiny_config()
    model = random_model(config)
    samples = [_sample(config, name, "joint") for name in PLANS]
    reference = _packed(model, samples)
    model.set_backend("auto")
    for value, expected in zip(_packed(model, samples), reference, strict=True):
        assert relative_error(value, expected) < 1e-5


def test_rejects_what_a_pack_cannot_hold() -> None:
    config = tiny_config()
    model = random_model(config)
    good, static = (_sample(config, "two memories", mode) for mode in ("joint", "static"))
    kept = _kept(model, static)
    bad = [
        (static, r"once its K and V are kept; run forward\(..., kept=cache\)"),
        (replace(kept, plan=replace(static.plan, fraction=0.1)), "made for another plan; make one"),
        (replace(good, timestep=torch.ones(2)), r"batch of one, got batches of \[1, 2\]"),
        (replace(good, timestep=torch.ones(1, 3)), r"one timestep \[1\], got \[1, 3\]"),
        (replace(good, latents=good.latents[:2]), "the plan has 4 segments, got 2"),
        (replace(kept, latents=[good.latents[0][..., :4]]), "target latents must have shape"),
        (replace(good, cameras=None), "cameras are missing"),
    ]
    for sample, message in bad:
        with pytest.raises(ValueError, match=message):
            _packed(model, [good, sample])
