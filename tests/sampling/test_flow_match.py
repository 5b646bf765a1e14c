"""Rectified flow: the schedule, its solvers against diffusers, seeds that mean the same."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mv2v_engine.sampling.flow_match import (
    EulerSolver,
    UniPCSolver,
    initial_noise,
    make_solver,
    shifted_sigmas,
)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_sigmas(steps: int, shift: float) -> None:
    sigmas = shifted_sigmas(steps, shift).tolist()
    assert len(sigmas) == steps + 1
    assert sigmas[0] == 1.0 and sigmas[-1] == 0.0
    assert all(a > b for a, b in pairwise(sigmas))
    for i, sigma in enumerate(sigmas):
        x = 1 - i / steps
        assert sigma == pytest.approx(shift * x / (1 + (shift - 1) * x), abs=1e-7)


def test_rejects_no_steps() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        shifted_sigmas(0, 5.0)


@pytest.mark.parametrize("steps", [1, 3, 50])
def test_euler_recovers_the_end_of_a_straight_flow(steps: int) -> None:
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 4, 5).unbind()
    solver = EulerSolver(steps, 5.0)
    latents, velocity = noise, noise - clean
    for index in range(steps):
        sigma = float(solver.timesteps[index]) / 1000
        torch.testing.assert_close(latents, (1 - sigma) * clean + sigma * noise)
        latents = solver.step(velocity, index, latents)
    torch.testing.assert_close(latents, clean, rtol=0, atol=1e-6)


def _bent(latents: Tensor, timestep: float) -> Tensor:
    """A velocity field that no solver follows exactly."""
    return torch.sin(3 * latents) + timestep / 1000 * latents.flip(0)


def _walked(solver: Any, scheduler: Any) -> tuple[Tensor, Tensor]:
    """Where our solver and a scheduler of diffusers' arrive in that field."""
    ours = theirs = initial_noise((4, 5), 0)
    for index, timestep in enumerate(scheduler.timesteps):
        ours = solver.step(_bent(ours, float(timestep)), index, ours)
        velocity = _bent(theirs, float(timestep))
        theirs = scheduler.step(velocity, timestep, theirs, return_dict=False)[0]
    return ours, theirs


def test_euler_is_diffusers_flow_matching() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, 11)[:-1].tolist())
    solver = EulerSolver(10, 5.0)
    torch.testing.assert_close(solver.sigmas, scheduler.sigmas.float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(solver.timesteps, scheduler.timesteps.float(), rtol=0, atol=1e-3)
    ours, theirs = _walked(solver, scheduler)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def _wans(steps: int, shift: float) -> tuple[list[float], list[int]]:
    """Sigmas and timesteps by Wan's words (wan/utils/fm_solvers_unipc.py), its end appended."""
    training = (1.0 - np.linspace(1, 1 / 1000, 1000)[::-1]).astype(np.float32)
    sigmas = np.linspace(training[0].item(), training[-1].item(), steps + 1)[:-1]
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return [*sigmas.tolist(), 0.0], (sigmas * 1000).astype(np.int64).tolist()


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("steps", [1, 4, 5, 20, 50, 200])
def test_unipc_is_on_wans_schedule(steps: int, shift: float) -> None:
    sigmas, timesteps = _wans(steps, shift)
    solver = UniPCSolver(steps, shift)
    assert solver.timesteps.tolist() == timesteps
    assert np.abs(solver._scheduler.sigmas.numpy() - sigmas).max() < 1e-6
    if (steps, shift) == (5, 5.0):
        assert timesteps == [999, 952, 882, 768, 555]


@pytest.mark.parametrize("steps", [4, 20])
def test_unipc_takes_diffusers_own_steps(steps: int) -> None:
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(steps)
    sigmas, timesteps = _wans(steps, 3.0)
    scheduler.sigmas, scheduler.timesteps = torch.tensor(sigmas), torch.tensor(timesteps)
    solver = UniPCSolver(steps, 3.0)
    ours, theirs = _walked(solver, scheduler)
    assert torch.equal(ours, theirs)


def test_unipc_counts_steps_of_one_timestep() -> None:
    """At a high shift the first steps have the same timestep; none is skipped."""
    solver, latents = UniPCSolver(200, 12.0), torch.zeros(2, 2)
    assert len(set(solver.timesteps.tolist())) < 200
    for index in range(200):
        latents = solver.step(torch.zeros(2, 2), index, latents)
    assert solver._scheduler.step_index == 200 and bool(latents.isfinite().all())


@pytest.mark.parametrize("name", ["euler", "unipc"])
def test_solvers_reach_the_data(name: Any) -> None:
    """A model that knows the answer: its velocity points from the answer to the latents."""
    clean, latents = torch.full((4, 5), 0.7), initial_noise((4, 5), 0)
    solver = make_solver(name, 20, 5.0)
    assert len(solver.timesteps) == 20 and solver.timesteps.dtype == torch.float32
    for index in range(20):
        sigma = max(float(solver.timesteps[index]) / 1000, 1e-3)
        latents = solver.step((latents - clean) / sigma, index, latents)
    torch.testing.assert_close(latents, clean, rtol=0, atol=0.02)


@pytest.mark.parametrize("name", ["euler", "unipc"])
def test_rounded_timesteps_are_told_and_steps_stay_exact(name: Any) -> None:
    """ReCamMaster: `timestep.to(torch.bfloat16)` for the model, the scheduler's own for a step."""
    exact, rounded = make_solver(name, 50, 5.0), make_solver(name, 50, 5.0, "bfloat16")
    assert rounded.timesteps.dtype == torch.float32
    assert torch.equal(rounded.timesteps, exact.timesteps.to(torch.bfloat16).float())
    apart = (rounded.timesteps - exact.timesteps).abs()
    assert 0 < float(apart.max()) <= 2
    if name == "euler":  # all but the first, 1000
        assert int((apart > 0).sum()) == 49
    latents = initial_noise((4, 5), 0)
    for index in range(3):
        ours, theirs = (s.step(latents.sin(), index, latents) for s in (rounded, exact))
        assert torch.equal(ours, theirs)
        latents = ours


def test_a_solver_is_fresh_every_turn() -> None:
    assert make_solver("unipc", 4, 3.0) is not make_solver("unipc", 4, 3.0)
    runs = []
    for _ in range(2):
        solver, latents = make_solver("unipc", 6, 3.0), initial_noise((4, 5), 0)
        for index in range(6):
            latents = solver.step(_bent(latents, float(solver.timesteps[index])), index, latents)
        runs.append(latents)
    assert torch.equal(*runs)


def test_steps_stay_in_float32() -> None:
    solver, latents = EulerSolver(4, 3.0), initial_noise((2, 3), 1)
    assert solver.step(torch.ones(2, 3, dtype=torch.bfloat16), 0, latents).dtype == torch.float32


def test_a_seed_means_one_noise() -> None:
    first = initial_noise((2, 3, 4), 7)
    torch.manual_seed(123)  # the global generator plays no part
    torch.randn(10)
    assert torch.equal(initial_noise((2, 3, 4), 7), first)
    assert not torch.equal(initial_noise((2, 3, 4), 8), first)
    assert first.dtype == torch.float32 and first.device.type == "cpu"
    assert torch.equal(first, torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(7)))
    assert math.isclose(float(initial_noise((10_000,), 0).std()), 1, abs_tol=0.05)
