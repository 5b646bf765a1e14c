"""The whole forward against the explicit per-frame transformer, in every mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mv2v_engine.config import MergerConfig
from mv2v_engine.errors import KernelUnavailableError
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.merging import MergeRecord
from mv2v_engine.testing import relative_error, tiny_config
from mv2v_engine.tokens.plan import turn_plan
from tests.models.drawn import random_inputs, random_model

GRID = (3, 12, 20)
SMALL = (3, 6, 10)


EDITOR = {"camera_conditioning": "none", "in_channels": 8, "source_channels": 4}
PROPE = {"camera_attention": "prope", "attention_head_dim": 16}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "target alone": ({}, {"source": False, "tokenizers": ()}),
    "source": ({}, {"tokenizers": (), "merge": "off"}),
    "memory of every rate": ({}, {"tokenizers": (2, 4, 8), "merge": "off"}),
    "memory without source": ({}, {"source": False, "tokenizers": (4, 8), "merge": "off"}),
    "target camera": ({"camera_conditioning": "target"}, {"tokenizers": (4,), "merge": "off"}),
    "no camera": ({"camera_conditioning": "none"}, {"tokenizers": (4,), "merge": "off"}),
    "centre": ({}, {"tokenizers": (8,), "merge": "off", "rope": "centre"}),
    "conv": ({}, {"tokenizers": (4, 8), "fraction": 0.5}),
    "conv, joint scope": ({}, {"tokenizers": (4, 8), "fraction": 0.5, "scope": "joint"}),
    "conv, all": ({}, {"tokenizers": (4,), "fraction": 1.0}),
    "memory in the source's group": ({}, {"tokenizers": (2, 4), "fraction": 0.5}),
    "discard": ({}, {"tokenizers": (4, 8), "merge": "discard", "fraction": 0.5}),
    "discard, joint scope": (
        {},
        {"tokenizers": (4, 8), "merge": "discard", "fraction": 0.6, "scope": "joint"},
    ),
    "average": ({"merger": None}, {"tokenizers": (4,), "fraction": 0.5}),
    "depth-wise": ({"merger": MergerConfig(groups=24)}, {"tokenizers": (4,), "fraction": 0.5}),
    "grouped": (
        {"merger": MergerConfig(groups=4, bias=False)},
        {"tokenizers": (4,), "fraction": 0.5},
    ),
    "pooled": ({"merger": MergerConfig(pooled=True)}, {"tokenizers": (4,), "fraction": 0.5}),
    "shared": ({"merger": MergerConfig(shared=True)}, {"tokenizers": (4,), "fraction": 0.5}),
    "1x2": ({"merger": MergerConfig(kernel=(1, 2))}, {"tokenizers": (4,), "fraction": 0.5}),
    "static": ({}, {"tokenizers": (4, 8), "merge": "off", "conditioning": "static"}),
    "static, conv": ({}, {"tokenizers": (4, 8), "fraction": 0.5, "conditioning": "static"}),
    "prope": (PROPE, {"tokenizers": (2, 4, 8), "fraction": 0.5}),
    "prope alone": (PROPE | {"camera_conditioning": "none"}, {"tokenizers": (4,), "merge": "off"}),
    "prope, fused": ({"camera_attention": "prope_fused"}, {"tokenizers": (4,), "fraction": 0.5}),
    "prope, dual, static": (
        PROPE | {"camera_attention": "prope_dual"},
        {"tokenizers": (4,), "fraction": 0.5, "conditioning": "static"},
    ),
    "prope, fused and dual": (
        {"camera_attention": "prope_fused_dual", "scene_scale": 2.5},
        {"tokenizers": (4,), "merge": "discard", "fraction": 0.5},
    ),
    # the source rides on the target's channels; memory runs backwards in time
    "edit": (EDITOR, {"tokenizers": (4, 4), "fraction": 0.5}),
    "edit, static": (EDITOR, {"tokenizers": (4, 4), "fraction": 0.5, "conditioning": "static"}),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_explicit_transformer(name: str, explicit: Callable[..., Any]) -> None:
    changes, arguments = CASES[name]
    config = tiny_config(**changes)
    plan = turn_plan(config, GRID if "8" in str(arguments) else SMALL, **arguments)
    model = random_model(config)
    latents, timestep, text, cameras = random_inputs(plan)
    records: list[MergeRecord] = []
    got = model(latents, timestep, text, plan=plan, cameras=cameras, records=records)
    expected = explicit(model, latents, float(timestep), text, plan, cameras)
    assert got.shape == (1, 4, *latents[0].shape[2:])
    assert relative_error(got[0], expected.velocity) < 1e-5
    assert {r.step.block: sorted(r.merged[0].tolist()) for r in records} == expected.merged
    for record in records:
        exact = [expected.scores[record.step.block][int(i)] for i in record.frames[0]]
        torch.testing.assert_close(
            record.responsiveness[0].double(), torch.tensor(exact).double(), rtol=1e-4, atol=1e-6
        )
    assert bool(records) == (plan.merge != "off" and len(plan.segments) > 1)


def test_head_mean_equals_the_explicit_transformer(explicit: Callable[..., Any]) -> None:
    config = tiny_config()
    plan = turn_plan(config, GRID, (4, 8), fraction=0.5)
    model = random_model(config)
    model.responsiveness_heads = "mean"
    latents, timestep, text, cameras = random_inputs(plan)
    records: list[MergeRecord] = []
    got = model(latents, timestep, text, plan=plan, cameras=cameras, records=records)
    expected = explicit(model, latents, float(timestep), text, plan, cameras)
    assert relative_error(got[0], expected.velocity) < 1e-5
    model.responsiveness_heads = "concat"
    concat: list[MergeRecord] = []
    model(latents, timestep, text, plan=plan, cameras=cameras, records=concat)
    assert not torch.allclose(records[0].responsiveness, concat[0].responsiveness, rtol=1e-2)


def test_an_editing_target_has_the_sources_channels() -> None:
    config = tiny_config(**EDITOR)
    plan, model = turn_plan(config, SMALL, (4,)), random_model(config)
    latents, timestep, text, _ = random_inputs(plan)
    assert [latent.shape[1] for latent in latents] == [8, 4]
    with pytest.raises(ValueError, match=r"\[B, 8, 3, 6, 10\], the last 4 channels the source's"):
        model([latents[0][:, :4], *latents[1:]], timestep, text, plan=plan)


def test_every_video_has_its_own_camera() -> None:
    config = tiny_config()
    plan = turn_plan(config, SMALL, (4,), merge="off")
    model = random_model(config)
    latents, timestep, text, cameras = random_inputs(plan)
    assert cameras is not None
    rows = []
    for track in range(4):
        moved = cameras.clone()
        moved[:, track] += 1
        rows.append(model(latents, timestep, text, plan=plan, cameras=moved))
    base = model(latents, timestep, text, plan=plan, cameras=cameras)
    # the plan has three videos; the fourth track belongs to none of them
    assert all(relative_error(row, base) > 1e-4 for row in rows[:3])
    assert torch.equal(rows[3], base)


def test_target_camera_conditioning_reads_one_track() -> None:
    config = tiny_config(camera_conditioning="target")
    plan = turn_plan(config, SMALL, (4,), merge="off")
    model = random_model(config)
    latents, timestep, text, cameras = random_inputs(plan)
    assert cameras is not None
    moved = cameras.clone()
    moved[:, 1:] += 1
    base = model(latents, timestep, text, plan=plan, cameras=cameras)
    assert torch.equal(model(latents, timestep, text, plan=plan, cameras=moved), base)
    assert torch.equal(model(latents, timestep, text, plan=plan, cameras=cameras[:, :1]), base)


@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_a_batch_is_its_samples(conditioning: Any) -> None:
    config = tiny_config()
    plan = turn_plan(config, GRID, (4, 8), fraction=0.5, conditioning=conditioning)
    model = random_model(config)
    latents, timestep, text, cameras = random_inputs(plan, batch=3)
    assert cameras is not None
    records: list[MergeRecord] = []
    whole = model(latents, timestep, text, plan=plan, cameras=cameras, records=records)
    for i in range(3):
        one = slice(i, i + 1)
        own: list[MergeRecord] = []
        single = model(
            [latent[one] for latent in latents],
            timestep[one],
            text[one],
            plan=plan,
            cameras=cameras[one],
            records=own,
        )
        assert relative_error(whole[one], single) < 1e-5
        assert torch.equal(records[0].merged[i], own[0].merged[0])
    # samples choose for themselves
    assert not torch.equal(records[0].merged[0], records[0].merged[1])


def test_a_run_repeats_bit_for_bit() -> None:
    config = tiny_config()
    plan = turn_plan(config, GRID, (4, 8), fraction=0.5)
    model = random_model(config)
    latents, timestep, text, cameras = random_inputs(plan)
    first, second = (model(latents, timestep, text, plan=plan, cameras=cameras) for _ in range(2))
    assert torch.equal(first, second)


def test_registered_operations_give_the_same() -> None:
    config = tiny_config()
    plan = turn_plan(config, GRID, (4, 8), fraction=0.5)
    model = random_model(config)
    latents, timestep, text, cameras = random_inputs(plan)
    reference = model(latents, timestep, text, plan=plan, cameras=cameras)
    model.set_backend("auto")  # on a CPU those of csrc/cpu, where built, else the reference
    assert {m.backend for m in model.modules() if hasattr(m, "backend")} == {"auto"}
    registered = model(latents, timestep, text, plan=plan, cameras=cameras)
    assert relative_error(registered, reference) < 1e-5
    model.set_backend("auto", attention="fa3")
    with pytest.raises(KernelUnavailableError, match="'fa3', but it needs a CUDA device"):
        model(latents, timestep, text, plan=plan, cameras=cameras)


def test_new_modules_start_as_the_baserandom_model() -> None:
    """Zero cam_encoder, identity projector: with its weights a fresh model is the base."""
    torch.manual_seed(0)
    ours = MV2VTransformer(tiny_config()).requires_grad_(False)
    base = MV2VTransformer(tiny_config(camera_conditioning="none", tokenizers=(), merger=None))
    base.requires_grad_(False).load_state_dict(ours.state_dict(), strict=False)
    plan = turn_plan(ours.config, SMALL, (), source=False)
    latents, timestep, text, cameras = random_inputs(plan)
    base_plan = turn_plan(base.config, SMALL, (), source=False)
    expected = base(latents, timestep, text, plan=base_plan)
    got = ours(latents, timestep, text, plan=plan, cameras=cameras)
    assert relative_error(got, expected) < 1e-6


def test_gradients_reach_every_trained_module() -> None:
    config = tiny_config()
    model = random_model(config).requires_grad_(True)
    plan = turn_plan(config, GRID, (2, 4, 8), fraction=0.5)
    latents, timestep, text, cameras = random_inputs(plan)
    model(latents, timestep, text, plan=plan, cameras=cameras).pow(2).mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_training_after_inference_on_one_plan() -> None:
    config = tiny_config()
    model = random_model(config).requires_grad_(True)
    plan = turn_plan(config, (2, 8, 12), (4,), fraction=0.5)  # no other test has cached its table
    latents, timestep, text, cameras = random_inputs(plan)
    with torch.inference_mode():
        before = model(latents, timestep, text, plan=plan, cameras=cameras)
    after = model(latents, timestep, text, plan=plan, cameras=cameras)
    after.mean().backward()
    # what is trained goes without epilogues
    assert relative_error(after.detach(), before) < 1e-5


def test_rejects_inputs_that_do_not_fit_the_plan() -> None:
    config = tiny_config()
    plan = turn_plan(config, SMALL, (4,))
    model = random_model(config)
    latents, timestep, text, cameras = random_inputs(plan)
    assert cameras is not None
    with pytest.raises(ValueError, match="3 segments, got 2"):
        model(latents[:2], timestep, text, plan=plan, cameras=cameras)
    with pytest.raises(ValueError, match="memory latents must have shape"):
        model([*latents[:2], latents[2][:, :, :2]], timestep, text, plan=plan, cameras=cameras)
    with pytest.raises(ValueError, match="cameras are missing"):
        model(latents, timestep, text, plan=plan)
    with pytest.raises(ValueError, match="camera track 2"):
        model(latents, timestep, text, plan=plan, cameras=cameras[:, :2])
    with pytest.raises(ValueError, match="batch of 2"):
        wide = [latent.repeat(2, 1, 1, 1, 1) for latent in latents]
        model(
            wide,
            timestep.repeat(2),
            text.repeat(2, 1, 1),
            plan=replace(plan, scope="joint"),
            cameras=cameras.repeat(2, 1, 1, 1),
        )
    bare = random_model(tiny_config(camera_conditioning="none"))
    with pytest.raises(ValueError, match="cameras are given"):
        plan = turn_plan(bare.config, SMALL, (4,))
        bare(latents, timestep, text, plan=plan, cameras=cameras)
