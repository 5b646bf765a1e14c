"""Rectified flow (METHOD 8): x_sigma = (1 - sigma) x_0 + sigma noise, velocity = noise - x_0."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mv2v_engine.config import SchedulerName, Timesteps
from mv2v_engine.defaults import torch_defaults


def shifted_sigmas(num_steps: int, shift: float) -> Tensor:
    """Noise levels [num_steps + 1] from 1 to 0: linspace, shifted by s x / (1 + (s - 1) x)."""
    if num_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_steps}")
    sigma = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64, device="cpu")
    return (shift * sigma / (1 + (shift - 1) * sigma)).to(torch.float32)


def wan_sigmas(num_steps: int, shift: float) -> Tensor:
    """Noise levels [num_steps] of Wan's own UniPC, float64: from its 999th of 1,000 levels down.

    s u / (1 + (s - 1) u) of u = linspace(0.999, 0, n + 1) without its end (Wan2.1,
    `wan/utils/fm_solvers_unipc.py`), with 0.999 as its float32 is.
    """
    first = torch.tensor(0.999, dtype=torch.float32, device="cpu").item()
    u = torch.linspace(first, 0, num_steps + 1, dtype=torch.float64, device="cpu")[:-1]
    return shift * u / (1 + (shift - 1) * u)


def initial_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Gaussian noise, float32 on the CPU, so that a seed means the same video on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


class Solver(Protocol):
    """Integrates the flow; `timesteps` [num_steps] are what the model is told (0..1000).

    deltas: [num_steps], if a step is no more than latents + velocity * delta; else None.
    """

    timesteps: Tensor
    deltas: Tensor | None

    def step(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        """The latents after step `index`."""


class EulerSolver:
    """x += velocity * (sigma_next - sigma), in float32."""

    def __init__(self, num_steps: int, shift: float) -> None:
        self.sigmas = shifted_sigmas(num_steps, shift)
        self.timesteps = self.sigmas[:-1] * 1000
        self.deltas: Tensor | None = self.sigmas.diff()

    def step(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        delta = float(self.sigmas[index + 1] - self.sigmas[index])
        return latents + velocity.to(latents.dtype) * delta


class UniPCSolver:
    """diffusers' UniPC on Wan's schedule; it remembers the tensors of earlier steps.

    The solver is the same in all versions of diffusers, the schedule is not: so it is handed over.
    The model is told whole timesteps, rounded down as Wan's are.
    """

    deltas: Tensor | None = None

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

    def step(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        timestep = self._scheduler.timesteps[index]
        with torch_defaults():
            stepped: Tensor = self._scheduler.step(
                velocity.to(latents.dtype), timestep, latents, return_dict=False
            )[0]
        return stepped


def make_solver(
    name: SchedulerName, num_steps: int, shift: float, timesteps: Timesteps = "exact"
) -> Solver:
    """The solver of a turn: fresh, since UniPC remembers earlier steps.

    timesteps: "bfloat16" rounds what the model is told; the steps themselves stay exact.
    """
    solvers: dict[SchedulerName, type[EulerSolver | UniPCSolver]] = {
        "euler": EulerSolver,
        "unipc": UniPCSolver,
    }
    solver = solvers[name](num_steps, shift)
    if timesteps == "bfloat16":
        solver.timesteps = solver.timesteps.to(torch.bfloat16).to(torch.float32)
    return solver
