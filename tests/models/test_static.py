"""Static conditioning: conditioning states depend on conditioning alone, the target on all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine.models.block import Block
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.testing import relative_error, tiny_config
from mv2v_engine.tokens.plan import turn_plan
from tests.models.drawn import random_inputs, random_model

PLAN = turn_plan(tiny_config(), (3, 12, 20), (4, 8), merge="off", conditioning="static")


class _Watched(Block):
    """A block that keeps what it gave for the conditioning."""

    seen: list[Tensor]

    def forward(self, *arguments: Any) -> Any:
        out = super().forward(*arguments)
        if arguments[0].text is None:
            self.seen.append(out[0])
        return out


@pytest.fixture
def model() -> MV2VTransformer:
    model = random_model(tiny_config())
    for block in model.blocks:
        block.__class__ = _Watched
        block.seen = []  # type: ignore[assignment]
    return model


def _run(model: MV2VTransformer, **changes: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The velocity, and every block's target and conditioning states."""
    latents, _, text, cameras = random_inputs(PLAN)
    latents[0] = changes.get("target", latents[0])
    latents[2] = changes.get("memory", latents[2])
    velocity = model(
        latents,
        changes.get("timestep", torch.tensor([500.0])),
        changes.get("text", text),
        plan=PLAN,
        cameras=changes.get("cameras", cameras),
    )
    states = []
    for block in model.blocks:
        assert isinstance(block, _Watched)
        states.append(block.seen.pop())
    return velocity, states[-1], states


@pytest.mark.parametrize(
    "changes",
    [
        {"target": torch.ones(1, 4, 3, 12, 20)},
        {"timestep": torch.tensor([20.0])},
        {"text": torch.ones(1, 6, 10)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_conditioning_does_not_see(model: MV2VTransformer, changes: dict[str, Tensor]) -> None:
    velocity, _, states = _run(model)
    moved, _, moved_states = _run(model, **changes)
    for before, after in zip(states, moved_states, strict=True):
        assert torch.equal(before, after)
    assert relative_error(moved, velocity) > 1e-3


def test_target_cameras_stay_with_the_target(model: MV2VTransformer) -> None:
    cameras = random_inputs(PLAN)[3]
    assert cameras is not None
    moved = cameras.clone()
    moved[:, 0] += 1
    velocity, _, states = _run(model, cameras=cameras)
    changed, _, changed_states = _run(model, cameras=moved)
    assert all(torch.equal(a, b) for a, b in zip(states, changed_states, strict=True))
    assert relative_error(changed, velocity) > 1e-4


def test_target_sees_the_conditioning(model: MV2VTransformer) -> None:
    velocity, states, _ = _run(model)
    changed, changed_states, _ = _run(model, memory=torch.ones(1, 4, 3, 12, 20))
    assert relative_error(changed_states, states) > 1e-3
    assert relative_error(changed, velocity) > 1e-3


def test_joint_conditioning_is_another_function(model: MV2VTransformer) -> None:
    velocity, _, _ = _run(model)
    latents, _, text, cameras = random_inputs(PLAN)
    joint = replace(PLAN, conditioning="joint")
    other = model(latents, torch.tensor([500.0]), text, plan=joint, cameras=cameras)
    assert relative_error(other, velocity) > 1e-3


def test_a_target_alone_is_the_same_in_both_modes() -> None:
    model = random_model(tiny_config())
    plan = turn_plan(model.config, (3, 6, 10), (), source=False)
    *inputs, cameras = random_inputs(plan)
    joint, static = (
        model(*inputs, plan=replace(plan, conditioning=mode), cameras=cameras)
        for mode in ("joint", "static")
    )
    assert relative_error(static, joint) < 1e-6
