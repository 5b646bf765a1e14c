"""FIFO-Diffusion (Kim et al. 2024) as an editor of long clips: a baseline on the same weights.

A queue of latent frames at rising noise levels goes through the model a block at a time
(`evaluation.fifo_schedule`); frames leave at its clean end. The source rides on the target's
channels, frame by frame. What differs from the paper, which makes videos from text:

- a flow model and Euler's steps, without the noise that DDIM may add;
- places before the clip's first frame hold that frame of the source (or of `begin`), noised to
  their levels, where the paper noises a video that the model has made first;
- the model's first latent frame stands for one pixel frame and the others for four. It was trained
  with that one in front and meets such blocks at the clip's beginning alone;
- Wan's latent frames are odd in number, so that lookahead keeps the smaller half of a block.

C latent channels, F H W latent grid of one forward, N latent frames of the clip, S steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mv2v_engine.defaults import inference
from mv2v_engine.engine.denoise import STAGE, not_finite
from mv2v_engine.engine.parts import Parts
from mv2v_engine.engine.request import sampled
from mv2v_engine.engine.step import Conditioning
from mv2v_engine.errors import RequestError, VideoError
from mv2v_engine.evaluation.fifo_schedule import FifoForward, fifo_schedule, fifo_stride
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.ops.finite import is_finite
from mv2v_engine.progress import CancelToken, StepDone
from mv2v_engine.sampling.flow_match import initial_noise, shifted_sigmas
from mv2v_engine.sampling.guidance import guide
from mv2v_engine.tokens.flops import work_flops
from mv2v_engine.tokens.plan import TokenPlan, turn_plan


@dataclass(frozen=True, eq=False)
class FifoEdit:
    """frames: uint8 [T, height, width, 3], as many as the source's. latents: [C, N, H, W]."""

    frames: Tensor
    latents: Tensor
    report: dict[str, Any]


class FifoQueue:
    """The queue of one clip between two iterations.

    conditioning: source [1, C, N, H, W] of the whole clip; texts. plan: of a target alone, the
    model's own grid. sigmas: [S + 1], from 1 to 0. begin: the clean latents [C, H, W] that stand
    before the clip.
    """

    def __init__(
        self,
        transformer: MV2VTransformer,
        plan: TokenPlan,
        conditioning: Conditioning,
        sigmas: Tensor,
        *,
        seed: int,
        guidance_scale: float,
        begin: Tensor | None = None,
    ) -> None:
        if conditioning.source is None:
            raise ValueError("a FIFO edit needs the clip's source latents")
        self.transformer, self.plan, self.guidance_scale = transformer, plan, guidance_scale
        self.source = conditioning.source
        self.texts = conditioning.at_scale(guidance_scale).texts
        self.sigmas = sigmas.to(self.source.device)
        self.num_forwards = 0
        steps, (_, channels, self.num_frames, *rest) = len(sigmas) - 1, self.source.shape
        # the clip's frames, and the padding on both sides of it
        noise = initial_noise((channels, self.num_frames + 2 * (steps - 1), *rest), seed)
        self._noise = noise.to(self.source.device)
        clean = self.source[0, :, :1] if begin is None else begin[:, None].to(self.source)
        levels = self.sigmas[:-1].flip(0)[:, None, None]  # one for each place, the cleanest first
        self.latents = (1 - levels) * clean + levels * self._noise[:, :steps]

    @inference
    def run(self, *, lookahead: bool = False) -> Generator[tuple[int, int], None, Tensor]:
        """The clip's latents [C, N, H, W]; yields (done, total) after every iteration.

        Raises:
            NotFiniteError: an iteration gave latents that are not finite; known at the end.
        """
        steps, finished, finite = self.latents.shape[1], [], []
        total = self.num_frames + steps - 1
        schedule = fifo_schedule(
            self.num_frames, steps, self.plan.target.num_frames, lookahead=lookahead
        )
        for index, iteration in enumerate(schedule):
            # place S - 1 of iteration i is the noise's frame S - 1 + i
            self.latents[:, -1] = self._noise[:, steps - 1 + index]
            moved = self.latents.clone()
            for forward in iteration.forwards:
                self._forward(forward, moved)
            finite.append(is_finite(moved))
            if iteration.finished is not None:
                finished.append(moved[:, 0])
            self.latents = moved.roll(-1, dims=1)
            yield index + 1, total
        flags: list[bool] = torch.stack(finite).tolist()
        if not all(flags):
            step = f"iteration {flags.index(False) + 1} of {total}"
            raise not_finite(step, self.transformer, self.guidance_scale)
        return torch.stack(finished, dim=1)

    def _forward(self, forward: FifoForward, moved: Tensor) -> None:
        """Take a block's places one step down; what it keeps goes into `moved` [C, S, H, W]."""
        device = self.latents.device
        places, levels, frames, kept = (
            torch.tensor(each, device=device)
            for each in (forward.places, forward.levels, forward.frames, forward.kept)
        )
        noisy = torch.cat([self.latents[:, places], self.source[0][:, frames]])[None]
        timestep = 1000 * self.sigmas[levels][None]
        velocities = [
            self.transformer([noisy], timestep, text, plan=self.plan) for text in self.texts
        ]
        self.num_forwards += len(velocities)
        velocity = guide(velocities, self.guidance_scale)[0, :, kept]
        places, levels = places[kept], levels[kept]
        delta = (self.sigmas[levels + 1] - self.sigmas[levels])[:, None, None]
        moved[:, places] = self.latents[:, places] + velocity * delta


def fifo_steps(num_inference_steps: int, model_frames: int, *, lookahead: bool = False) -> int:
    """The next number of steps that a queue over `model_frames` latent frames can have."""
    stride = fifo_stride(model_frames, lookahead=lookahead)
    return -(-max(num_inference_steps, model_frames) // stride) * stride


def edit_fifo(
    engine: Parts,
    frames: Tensor,
    prompt: str,
    *,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    lookahead: bool = False,
    source_latents: Tensor | None = None,
    begin: Tensor | None = None,
    on_progress: Callable[[StepDone], None] | None = None,
    cancel: CancelToken | None = None,
) -> FifoEdit:
    """Edit a whole clip by diagonal denoising; nothing is remembered but what the queue holds.

    The clip is encoded and decoded at once, its last frame repeated up to a length of 4n+1.

    Args:
        frames: uint8 [T, height, width, 3] of the checkpoint's size.
        num_inference_steps: rounded up to what the queue can have (`fifo_steps`).
        lookahead: twice the forwards, each frame behind cleaner ones.
        source_latents: [C, N, H, W] of the padded clip, where it is encoded already.
        begin: clean latents [C, H, W] before the first frame; None takes the source's first.

    Raises:
        RequestError: the checkpoint does not edit, or a setting does not fit it.
        NotFiniteError: a number that was computed is not finite.
        VideoError: frames of another size.
    """
    cancel = cancel or CancelToken()
    _check(engine, frames)
    sampling = engine.sampling
    asked = sampled(sampling, seed, num_inference_steps, guidance_scale)
    steps, scale = asked["num_inference_steps"], asked["guidance_scale"]
    if source_latents is None:
        source_latents = engine.vae.encode(padded_clip(engine, frames), check=cancel.check)
    plan, sigmas = _planned(engine, steps, lookahead)
    queue = FifoQueue(
        engine.transformer,
        plan,
        _conditioning(engine, prompt, scale, source_latents),
        sigmas,
        seed=seed,
        guidance_scale=scale,
        begin=begin,
    )
    began = time.monotonic()
    latents = _driven(queue.run(lookahead=lookahead), on_progress, cancel)
    seconds = time.monotonic() - began
    edited = engine.vae.decode(latents, check=cancel.check)[: len(frames)]
    # every frame of a forward has a timestep of its own to embed
    more = (plan.target.num_frames - 1) * work_flops(plan, "schedule")
    report = {
        "prompt": prompt,
        "seed": seed,
        "num_inference_steps": len(sigmas) - 1,
        "guidance_scale": scale,
        "lookahead": lookahead,
        "forwards": queue.num_forwards,
        "flops": queue.num_forwards * (work_flops(plan, "whole") + more),
        "seconds": {STAGE: seconds},
    }
    return FifoEdit(edited, latents, report)


def _check(engine: Parts, frames: Tensor) -> None:
    height, width = engine.sampling.size
    if not engine.transformer.config.source_channels:
        raise RequestError(
            f"{engine.checkpoint.name} makes novel views; give a checkpoint that edits, with the "
            "source on the target's channels"
        )
    if frames.ndim != 4 or tuple(frames.shape[1:]) != (height, width, 3) or not len(frames):
        raise VideoError(
            f"a FIFO edit takes uint8 [T, {height}, {width}, 3] with T >= 1, got "
            f"{list(frames.shape)}"
        )


def _planned(engine: Parts, asked: int, lookahead: bool) -> tuple[TokenPlan, Tensor]:
    """The plan of one forward, and the noise levels of at least as many steps as asked for."""
    sampling = engine.sampling
    _, *grid = engine.vae.latent_shape(sampling.num_frames, sampling.size)
    shape = (grid[0], grid[1], grid[2])
    plan = turn_plan(engine.transformer.config, shape, (), merge="off")
    steps = fifo_steps(asked, shape[0], lookahead=lookahead)
    return plan, shifted_sigmas(steps, sampling.flow_shift)


def _conditioning(engine: Parts, prompt: str, scale: float, source: Tensor) -> Conditioning:
    """source: [C, N, H, W]."""
    engine.check_text(prompt, scale)
    texts = engine.guidance_texts(prompt, scale)
    return Conditioning((), None, *texts, source[None].to(engine.device))


def _driven(
    run: Generator[tuple[int, int], None, Tensor],
    on_progress: Callable[[StepDone], None] | None,
    cancel: CancelToken,
) -> Tensor:
    """Run a queue to its end."""
    began = time.monotonic()
    while True:
        cancel.check()
        try:
            done, total = next(run)
        except StopIteration as stop:
            latents: Tensor = stop.value
            return latents
        if on_progress is not None:
            left = (time.monotonic() - began) / done * (total - done)
            on_progress(StepDone(STAGE, done, total, left))


def padded_clip(engine: Parts, frames: Tensor) -> Tensor:
    """The clip with its last frame repeated up to a length that the VAE takes."""
    missing = -(len(frames) - 1) % engine.vae.temporal_stride
    return torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
