"""The whole editing loop against diffusers' `LucyEditPipeline`: same folder, noise and solver."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine import Engine, EngineConfig
from mv2v_engine.engine.denoise import Denoiser
from mv2v_engine.engine.graphs import Graphs
from mv2v_engine.engine.step import Conditioning
from mv2v_engine.errors import CheckpointError, RequestError
from mv2v_engine.sampling.flow_match import initial_noise, make_solver
from mv2v_engine.testing import relative_error
from mv2v_engine.tokens.plan import Segment, TokenPlan, turn_plan
from mv2v_engine.video.windows import edit_windows
from tests.conftest import smooth_frames
from tests.engine.graph_stand_in import StandIn

SIZE, STEPS, PROMPT, NEGATIVE = (64, 96), 6, "a  red ball", "the floor rolls"
# 9 frames of 64 x 96 pixels, stride 4 and 16
GRID = (3, 4, 6)


@pytest.fixture(scope="module")
def frames() -> Tensor:
    return smooth_frames(9)


def _denoiser(
    small_lucy: Engine,
    frames: Tensor,
    plan: TokenPlan | None = None,
    *,
    graphs: Graphs | None = None,
    step_cache: float | None = None,
) -> Denoiser:
    """A window's denoiser; memory is other clips' latents."""
    source = small_lucy.vae.encode(frames)
    plan = plan or turn_plan(small_lucy.transformer.config, GRID, ())
    memory = [
        small_lucy.vae.encode(frames.roll(shift + 1, 1))[None] for shift in range(plan.num_memory)
    ]
    conditioning = Conditioning(
        memory,
        None,
        small_lucy.text_embedding(PROMPT),
        small_lucy.text_embedding(NEGATIVE),
        source[None],
    )
    return Denoiser(
        transformer=small_lucy.transformer,
        plan=plan,
        conditioning=conditioning,
        noise=initial_noise((1, *source.shape), 3),
        solver=make_solver(small_lucy.scheduler, STEPS, small_lucy.sampling.flow_shift),
        guidance_scale=5.0,
        graphs=graphs,
        step_cache=step_cache,
    )


def _run(*denoisers: Denoiser) -> None:
    while not denoisers[0].is_finished:
        for denoiser in denoisers:
            denoiser.step()


def _as_published(scheduler: Any) -> None:
    """Wan's schedule, as diffusers had it when the pipeline came; later versions have another."""
    set_timesteps = scheduler.set_timesteps

    def wans(num_steps: int, **given: Any) -> None:
        set_timesteps(num_steps, **given)
        u = torch.linspace(0.999, 0, num_steps + 1, dtype=torch.float64)[:-1]
        shift = scheduler.config.flow_shift
        sigmas = shift * u / (1 + (shift - 1) * u)
        scheduler.sigmas = torch.cat([sigmas, torch.zeros(1)]).float()
        scheduler.timesteps = (sigmas * 1000).long()

    scheduler.set_timesteps = wans


def _pipeline_run(folder: Path, frames: Tensor) -> tuple[list[Tensor], Tensor]:
    """Latents after every step, and the video [T, height, width, 3] in 0..1."""
    from diffusers import LucyEditPipeline
    from PIL import Image

    pipeline = LucyEditPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    _as_published(pipeline.scheduler)
    latents: list[Tensor] = []

    def keep(_: Any, step: int, timestep: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        latents.append(given["latents"].clone())
        return {}

    video = pipeline(
        video=[Image.fromarray(frame.numpy()) for frame in frames],
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=SIZE[0],
        width=SIZE[1],
        num_frames=len(frames),
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        latents=initial_noise((1, 48, *GRID), 3),
        callback_on_step_end=keep,
    ).frames[0]
    return latents, torch.from_numpy(video)


def test_latents_and_frames_are_the_pipelines(
    small_lucy: Engine, lucy_folder: Path, frames: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # an optional package of theirs that mends broken Unicode, of which these prompts have none
    module = "diffusers.pipelines.lucy.pipeline_lucy_edit"
    monkeypatch.setattr(f"{module}.ftfy", SimpleNamespace(fix_text=str), raising=False)
    expected, video = _pipeline_run(lucy_folder, frames)
    denoiser = _denoiser(small_lucy, frames)
    assert small_lucy.scheduler == "unipc" and small_lucy.sampling.flow_shift == 4.0
    assert len(denoiser.branches) == 2
    errors = []
    while not denoiser.is_finished:
        denoiser.step()
        errors.append(relative_error(denoiser.latents, expected[denoiser.index - 1]))
    print(f"relative error of the latents by step: {', '.join(f'{e:.1e}' for e in errors)}")
    assert len(errors) == STEPS and max(errors) < 1e-5
    decoded = small_lucy.vae.decode(denoiser.latents[0]).float()
    assert decoded.shape == video.shape and float(video.std()) > 0.01
    # ours are rounded to whole values
    assert float((decoded - video * 255).abs().max()) <= 0.55


@pytest.mark.parametrize("merge", ["off", "conv"])
@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_memory_steps_through_the_same_loop(
    small_lucy: Engine, frames: Tensor, merge: Any, conditioning: Any
) -> None:
    plan = turn_plan(
        small_lucy.transformer.config,
        GRID,
        (4, 4, 4, 8),
        merge=merge,
        fraction=0.5,
        conditioning=conditioning,
    )
    # a grid of 4 x 6: 1x4x4 pads the columns, 1x8x8 both sides
    assert [s.token_grid for s in plan.segments] == [(2, 3), (1, 2), (1, 2), (1, 2), (1, 1)]
    denoiser = _denoiser(small_lucy, frames, plan)
    forgetful = _denoiser(small_lucy, frames)
    _run(denoiser, forgetful)
    result = denoiser.result()
    assert result.latents.isfinite().all() and result.latents.shape == (48, *GRID)
    assert len(result.records) == (0 if merge == "off" else 2)
    assert relative_error(denoiser.latents, forgetful.latents) > 1e-3


def test_kept_conditioning_is_exact(small_lucy: Engine, frames: Tensor) -> None:
    """Static: the source is in every step's own forward, so what is kept never knows of it."""
    shape = small_lucy.transformer.config
    plan = turn_plan(shape, GRID, (4, 8), merge="off", conditioning="static")
    kept, again = _denoiser(small_lucy, frames, plan), _denoiser(small_lucy, frames, plan)
    for branch in again.branches:
        branch.cache = None
    _run(kept, again)
    assert kept.cache is not None and kept.cache.is_filled
    assert relative_error(kept.latents, again.latents) < 1e-5


def test_skipping_nothing_is_exact(small_lucy: Engine, frames: Tensor) -> None:
    """Every way of running a step is given the source."""
    plan = turn_plan(small_lucy.transformer.config, GRID, (4, 8), fraction=0.5)
    exact = _denoiser(small_lucy, frames, plan)
    reusing = _denoiser(small_lucy, frames, plan, step_cache=1e-9)
    _run(exact, reusing)
    assert relative_error(reusing.latents, exact.latents) < 1e-5


def test_steps_that_are_skipped(small_lucy: Engine, frames: Tensor) -> None:
    plan = turn_plan(small_lucy.transformer.config, GRID, (4, 8), fraction=0.5)
    denoiser = _denoiser(small_lucy, frames, plan, step_cache=10.0)
    _run(denoiser)
    assert denoiser.latents.isfinite().all() and denoiser.result().work["residual"] > 0


@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_captured_steps_read_the_turns_source(
    small_lucy: Engine, frames: Tensor, conditioning: Any
) -> None:
    plan = turn_plan(small_lucy.transformer.config, GRID, (4, 8), conditioning=conditioning)
    graphs = Graphs("on", 1 << 30, StandIn(), None)
    small_lucy.transformer.set_backend("auto", "reference")
    for window in (frames, frames.flip(2)):
        eager, captured = (
            _denoiser(small_lucy, window, plan, graphs=each) for each in (None, graphs)
        )
        _run(eager, captured)
        assert torch.equal(captured.latents, eager.latents)
        report = captured.graph_report()
        captured.release()
    assert report["replayed_steps"] == STEPS - (conditioning == "static")


@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_packed_steps_read_each_turns_source(
    small_lucy: Engine, frames: Tensor, conditioning: Any
) -> None:
    plan = turn_plan(small_lucy.transformer.config, GRID, (4, 8), conditioning=conditioning)
    windows = (frames, frames.flip(2))
    alone, packed = ([_denoiser(small_lucy, window, plan) for window in windows] for _ in range(2))
    for _ in range(STEPS):
        samples = [denoiser.samples() for denoiser in packed]
        everything = [sample for own in samples if own is not None for sample in own]
        velocities = small_lucy.transformer.forward_samples(everything)
        for denoiser in packed:
            if everything:
                denoiser.advance([velocities.pop(0) for _ in denoiser.branches])
            else:
                denoiser.step()
        for denoiser in alone:
            denoiser.step()
    for got, expected in zip(packed, alone, strict=True):
        assert relative_error(got.latents, expected.latents) < 1e-4


def test_warm_up_runs_a_windows_plan(small_lucy: Engine) -> None:
    plan = turn_plan(small_lucy.transformer.config, GRID, (4, 8))
    assert small_lucy.warmup([plan])[0]["tokens"] == plan.length


def test_the_folders_solver_is_a_default(small_lucy: Engine) -> None:
    assert small_lucy.describe()["scheduler"] == "unipc"
    euler = small_lucy.reconfigured(EngineConfig(scheduler="euler"))
    assert euler.describe()["scheduler"] == "euler"


def test_a_camera_is_refused_before_anything_runs(small_lucy: Engine, frames: Tensor) -> None:
    session = small_lucy.session(frames)
    assert session.windows == edit_windows(9, 9) and session.source.fps == 24.0
    with pytest.raises(RequestError, match=r"lucy edits by instruction.*such as tiny-nvs"):
        session.render("pan_right", prompt="a red ball")
    with pytest.raises(RequestError, match="a plan without a source segment"):
        segments = (Segment(role="target", grid=GRID), Segment(role="source", grid=GRID))
        TokenPlan(segments=segments, shape=small_lucy.transformer.config)


def test_a_vae_of_other_channels_is_refused(worded_checkpoint: Path, lucy_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="VAE has 16 latent channels, the transformer takes"):
        Engine.from_pretrained(lucy_folder, device="cpu", components=worded_checkpoint)
