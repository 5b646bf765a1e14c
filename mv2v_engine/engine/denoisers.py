"""Which denoiser runs a turn: of one process, or over several."""

from __future__ import annotations

from torch import Tensor

from mv2v_engine.config import EngineConfig
from mv2v_engine.engine.buffers import Conditioning
from mv2v_engine.engine.graphs import Graphs
from mv2v_engine.engine.parts import Parts
from mv2v_engine.engine.runner import Denoiser, NoisyTurn
from mv2v_engine.engine.team import SharedDenoiser, Team
from mv2v_engine.sampling.flow_match import make_solver
from mv2v_engine.tokens.plan import TokenPlan


def make_denoiser(
    config: EngineConfig,
    turn: NoisyTurn,
    *,
    graphs: Graphs | None = None,
    team: Team | None = None,
) -> Denoiser:
    """The denoiser of a turn as configured.

    team: the processes that share its steps.
    """
    if team is not None:
        return SharedDenoiser(turn, team=team)
    return Denoiser(turn, graphs=graphs, step_cache=config.step_cache)


def engine_denoiser(
    engine: Parts,
    plan: TokenPlan,
    conditioning: Conditioning,
    noise: Tensor,
    *,
    num_inference_steps: int,
    guidance_scale: float,
) -> Denoiser:
    """The denoiser of a turn on an engine's weights, by its scheduler, graphs and processes.

    noise: [1, C, F, H, W] of the latents, on any device.
    """
    turn = NoisyTurn(
        transformer=engine.transformer,
        plan=plan,
        conditioning=conditioning,
        noise=noise,
        solver=make_solver(
            engine.scheduler, num_inference_steps, engine.sampling.flow_shift, engine.timesteps
        ),
        guidance_scale=guidance_scale,
    )
    return make_denoiser(engine.config, turn, graphs=engine.graphs, team=engine.team)
