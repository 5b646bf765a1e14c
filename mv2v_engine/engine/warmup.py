"""Warm-up by plan: what only the first turn of a plan would pay for is paid before it.

On CUDA that is compiling and tuning kernels, the libraries' plans, the rotary tables, and capture;
on a CPU the tables and the thread pools.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from mv2v_engine.arguments import sequence
from mv2v_engine.engine.denoise import engine_denoiser
from mv2v_engine.engine.parts import Parts
from mv2v_engine.engine.source import source_trajectory
from mv2v_engine.engine.step import Conditioning
from mv2v_engine.errors import RequestError
from mv2v_engine.tokens.plan import TokenPlan


def warm_up(
    engine: Parts, plans: Iterable[TokenPlan], guidance_scale: float
) -> list[dict[str, Any]]:
    """What `Engine.warmup` does. Large plans first: they size the graphs' pool and arena."""
    rows = []
    plans = list(sequence("plans", plans, TokenPlan, "token plans"))
    for plan in sorted(dict.fromkeys(plans), key=lambda plan: -plan.length):
        if plan.shape != engine.transformer.config:
            raise RequestError(
                "a plan to warm up is of another transformer than the engine's; make it with "
                "Session.plan_turn, Session.plans, or a plan of tokens.plan with "
                "shape=engine.transformer.config"
            )
        began = time.perf_counter()
        report = _run(engine, plan, guidance_scale)
        seconds = round(time.perf_counter() - began, 4)
        rows.append({"tokens": plan.length, "conditioning": plan.conditioning} | report)
        rows[-1]["seconds"] = seconds
    return rows


def _run(engine: Parts, plan: TokenPlan, guidance_scale: float) -> dict[str, Any]:
    """A turn of zeros, as long as it takes to run every kind of step; how its steps ran."""
    denoiser = engine_denoiser(
        engine,
        plan,
        _nothing(engine, plan, guidance_scale),
        torch.zeros(
            (1, plan.shape.latent_channels, *plan.target.grid), dtype=torch.float32, device="cpu"
        ),
        # without guidance a static turn's first step runs no forward of the target alone
        num_inference_steps=engine.sampling.fewest_steps(3),
        guidance_scale=guidance_scale,
        generator=torch.Generator(),
    )
    try:
        denoiser.step()
        while denoiser.awaits_capture and not denoiser.is_finished:
            denoiser.step()
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        return denoiser.graph_report()
    finally:
        denoiser.release()


def _nothing(engine: Parts, plan: TokenPlan, guidance_scale: float) -> Conditioning:
    """Conditioning of a turn's shapes and dtypes; the text as of an empty prompt."""
    zeros = partial(torch.zeros, dtype=torch.float32, device=engine.device)
    cameras = None
    if plan.shape.has_camera:
        tracks = 1 + max(segment.camera or 0 for segment in plan.segments)
        # the longest track: a history has the frames of several videos
        longest = max(segment.grid[0] for segment in plan.segments)
        num_frames = 4 * (longest - 1) + 1
        still = source_trajectory(None, num_frames, engine.sampling.size)
        one = still.vectors(plan.shape.camera_dim, stride=4)
        cameras = one.to(engine.device).expand(1, tracks, -1, -1).contiguous()
    channels, source = plan.shape.latent_channels, None
    if plan.shape.source_channels:
        source = zeros(1, channels, *plan.target.grid)
    return Conditioning(
        [zeros(1, *shape) for shape in plan.latent_shapes[1:]],
        cameras,
        *engine.guidance_texts("", guidance_scale),
        source,
        None if engine.image is None else zeros(1, engine.image.num_tokens, engine.image.dim),
    )
