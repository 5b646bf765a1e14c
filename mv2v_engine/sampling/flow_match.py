"""Rectified flow (METHOD 8): x_sigma = (1 - sigma) x_0 + sigma noise, velocity = noise - x_0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mv2v_engine.config import FEW_STEPS, SchedulerName, Timesteps
from mv2v_engine.defaults import torch_defaults


def shifted_sigmas(num_steps: int, shift: float) -> Tensor:
    """Noise levels [num_steps + 1] from 1 to 0: linspace, shifted by s x / (1 + (s - 1) x)."""
    if num_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_steps}")
    sigma = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64, device="cpu")
    return _shifted(sigma, shift).to(torch.float32)


def _shifted(sigma: Tensor, shift: float) -> Tensor:
    return shift * sigma / (1 + (shift - 1) * sigma)


def wan_sigmas(num_steps: int, shift: float) -> Tensor:
    """Noise levels [num_steps] of Wan's own UniPC, float64: from its 999th of 1,000 levels down.

    s u / (1 + (s - 1) u) of u = linspace(0.999, 0, n + 1) without its end (Wan2.1,
    `wan/utils/fm_solvers_unipc.py`), with 0.999 as its float32 is.
    """
    first = torch.tensor(0.999, dtype=torch.float32, device="cpu").item()
    u = torch.linspace(first, 0, num_steps + 1, dtype=torch.float64, device="cpu")[:-1]
    return _shifted(u, shift)


# what the few-step solvers' weights were distilled at, of 1,000 training steps: LightX2V's and
# Self-Forcing's, before the shift; FastWan's, after it
_QUARTERS = (1000, 750, 500, 250)
_FASTWAN = (1000, 757, 522)
# rCM's, as angles of sin t noise + cos t data: the first is atan of its largest ratio of the two
_RCM_FIRST, _RCM_LATER = 80.0, (1.5, 1.4, 1.0)


def listed_sigmas(times: Sequence[float], shift: float | None) -> Tensor:
    """Noise levels [len(times) + 1] of a model of few steps, float64, 0 at the end.

    times: of 1,000, falling. shift: None takes them as they are.
    """
    levels = torch.tensor([*times, 0], dtype=torch.float64, device="cpu") / 1000
    return levels if shift is None else _shifted(levels, shift)


def quarter_sigmas(shift: float) -> Tensor:
    """Noise levels [5] of LightX2V's and Self-Forcing's four steps, float64, 0 at the end."""
    return listed_sigmas(_QUARTERS, shift)


def fastwan_sigmas(shift: float) -> Tensor:
    """Noise levels [4] of FastWan's three steps, float64, 0 at the end: those of the 1,000 shifted
    ones that come nearest to its times."""
    table = _shifted(torch.arange(1, 1001, dtype=torch.float64, device="cpu") / 1000, shift)
    times = torch.tensor(_FASTWAN, dtype=torch.float64, device="cpu")
    nearest = (table[:, None] * 1000 - times).abs().argmin(dim=0)
    return torch.cat([table[nearest], table.new_zeros(1)])


def rcm_sigmas(num_steps: int) -> Tensor:
    """Noise levels [num_steps + 1] of rCM, float64: sin t / (sin t + cos t), 0 at the end."""
    angles = (math.atan(_RCM_FIRST), *_RCM_LATER)[:num_steps]
    t = torch.tensor([*angles, 0.0], dtype=torch.float64, device="cpu")
    return t.sin() / (t.sin() + t.cos())


def turn_noise(shape: tuple[int, ...], seed: int) -> tuple[Tensor, torch.Generator]:
    """The noise that a turn begins with, and the generator whose next numbers its solver draws.

    Gaussian, float32 on the CPU, so that a seed means the same video on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    return _drawn(shape, generator), generator


def initial_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """The noise that a turn begins with, float32 on the CPU."""
    return turn_noise(shape, seed)[0]


def _drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


class Solver(Protocol):
    """Integrates the flow; `timesteps` [num_steps] are what the model is told (0..1000).

    sigmas: [num_steps + 1], the noise level before each step, and after the last. deltas:
    [num_steps], if a step is no more than latents + velocity * delta; else None. ends: [num_steps],
    what a flow map is told of where each step goes; None tells it nothing, which is plain flow.
    noise_scale: what a turn's noise is multiplied with before the first step.
    """

    timesteps: Tensor
    sigmas: Tensor
    deltas: Tensor | None
    ends: Tensor | None
    noise_scale: float

    def step(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        """The latents after step `index`."""


class EulerSolver:
    """x += velocity * (sigma_next - sigma), in float32."""

    noise_scale = 1.0
    ends: Tensor | None = None

    def __init__(self, num_steps: int, shift: float) -> None:
        self.sigmas = self._levels(num_steps, shift)
        self.timesteps = self.sigmas[:-1] * 1000
        self.deltas: Tensor | None = self.sigmas.diff()

    def _levels(self, num_steps: int, shift: float) -> Tensor:
        return shifted_sigmas(num_steps, shift)

    def step(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        delta = float(self.sigmas[index + 1] - self.sigmas[index])
        return latents + velocity.to(latents.dtype) * delta


class UniPCSolver:
    """diffusers' UniPC on Wan's schedule; it remembers the tensors of earlier steps.

    The solver is the same in all versions of diffusers, the schedule is not: so it is handed over.
    The model is told whole timesteps, rounded down as Wan's are.
    """

    deltas: Tensor | None = None
    ends: Tensor | None = None
    noise_scale = 1.0

    def __init__(self, num_steps: int, shift: float) -> None:
        from diffusers import UniPCMultistepScheduler

        with torch_defaults():
            self._scheduler = UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
            )
            self._scheduler.set_timesteps(num_steps)
            sigmas = wan_sigmas(num_steps, shift)
            self._scheduler.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)]).to(torch.float32)
            self._scheduler.timesteps = (sigmas * 1000).to(torch.int64)
            # steps are counted, for two of them may have one timestep
            self._scheduler.set_begin_index(0)
        self.timesteps = self._scheduler.timesteps.to(torch.float32)
        self.sigmas: Tensor = self._scheduler.sigmas

    def step(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        timestep = self._scheduler.timesteps[index]
        with torch_defaults():
            stepped: Tensor = self._scheduler.step(
                velocity.to(latents.dtype), timestep, latents, return_dict=False
            )[0]
        return stepped


class FlowMapSolver(EulerSolver):
    """x_r = x_t - (t - r) u(x_t, t, r): of an exact flow map any number of steps is exact.

    u is the mean velocity between two noise levels, so that the step is Euler's; the model is told
    both levels (AnyFlow, arXiv 2605.13724).
    """

    def __init__(self, sigmas: Tensor) -> None:
        self.sigmas = sigmas.to(torch.float32)
        self.timesteps, self.ends = self.sigmas[:-1] * 1000, self.sigmas[1:] * 1000
        self.deltas = self.sigmas.diff()


class LightX2VSolver(EulerSolver):
    """Euler at the four levels that LightX2V distils to."""

    def _levels(self, num_steps: int, shift: float) -> Tensor:
        return quarter_sigmas(shift).to(torch.float32)


class RenoisingSolver:
    """Each step goes to the data that the model sees, and adds fresh noise of the next level.

    x' = (1 - sigma') (x - sigma v) + sigma' n, computed and kept in float64. n comes from the
    turn's generator, step after step, so that a seed gives the same latents however steps are run.

    Args:
        sigmas: [num_steps + 1], float64.
        times: what the model is told, [num_steps]; None: 1,000 sigma.
    """

    deltas: Tensor | None = None
    ends: Tensor | None = None

    def __init__(
        self, sigmas: Tensor, generator: torch.Generator, times: Sequence[float] | None = None
    ) -> None:
        self.sigmas, self._generator = sigmas, generator
        told = sigmas[:-1] * 1000 if times is None else torch.tensor(times, device="cpu")
        self.timesteps = told.to(torch.float32)
        self.noise_scale = float(sigmas[0])
        self._state: Tensor | None = None

    def step(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        sigma, following = self.sigmas[index].item(), self.sigmas[index + 1].item()
        state = latents.double() if self._state is None else self._state
        state = (1 - following) * (state - sigma * velocity.double())
        if following:
            noise = _drawn(tuple(latents.shape), self._generator)
            if latents.is_cuda:  # from pageable memory the host would wait for the device
                noise = noise.pin_memory()
            state += following * noise.to(latents.device, non_blocking=True)
        self._state = state
        return state.to(latents.dtype)


def stream_solver(sigmas: Tensor, generator: torch.Generator, *, is_map: bool) -> Solver:
    """The solver of a stream's block; weights that are a flow map add no noise between steps.

    sigmas: of `listed_sigmas`. generator: of `turn_noise`.
    """
    return FlowMapSolver(sigmas) if is_map else RenoisingSolver(sigmas, generator)


def make_solver(
    name: SchedulerName,
    num_steps: int,
    shift: float,
    timesteps: Timesteps = "exact",
    generator: torch.Generator | None = None,
) -> Solver:
    """The solver of a turn: fresh, since some remember earlier steps.

    timesteps: "bfloat16" rounds what the model is told; the steps themselves stay exact.
    generator: of `turn_noise`; "dmd" and "rcm" draw from it.

    Raises:
        ValueError: a number of steps that a solver of few has no table for, or no generator for
            one that draws.
    """
    solver = _fresh(name, num_steps, shift, generator)
    if timesteps == "bfloat16":
        solver.timesteps = solver.timesteps.to(torch.bfloat16).to(torch.float32)
        if solver.ends is not None:
            solver.ends = solver.ends.to(torch.bfloat16).to(torch.float32)
    return solver


def _fresh(
    name: SchedulerName, num_steps: int, shift: float, generator: torch.Generator | None
) -> Solver:
    counts = FEW_STEPS.get(name, (num_steps,))
    if num_steps not in counts:
        raise ValueError(f"{name} has tables for {counts} steps, got {num_steps}")
    if name == "euler":
        return EulerSolver(num_steps, shift)
    if name == "flow_map":
        return FlowMapSolver(shifted_sigmas(num_steps, shift))
    if name == "unipc":
        return UniPCSolver(num_steps, shift)
    if name == "lightx2v":
        return LightX2VSolver(num_steps, shift)
    if generator is None:
        raise ValueError(f"{name} adds fresh noise, give it the turn's generator")
    if name == "rcm":
        return RenoisingSolver(rcm_sigmas(num_steps), generator)
    if num_steps == len(_FASTWAN):
        return RenoisingSolver(fastwan_sigmas(shift), generator, _FASTWAN)
    return RenoisingSolver(quarter_sigmas(shift), generator)
