"""Cameras inside attention: what they may change, and what they must not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from mv2v_engine.config import CameraAttention, HistoryConfig, TransformerConfig
from mv2v_engine.models.camera_encoder import POSE_DIM, frame_cameras, frame_dim, projection
from mv2v_engine.testing import as_cameras, max_error, relative_error, tiny_config
from mv2v_engine.tokens.plan import TokenPlan, turn_plan
from tests.models.drawn import random_inputs, random_model

GRID = (3, 6, 10)
FORMS = [form for form in get_args(CameraAttention) if form.startswith("prope")]


def _shape(form: Any, **changes: Any) -> TransformerConfig:
    return tiny_config(camera_attention=form, attention_head_dim=16, **changes)


def _plan(shape: TransformerConfig, **changes: Any) -> TokenPlan:
    return turn_plan(shape, GRID, (2, 4), **{"fraction": 0.5} | changes)


def _cameras(shape: TransformerConfig, seed: int = 0) -> Tensor:
    drawn = torch.randn(1, 4, GRID[0], 12, generator=torch.Generator().manual_seed(seed))
    return as_cameras(drawn, shape)


@torch.no_grad()
def _velocity(plan: TokenPlan, cameras: Tensor | None, backend: str = "reference") -> Tensor:
    model = random_model(plan.shape)
    model.set_backend(backend)
    *inputs, _ = random_inputs(plan, seed=1)
    velocity: Tensor = model(*inputs, plan=plan, cameras=cameras)
    return velocity


def _moved(cameras: Tensor, by: Tensor) -> Tensor:
    """The same cameras in a world that begins elsewhere: every camera-to-world pose after `by`."""
    pose = cameras[..., :12].unflatten(-1, (3, 4))
    rotation, place = by[:, :3] @ pose[..., :3], by[:, :3] @ pose[..., 3:] + by[:, 3:]
    return torch.cat([torch.cat([rotation, place], -1).flatten(-2), cameras[..., 12:]], -1)


@pytest.mark.parametrize("conditioning", ["joint", "static"])
@pytest.mark.parametrize("form", FORMS)
def test_the_worlds_frame_is_of_no_matter(form: str, conditioning: str) -> None:
    """Without a camera encoder, which does read poses in it."""
    shape = _shape(form, camera_conditioning="none")
    plan, cameras = _plan(shape, conditioning=conditioning), _cameras(shape)
    base = _velocity(plan, cameras)
    world = as_cameras(torch.randn(12, generator=torch.Generator().manual_seed(5)), shape)[:12]
    assert relative_error(_velocity(plan, _moved(cameras, world.reshape(3, 4))), base) < 1e-5
    # one camera alone does matter, and so does one lens
    other = cameras.clone()
    other[:, 3] = _moved(cameras, world.reshape(3, 4))[:, 3]
    assert relative_error(_velocity(plan, other), base) > 1e-3
    other = cameras.clone()
    other[:, 1, :, 12:14] *= 1.2
    assert relative_error(_velocity(plan, other), base) > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_equal_cameras_are_attention_without(form: str) -> None:
    shape = _shape(form, camera_conditioning="none")
    cameras = _cameras(shape)
    same = cameras[:, :1, :1].expand_as(cameras)
    got = _velocity(_plan(shape), same)
    still = torch.cat([torch.eye(3, 4).flatten(), torch.tensor([1.0, 1.0, 0.0, 0.0])])
    assert relative_error(got, _velocity(_plan(shape), still.expand_as(cameras))) < 1e-5
    if "fused" in form:
        plain = _plan(_shape("none", camera_conditioning="none"))
        assert relative_error(got, _velocity(plain, None)) < 1e-5


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("form", ["prope_fused", "prope_fused_dual"])
def test_the_fused_form_of_identities_is_todays_function(form: str, backend: str) -> None:
    """To the bit, ReCamMaster's encoder included: q, k, v and the result are times one."""
    shape, plain = _shape(form), _shape("none")
    still = torch.cat([torch.eye(3, 4).flatten(), torch.tensor([1.0, 1.0, 0.0, 0.0])])
    cameras = still.expand(1, 4, GRID[0], 16)
    for conditioning in ("joint", "static"):
        plans = (_plan(each, conditioning=conditioning) for each in (shape, plain))
        got, expected = (
            _velocity(plan, cameras[..., : plan.shape.camera_dim], backend) for plan in plans
        )
        assert torch.equal(got, expected)


@pytest.mark.parametrize("form", FORMS)
def test_the_scene_scale_is_the_worlds_unit(form: str) -> None:
    shape = _shape(form, camera_conditioning="none", scene_scale=2.0)
    cameras = _cameras(shape)
    larger = cameras.clone()
    larger[..., 3:12:4] *= 4
    twice = replace(shape, scene_scale=8.0)
    assert relative_error(_velocity(_plan(twice), larger), _velocity(_plan(shape), cameras)) < 1e-6
    assert relative_error(_velocity(_plan(shape), larger), _velocity(_plan(shape), cameras)) > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_matrices_are_the_projection_and_its_inverse(form: str) -> None:
    """Against the definition in float64; float32 whatever the cameras come in."""
    shape = _shape(form)
    plan, cameras = _plan(shape), _cameras(shape)
    rows = frame_cameras(plan, cameras)
    assert (
        rows.shape == (1, len(plan.frame_table), frame_dim(shape)) and rows.dtype == torch.float32
    )
    assert torch.equal(rows[0, :, :POSE_DIM], cameras[0, ..., :12].flatten(0, 1))
    assert frame_cameras(plan, cameras.bfloat16()).dtype == torch.float32
    wide = cameras[0].double().flatten(0, 1)
    to_world, k = torch.eye(4).double().repeat(2, len(wide), 1, 1).unbind()
    to_world[:, :3] = wide[:, :12].reshape(-1, 3, 4)
    to_world[:, :3, 3] /= shape.scene_scale
    k[:, 0, 0], k[:, 1, 1], k[:, 0, 2], k[:, 1, 2] = wide[:, 12:].unbind(1)
    expected = k @ to_world.inverse()
    if form.endswith("dual"):
        expected = expected.inverse().mT
    for role, oracle in (
        ("query", expected.mT),
        ("key", expected.inverse()),
        ("output", expected),
    ):
        got = projection(rows, role)[0]  # type: ignore[arg-type]
        assert max_error(got, oracle) < 16 * torch.finfo(torch.float32).eps * float(
            oracle.abs().max()
        )


def test_cameras_of_other_numbers_are_refused() -> None:
    with_lens, without = _shape("prope"), _shape("none")
    for shape, given, has in (
        (with_lens, without, "its pose, then"),
        (without, with_lens, "its pose"),
    ):
        plan = _plan(shape)
        with pytest.raises(ValueError, match=rf"a camera has {shape.camera_dim} numbers, {has}"):
            frame_cameras(plan, _cameras(given))
    plan = _plan(_shape("prope", camera_conditioning="none"))
    with pytest.raises(ValueError, match=r"cameras are missing.*camera_attention 'prope'"):
        _velocity(plan, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"camera_attention": "rays"}, "must be one of 'none', 'prope'.*got 'rays'"),
        ({"camera_conditioning": "both"}, "must be one of 'own'.*got 'both'"),
        ({"camera_attention": "prope"}, "a multiple of 8, got 12"),
        ({"camera_attention": "prope_fused", "attention_head_dim": 10}, "a multiple of 4, got 10"),
        (
            {"camera_attention": "prope_fused", "camera_conditioning": "target"},
            "compares the cameras of all videos",
        ),
        (
            {"history": HistoryConfig(), "camera_conditioning": "target"},
            "history's tokens take the cameras of their own frames.* training.finetune",
        ),
        ({"scene_scale": 0.0}, r"scene_scale must lie in 0\.001"),
        ({"scene_scale": float("nan")}, r"scene_scale must lie in 0\.001"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)
