"""FIFO editing on small random models: frames, noise levels, and the flow that it follows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mv2v_engine import Engine
from mv2v_engine.engine.step import Conditioning
from mv2v_engine.errors import CancelledError, RequestError, VideoError
from mv2v_engine.evaluation.fifo import FifoEdit, FifoQueue, edit_fifo, fifo_steps
from mv2v_engine.progress import CancelToken, StepDone
from mv2v_engine.sampling.flow_match import shifted_sigmas
from mv2v_engine.testing import relative_error, tiny_config
from mv2v_engine.tokens.plan import TokenPlan, turn_plan
from tests.conftest import smooth_frames

GRID = (3, 4, 6)
SHAPE = tiny_config(in_channels=32, out_channels=16, source_channels=16, camera_conditioning="none")


class _Straight(nn.Module):
    """The exact flow towards what rides on the source's channels, frame by frame."""

    def forward(
        self, latents: list[Tensor], timestep: Tensor, text: Tensor, *, plan: TokenPlan
    ) -> Tensor:
        noisy, clean = latents[0].chunk(2, dim=1)
        assert noisy.shape[2:] == plan.target.grid
        velocity: Tensor = (noisy - clean) / (timestep / 1000)[:, None, :, None, None]
        return velocity


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize(("num_frames", "grid"), [(7, GRID), (2, GRID), (9, (4, 2, 2))])
def test_an_exact_flow_ends_at_its_clip(
    num_frames: int, grid: tuple[int, int, int], lookahead: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    clip = torch.randn(1, 16, num_frames, *grid[1:], generator=generator)
    plan = turn_plan(SHAPE, grid, (), merge="off")
    text = torch.zeros(1, 1, 1)
    steps = fifo_steps(6, grid[0], lookahead=lookahead)
    given = Conditioning((), None, text, text, clip)
    queue = FifoQueue(
        _Straight(),  # type: ignore[arg-type]
        plan,
        given,
        shifted_sigmas(steps, 5.0),
        seed=1,
        guidance_scale=3.0,
    )
    done = []
    run = queue.run(lookahead=lookahead)
    try:
        while True:
            done.append(next(run))
    except StopIteration as stop:
        latents = stop.value
    total = num_frames + steps - 1
    assert done == [(i, total) for i in range(1, total + 1)]
    assert relative_error(latents, clip[0]) < 1e-5
    # a block a forward, or half a block with lookahead, in two guidance branches
    stride = grid[0] // 2 if lookahead else grid[0]
    assert queue.num_forwards == 2 * total * steps // stride


def test_the_queue_begins_at_its_levels() -> None:
    clip = torch.ones(1, 16, 5, 4, 6)
    plan = turn_plan(SHAPE, GRID, (), merge="off")
    sigmas = shifted_sigmas(6, 5.0)
    given = Conditioning((), None, torch.zeros(1, 1, 1), None, clip)
    common = {"seed": 1, "guidance_scale": 1.0}
    queue = FifoQueue(_Straight(), plan, given, sigmas, **common)  # type: ignore[arg-type]
    other = FifoQueue(  # type: ignore[arg-type]
        _Straight(), plan, given, sigmas, begin=torch.zeros(16, 4, 6), **common
    )
    assert queue.latents.shape == (16, 6, 4, 6)
    # both hold the same noise: what is left is (1 - sigma) times the clean frame
    difference = (queue.latents - other.latents).mean((0, 2, 3))
    torch.testing.assert_close(difference, 1 - sigmas[:-1].flip(0))


@pytest.mark.parametrize("count", [1, 9, 20])
def test_edits_of_any_length(small_lucy: Engine, count: int) -> None:
    frames, events = smooth_frames(count), list[StepDone]()
    edit = edit_fifo(
        small_lucy, frames, "a red ball", seed=2, num_inference_steps=5, on_progress=events.append
    )
    assert edit.frames.shape == frames.shape and edit.frames.dtype == torch.uint8
    latents = -(-(count - 1) // 4) + 1
    assert edit.latents.shape == (48, latents, 4, 6) and edit.latents.isfinite().all()
    # 5 steps are no multiple of 3 frames
    assert edit.report["num_inference_steps"] == 6
    assert events[-1].step == events[-1].total == latents + 5
    assert edit.report["forwards"] == 2 * 2 * (latents + 5) and edit.report["flops"] > 0


def test_a_seed_means_one_clip(small_lucy: Engine) -> None:
    frames = smooth_frames(5)
    source = small_lucy.vae.encode(frames)

    def edit(seed: int, lookahead: bool = False) -> FifoEdit:
        return edit_fifo(
            small_lucy,
            frames,
            "a red ball",
            seed=seed,
            num_inference_steps=6,
            lookahead=lookahead,
            source_latents=source,
        )

    first, again, other, ahead = edit(2), edit(2), edit(3), edit(2, lookahead=True)
    assert torch.equal(again.latents, first.latents) and torch.equal(again.frames, first.frames)
    assert relative_error(other.latents, first.latents) > 1e-3
    assert relative_error(ahead.latents, first.latents) > 1e-3
    # 3 blocks of one frame in place of one of three
    assert ahead.report["forwards"] == 3 * first.report["forwards"]


def test_what_is_refused(small_lucy: Engine, engine: Engine) -> None:
    with pytest.raises(RequestError, match="tiny makes novel views; give a checkpoint that edits"):
        edit_fifo(engine, smooth_frames(9), "")
    with pytest.raises(VideoError, match=r"takes uint8 \[T, 64, 96, 3\].*got \[9, 32, 96, 3\]"):
        edit_fifo(small_lucy, smooth_frames(9)[:, :32], "a red ball")
    with pytest.raises(RequestError, match=r"num_inference_steps must lie in 1\.\.1000, got 0"):
        edit_fifo(small_lucy, smooth_frames(9), "a red ball", num_inference_steps=0)
    cancel = CancelToken()
    cancel.cancel()
    with pytest.raises(CancelledError):
        edit_fifo(small_lucy, smooth_frames(9), "a red ball", cancel=cancel)
