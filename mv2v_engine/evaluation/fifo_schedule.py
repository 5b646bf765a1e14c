"""Diagonal denoising of FIFO-Diffusion (Kim et al. 2024): the schedule alone, without a model.

A queue holds S frames, one at every noise level, the cleanest first. An iteration takes every
frame one step down; then the first, now clean, leaves, and a new one of pure noise enters behind.
A model of n frames denoises the queue in blocks; with lookahead a block's last half alone is
kept, rounded down, so that every frame is denoised behind as many cleaner ones at least.

S steps and places of the queue, n frames of a model's forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class FifoForward:
    """One forward over consecutive places of the queue.

    frames: video frames, clipped into the video where the queue reaches beyond its ends: those
    are padding. levels: index into the S+1 noise levels that each frame has now, 0 the noisiest;
    it goes to the next. kept: offsets into `frames` whose result replaces what the queue holds.
    places: where in the queue each frame lies, 0 the cleanest; the same frame may be padding in
    several places, so a queue is indexed by these.
    """

    frames: tuple[int, ...]
    levels: tuple[int, ...]
    places: tuple[int, ...]
    kept: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class FifoIteration:
    """Forwards, from the noisy end to the clean one, then `finished` leaves (None: padding).

    All forwards of an iteration read the queue as it was before it; before it a frame came
    in, as pure noise, in the last place.
    """

    forwards: tuple[FifoForward, ...]
    finished: int | None


def fifo_stride(model_frames: int, *, lookahead: bool = False) -> int:
    """Places of the queue that one forward moves: the queue is a multiple of it long."""
    return max(model_frames // 2, 1) if lookahead else model_frames


def fifo_schedule(
    num_frames: int, num_steps: int, model_frames: int, *, lookahead: bool = False
) -> Iterator[FifoIteration]:
    """Iterations that make a video of `num_frames`, each in order: num_frames + num_steps - 1.

    num_steps: S, a multiple of `fifo_stride`, of `model_frames` at least. Before the first
    iteration the places other than the last hold padding: frames of number 0 at their levels,
    which an editor makes from the source by adding noise.

    Raises:
        ValueError: lengths that do not fit.
    """
    stride = fifo_stride(model_frames, lookahead=lookahead)
    if num_frames < 1 or model_frames < 1 or num_steps < 1:
        raise ValueError(
            "num_frames, num_steps and model_frames must be at least 1, got "
            f"{num_frames}, {num_steps} and {model_frames}"
        )
    if num_steps % stride or num_steps < model_frames:
        raise ValueError(
            f"a queue of {num_steps} steps must be cut into blocks of {stride} and hold a "
            f"forward's {model_frames}; choose num_steps so"
        )
    everything = tuple(range(model_frames))
    for iteration in range(num_frames + num_steps - 1):
        # the frame in the cleanest place, before the video's first while the queue fills
        head = iteration - (num_steps - 1)
        forwards = []
        for start in range(num_steps - stride, -1, -stride):
            # nothing cleaner lies before the first block
            first = max(start + stride - model_frames, 0)
            kept = everything[start - first : start - first + stride]
            places = tuple(range(first, first + model_frames))
            forwards.append(
                FifoForward(
                    frames=tuple(min(max(head + place, 0), num_frames - 1) for place in places),
                    levels=tuple(num_steps - 1 - place for place in places),
                    places=places,
                    kept=kept,
                )
            )
        yield FifoIteration(forwards=tuple(forwards), finished=head if head >= 0 else None)
