"""The steps of a flow map: of an exact one, any number of them is exact."""

from __future__ import annotations

import math

import pytest
import torch

from mv2v_engine.config import SamplingConfig
from mv2v_engine.engine.request import sampled
from mv2v_engine.errors import RequestError
from mv2v_engine.sampling.flow_match import initial_noise, make_solver

# standard deviation of normal data, whose map is x_r = x_t d(r) / d(t)
SPREAD = 0.4


def deviation(level: float) -> float:
    return math.hypot(level, (1 - level) * SPREAD)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 20, 32])
def test_any_number_of_steps_is_exact(steps: int) -> None:
    solver = make_solver("flow_map", steps, 3.0)
    assert solver.ends is not None and float(solver.ends[-1]) == 0
    assert torch.equal(solver.ends[:-1], solver.timesteps[1:])
    noise = initial_noise((4, 50), 1)
    latents = noise.double()
    for index in range(steps):
        t, r = (float(of[index]) / 1000 for of in (solver.timesteps, solver.ends))
        mean = latents * (1 - deviation(r) / deviation(t)) / (t - r)
        latents = solver.step(mean, index, latents)
    torch.testing.assert_close(latents, SPREAD * noise.double(), rtol=1e-6, atol=1e-6)


def test_eulers_steps_are_not() -> None:
    noise, errors = initial_noise((4, 50), 1), []
    for steps in (1, 4, 20):
        solver, latents = make_solver("euler", steps, 3.0), noise.double()
        assert solver.ends is None
        for index in range(steps):
            t = float(solver.timesteps[index]) / 1000
            slope = (t - (1 - t) * SPREAD**2) / deviation(t) ** 2
            latents = solver.step(slope * latents, index, latents)
        errors.append(float((latents - SPREAD * noise).norm() / (SPREAD * noise).norm()))
    assert errors[0] > errors[1] > errors[2] > 0.01


def test_ends_are_rounded_as_timesteps_are() -> None:
    solver = make_solver("flow_map", 7, 3.0, "bfloat16")
    assert solver.ends is not None
    assert torch.equal(solver.ends[:-1], solver.timesteps[1:])
    exact = make_solver("flow_map", 7, 3.0)
    assert not torch.equal(solver.timesteps, exact.timesteps)
    assert solver.deltas is not None and torch.equal(solver.deltas, exact.deltas)


def test_guidance_is_refused() -> None:
    sampling = SamplingConfig(scheduler="flow_map", guidance_scale=1.0)
    assert sampled(sampling, 0, 1, None)["num_inference_steps"] == 1
    with pytest.raises(RequestError, match=r'got guidance_scale=3; use 1, or scheduler="euler"'):
        sampled(sampling, 0, None, 3.0)
