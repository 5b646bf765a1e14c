"""Solvers of few steps: their levels by the formulas they are published with, their loops on fields
whose answer is known, and noise that is the seed's alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine.config import FAST, FEW_STEPS, EngineConfig, SamplingConfig
from mv2v_engine.engine.request import sampled
from mv2v_engine.errors import RequestError
from mv2v_engine.sampling.flow_match import (
    Solver,
    fastwan_sigmas,
    initial_noise,
    make_solver,
    quarter_sigmas,
    rcm_sigmas,
    turn_noise,
)

Field = Callable[[Tensor, float], Tensor]
CASES = [(name, steps) for name, counts in FEW_STEPS.items() for steps in counts]


def solved(name: Any, steps: int, field: Field, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """The end of a loop in a velocity field of latents and sigma."""
    latents, generator = turn_noise(shape, seed)
    solver = make_solver(name, steps, 5.0, generator=generator)
    latents, levels = latents * solver.noise_scale, levels_of(solver)
    for index in range(steps):
        latents = solver.step(field(latents, levels[index]), index, latents)
    return latents


def levels_of(solver: Solver) -> list[float]:
    levels: list[float] = solver.sigmas.tolist()  # type: ignore[attr-defined]
    return levels


def test_lightx2vs_levels() -> None:
    """s = 1 - i/1000, sigma = 5 s / (1 + 4 s); the model is told 1000 sigma."""
    solver = make_solver("lightx2v", 4, 5.0)
    s = [t / 1000 for t in (1000, 750, 500, 250, 0)]
    expected = [5 * each / (1 + 4 * each) for each in s]
    assert levels_of(solver) == pytest.approx(expected, abs=1e-7)
    assert expected == pytest.approx([1, 0.9375, 0.8333, 0.625, 0], abs=1e-4)
    assert solver.timesteps.tolist() == pytest.approx([1e3 * each for each in expected[:-1]])


def test_fastwans_levels() -> None:
    """The times as they stand, with the level of the shift-8 table that is nearest."""
    solver = make_solver("dmd", 3, 8.0, generator=torch.Generator())
    assert solver.timesteps.tolist() == [1000, 757, 522]
    # 8 s / (1 + 7 s) of s = 1, 0.280, 0.120
    assert fastwan_sigmas(8.0).tolist() == pytest.approx([1, 2.24 / 2.96, 0.96 / 1.84, 0], abs=1e-9)
    for sigma, time in zip(fastwan_sigmas(8.0).tolist(), (1000, 757, 522), strict=False):
        assert abs(1000 * sigma - time) < 0.5


def test_self_forcings_levels() -> None:
    """Times 1000, 750, 500, 250 of 1,000, warped by the shift: told so, and run so."""
    solver = make_solver("dmd", 4, 5.0, generator=torch.Generator())
    told = [1000, 937.5, 1000 * 5 * 0.5 / 3, 625]
    assert solver.timesteps.tolist() == pytest.approx(told, abs=1e-4)
    assert torch.equal(quarter_sigmas(5.0)[:-1] * 1000, solver.sigmas[:-1] * 1000)  # type: ignore[attr-defined]


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_rcms_levels(steps: int) -> None:
    """sin t / (sin t + cos t) of atan 80, 1.5, 1.4, 1.0; the noise begins at the first of them."""
    angles = [math.atan(80), 1.5, 1.4, 1.0][:steps]
    expected = [math.tan(t) / (math.tan(t) + 1) for t in angles] + [0.0]
    assert rcm_sigmas(steps).tolist() == pytest.approx(expected, abs=1e-12)
    solver = make_solver("rcm", steps, 5.0, generator=torch.Generator())
    assert solver.noise_scale == pytest.approx(80 / 81)
    assert solver.timesteps.tolist() == pytest.approx([1e3 * each for each in expected[:-1]])
    if steps == 4:
        assert expected == pytest.approx([0.9877, 0.9338, 0.8529, 0.6090, 0], abs=1e-4)


@pytest.mark.parametrize(("name", "steps"), CASES)
def test_a_model_that_knows_the_answer(name: str, steps: int) -> None:
    """v = (x - x0) / sigma points from the answer, whatever the noise: all of them end there."""
    clean = torch.linspace(-2, 2, 20).reshape(4, 5)
    end = solved(name, steps, lambda x, sigma: (x - clean) / sigma, (4, 5))
    torch.testing.assert_close(end, clean, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "steps"), CASES)
def test_normal_data(name: str, steps: int) -> None:
    """For data of variance d the best guess is linear, x0 = g x with g = (1 - s) d / ((1 - s)^2 d +
    s^2); then the end's variance follows from the levels alone, by each solver's own recursion."""
    d = 0.25

    def gain(s: float) -> float:
        return (1 - s) * d / ((1 - s) ** 2 * d + s**2)

    end = solved(name, steps, lambda x, s: (x - gain(s) * x) / s, (400, 500))
    generator = torch.Generator()
    solver = make_solver(name, steps, 5.0, generator=generator)  # type: ignore[arg-type]
    levels, variance = levels_of(solver), solver.noise_scale**2
    for s, following in pairwise(levels):
        if name == "lightx2v":
            # x + (s' - s) v
            variance *= (1 + (following - s) * (1 - gain(s)) / s) ** 2
        else:
            variance = ((1 - following) * gain(s)) ** 2 * variance + following**2
    # 200,000 samples: one in 10,000 variances is off by as much
    assert float(end.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / end.numel()))


@pytest.mark.parametrize(("name", "steps"), [("dmd", 3), ("dmd", 4), ("rcm", 4)])
def test_noise_is_the_generators_next(name: str, steps: int) -> None:
    """x' = (1 - s') x0 + s' n, written out in float64 with the numbers that follow the first."""

    def field(latents: Tensor, sigma: float) -> Tensor:
        return torch.sin(3 * latents) + sigma

    levels = levels_of(make_solver(name, steps, 5.0, generator=torch.Generator()))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(2, 3, generator=generator).double() * levels[0]
    for s, following in pairwise(levels):
        x = (1 - following) * (x - s * field(x.float(), s).double())
        if following:
            x += following * torch.randn(2, 3, generator=generator)
    assert torch.equal(solved(name, steps, field, (2, 3), 11), x.float())
    assert not torch.equal(solved(name, steps, field, (2, 3), 12), x.float())


def test_a_turn_begins_as_it_did_before_solvers_drew() -> None:
    noise, generator = turn_noise((2, 3), 7)
    assert torch.equal(noise, initial_noise((2, 3), 7))
    both = torch.randn(12, generator=torch.Generator().manual_seed(7)).reshape(2, 2, 3)
    following = torch.randn(2, 3, generator=generator)
    assert torch.equal(noise, both[0]) or noise.numel() < 16
    assert not torch.equal(following, noise)


@pytest.mark.parametrize(("name", "steps"), [("lightx2v", 5), ("dmd", 2), ("rcm", 5), ("rcm", 0)])
def test_other_numbers_of_steps(name: Any, steps: int) -> None:
    with pytest.raises(ValueError, match=f"{name} has tables for .* got {steps}"):
        make_solver(name, steps, 5.0, generator=torch.Generator())


@pytest.mark.parametrize("name", ["dmd", "rcm"])
def test_no_generator(name: Any) -> None:
    with pytest.raises(ValueError, match="give it the turn's generator"):
        make_solver(name, 4, 5.0)


@pytest.mark.parametrize(
    ("fast", "expected"),
    [
        ("lightx2v", ("lightx2v", 4, 1.0, 5.0)),
        ("fastwan", ("dmd", 3, 1.0, 8.0)),
        ("turbo", ("rcm", 4, 1.0, 3.5)),
    ],
)
def test_presets(fast: Any, expected: tuple[str, int, float, float]) -> None:
    sampling = SamplingConfig(flow_shift=3.5).under(fast=fast)
    names = ("scheduler", "num_inference_steps", "guidance_scale", "flow_shift")
    assert tuple(getattr(sampling, name) for name in names) == expected
    asked = sampled(sampling, 0, None, None)
    assert (asked["num_inference_steps"], asked["guidance_scale"]) == expected[1:3]
    assert set(FAST) == {"lightx2v", "fastwan", "turbo"}


def test_what_does_not_fit_is_refused() -> None:
    sampling = SamplingConfig().under(fast="fastwan")
    with pytest.raises(RequestError, match=r"dmd has a table for 3 or 4 steps, got .*steps=8"):
        sampled(sampling, 0, 8, None)
    with pytest.raises(RequestError, match=r"guidance inside them, got guidance_scale=5; use 1"):
        sampled(sampling, 0, None, 5.0)
    # Self-Forcing's four steps are the same solver's
    assert sampled(sampling, 0, 4, 1)["num_inference_steps"] == 4
    # a scheduler alone leaves the checkpoint's own 50 steps
    with pytest.raises(RequestError, match=r"lightx2v has a table for 4 steps, .*fast='lightx2v'"):
        sampled(SamplingConfig().under(scheduler="lightx2v"), 0, None, None)
    with pytest.raises(RequestError, match="fast='turbo' samples with rcm, got scheduler='euler'"):
        EngineConfig(fast="turbo", scheduler="euler")
    assert EngineConfig(fast="turbo", scheduler="rcm").fast == "turbo"


@pytest.mark.parametrize(("scheduler", "least", "steps"), [("euler", 2, 2), ("dmd", 2, 3)])
def test_the_fewest_steps(scheduler: Any, least: int, steps: int) -> None:
    assert SamplingConfig(scheduler=scheduler).fewest_steps(least) == steps
