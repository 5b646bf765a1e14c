"""A stream: video without end from a causal model, block by block.

A block's latents are made in a few steps and then seen once more, clean: that forward leaves what
later blocks attend to (`models.stream_cache`). The VAE goes on where the block before ended, so
that no seam is seen. Neither grows with the stream, and a block costs what the one before it cost.

The bits of a block follow from the seed, its number, its prompt and the blocks before. So a stream
that was stored goes on as if nothing had happened: from its last snapshot the latents that lie
there are seen and decoded again, one forward a block, and new ones follow.

B batch, C latent channels, F H W latent grid of a block, S text tokens.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from mv2v_engine import arguments
from mv2v_engine.config import StreamConfig, TransformerConfig
from mv2v_engine.defaults import inference
from mv2v_engine.engine.graphs import StreamForward
from mv2v_engine.engine.parts import Parts
from mv2v_engine.engine.session import window_seed
from mv2v_engine.engine.stream_folder import StreamFolder
from mv2v_engine.errors import RequestError, StorageError
from mv2v_engine.finite import require_finite
from mv2v_engine.locks import WriterLock
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.stream_cache import StreamCache
from mv2v_engine.progress import CancelToken, Event, Spans, StepDone, cancel_token, staged
from mv2v_engine.sampling.flow_match import RenoisingSolver, Solver, listed_sigmas, turn_noise
from mv2v_engine.vae import StreamDecoder

# blocks whose seconds the report is of: the newest ones, so that it stays as small as the stream
_MEASURED = 10_000
# what the parts of a snapshot are called in its file
_CACHE, _DECODER = "cache.", "decoder."


@dataclass(frozen=True, eq=False)
class StreamBlock:
    """A finished block.

    number: counted from 1. first_frame: of the video, counted from 0. frames: uint8
    [T, height, width, 3]. is_again: it was finished before the stream was resumed.
    """

    number: int
    first_frame: int
    frames: Tensor
    prompt: str
    seconds: float
    is_again: bool


class Stream:
    """Made by `Engine.stream`; not thread-safe.

    num_blocks: how many are finished. cache, decoder: what they left. lost: what could not be read
    again, in words.
    """

    def __init__(
        self,
        parts: Parts,
        prompt: str,
        config: StreamConfig,
        *,
        seed: int,
        id: str,
        folder: StreamFolder | None = None,
        lock: WriterLock | None = None,
    ) -> None:
        self.parts, self.config, self.seed, self.id = parts, config, seed, id
        self.folder, self._lock = folder, lock
        self._prompt, self._read_prompt = checked_prompt(parts, prompt), ""
        shift = parts.sampling.flow_shift if config.is_warped else None
        self._sigmas = listed_sigmas(config.timesteps, shift)
        self._text: Tensor | None = None
        self._forward = StreamForward(parts.transformer, parts.graphs, config.policy)
        self.rewind()
        self._num_stored = 0
        self.lost: list[str] = []
        self.spans = Spans(parts.device)
        self._seconds = deque[float](maxlen=_MEASURED)
        self._first_seconds: float | None = None
        self._made = {"blocks": 0, "frames": 0, "seconds": 0.0}

    def rewind(self) -> None:
        """Hand over every block again, from the first; those in the folder as they lie there."""
        parts = self.parts
        _, _, rows, columns = parts.latent_shape
        self.cache = StreamCache(parts.transformer.config, (rows, columns), self.config)
        self.decoder = StreamDecoder(parts.vae)
        self.num_blocks = self._snapshot_at = 0
        self._is_broken = False

    def __repr__(self) -> str:
        return f"Stream({self.id!r}, {self.num_blocks} blocks of {self.parts.checkpoint.name!r})"

    @property
    def prompt(self) -> str:
        """What the next new block is asked for; may be set between two blocks.

        Raises:
            RequestError: there is no text encoder, or it reads only the beginning.
        """
        return self._prompt

    @prompt.setter
    def prompt(self, prompt: str) -> None:
        self._prompt = checked_prompt(self.parts, prompt)

    def first_frame(self, number: int) -> int:
        """The first frame of a block; the video's first latent frame is one frame."""
        rate, latent = self.parts.vae.temporal_stride, (number - 1) * self.config.block_frames
        return max(0, latent * rate - rate + 1)

    def block_of(self, frame: int) -> int:
        """The number of the block that a frame of the video is in."""
        rate = self.parts.vae.temporal_stride
        return (frame + rate - 1) // rate // self.config.block_frames + 1

    def blocks(
        self, count: int | None = None, cancel: CancelToken | None = None
    ) -> Iterator[StreamBlock]:
        """The next blocks as they finish, up to the stream's block `count`; without end if None.

        A resumed stream first hands over those behind its snapshot again. A block counts once the
        next one is asked for; whoever stops in between goes on with the one after.

        Raises:
            as `events`.
        """
        for event in self.events(count, cancel):
            if isinstance(event, StreamBlock):
                yield event

    def events(
        self, count: int | None = None, cancel: CancelToken | None = None
    ) -> Iterator[Event | StreamBlock]:
        """What `blocks` gives, and what happens in between.

        Raises:
            CancelledError: between two steps; the block under way is made again by the next call.
            NotFiniteError: a block's latents or frames are not finite.
            StorageError: the folder does not take a block, or one that it holds is damaged.
            RequestError: an error broke the stream's state, which its folder still has.
        """
        if count is not None:
            arguments.integer("count", count, 0)
        token = cancel_token(cancel)
        while count is None or self.num_blocks < count:
            token.check()
            if self._is_broken:
                raise RequestError(
                    "this stream broke off while it decoded a block; resume it from its folder"
                )
            self._snapshot()
            began, number = time.perf_counter(), self.num_blocks + 1
            latents, prompt, is_again = yield from self._latents(number, token)
            decoded = partial(self._decoded, number, latents)
            frames = yield from staged(self.spans, "vae", decoded)
            seconds = time.perf_counter() - began
            if not is_again:
                self._measure(seconds, len(frames))
            yield StreamBlock(number, self.first_frame(number), frames, prompt, seconds, is_again)

    def _latents(
        self, number: int, token: CancelToken
    ) -> Generator[Event, None, tuple[Tensor, str, bool]]:
        """A block's latents [C, F, H, W], their prompt, and whether they were stored before."""
        found = self._stored(number)
        prompt = self._prompt if found is None else found[1]
        if self._text is None or prompt != self._read_prompt:
            read = partial(self.parts.text_embedding, prompt)
            self._text = yield from staged(self.spans, "text", read)
            self._read_prompt = prompt
            self.cache.clear_text()
        # of a block that was cancelled room is made already
        if self.cache.num_blocks < number:
            self.cache.begin_block()
        with self.spans.stage("sampling") as started:
            yield started
            if found is not None:
                latents = found[0][None].to(self.parts.device)
            else:
                latents = yield from self._sampled(number, token)
            # what later blocks see of this one
            block_velocity(self._forward, self.cache, latents, 0.0, self._text)
        yield self.spans.done("sampling")
        if found is None and self.folder is not None:
            self.folder.save_block(number, latents[0], prompt)
            self._num_stored = number
        return latents[0], prompt, found is not None

    def _sampled(self, number: int, token: CancelToken) -> Generator[StepDone, None, Tensor]:
        """Make a block [1, C, F, H, W], one step after the other."""
        total = len(self.config.timesteps)
        shape = (1, *self.cache.plan.latent_shapes[0])
        noise, generator = turn_noise(shape, window_seed(self.seed, number - 1))
        solver, noise = RenoisingSolver(self._sigmas, generator), noise.to(self.parts.device)
        assert self._text is not None
        began, latents = time.monotonic(), noise
        steps = block_steps(self._forward, self.cache, solver, noise, self._text)
        for step, moved in enumerate(steps, 1):
            latents = moved
            left = (time.monotonic() - began) / step * (total - step)
            yield StepDone("sampling", step, total, left)
            token.check()
        require_finite(
            latents,
            f"the latents of block {number}",
            "look for damaged weights with `run inspect PATH --deep`",
        )
        return latents

    def _decoded(self, number: int, latents: Tensor) -> Tensor:
        """A block's frames; it is finished with them."""
        self._is_broken = True  # until the decoder's past is whole again
        frames = self.decoder.decode(latents)
        self._is_broken, self.num_blocks = False, number
        return frames

    def _stored(self, number: int) -> tuple[Tensor, str] | None:
        """A block that was finished before, as it lies in the folder."""
        if self.folder is None or number > self._num_stored:
            return None
        return self.folder.read_block(number)

    def _snapshot(self) -> None:
        """Keep what the blocks so far have left, if it is time."""
        number = self.num_blocks
        if self.folder is None or number % self.config.snapshot_blocks:
            return
        if number <= self._snapshot_at or number < self._num_stored:
            return
        cache = {_CACHE + name: tensor for name, tensor in self.cache.tensors().items()}
        decoder = {_DECODER + name: tensor for name, tensor in self.decoder.tensors().items()}
        self.folder.save_snapshot(number, cache | decoder)
        self._snapshot_at = number

    def restore(self) -> None:
        """Take up what the folder holds: its newest snapshot, and how far the stream is.

        A snapshot that cannot be read is left out, and said in `lost`.
        """
        assert self.folder is not None
        self._num_stored = self.folder.num_blocks
        try:
            taken, tensors = self.folder.read_snapshot()
            if not 0 < taken <= self._num_stored:
                return
            self.cache.load(_under(_CACHE, tensors), taken, self.parts.device)
            self.decoder.load(_under(_DECODER, tensors))
        except (StorageError, ValueError) as error:
            self.lost.append(f"the snapshot is left out: {error}")
            self.rewind()
            return
        self.num_blocks = self._snapshot_at = taken

    def _measure(self, seconds: float, num_frames: int) -> None:
        if self._first_seconds is None:
            self._first_seconds = seconds
        self._seconds.append(seconds)
        self._made["blocks"] += 1
        self._made["frames"] += num_frames
        self._made["seconds"] += seconds

    def report(self) -> dict[str, Any]:
        """What was made and how fast, as plain data: of this process's blocks alone.

        The seconds are those of the stream: what its caller does with a block is not in them.
        """
        newest = sorted(self._seconds)
        latency = {}
        if newest:
            latency = {
                "first_frame_seconds": self._first_seconds,
                "frames_per_second": self._made["frames"] / self._made["seconds"],
                "block_seconds_median": statistics.median(newest),
                "block_seconds_p99": newest[min(len(newest) - 1, int(0.99 * len(newest)))],
                "block_seconds_max": newest[-1],
            }
        return {
            "id": self.id,
            "blocks": self.num_blocks,
            "frames": self.first_frame(self.num_blocks + 1),
            "fps": self.parts.sampling.fps,
            "seed": self.seed,
            "prompt": self.prompt,
            "settings": settings_of(self.config),
            "made_now": dict(self._made),
            "latency": latency,
            "graphs": self._forward.report(),
            "seconds": dict(self.spans.seconds),
            self.spans.peak_name: dict(self.spans.peak_bytes),
            "cache_bytes": self.cache.num_bytes,
            "decoder_bytes": self.decoder.num_bytes,
            **({"lost": self.lost} if self.lost else {}),
            "engine": self.parts.describe(),
        }

    def close(self) -> None:
        """Let go of the folder and of captured steps."""
        self._forward.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@inference
def block_velocity(
    transformer: MV2VTransformer | StreamForward,
    cache: StreamCache,
    latents: Tensor,
    timestep: float,
    text: Tensor,
) -> Tensor:
    """The velocity [B, C, F, H, W] of a stream's newest block, whose K and V are left in the cache.

    timestep: of the block. At 0 the latents are clean, and what they leave is what later blocks
    see of them.
    """
    times = latents.new_full((len(latents),), timestep)
    result: Tensor = transformer([latents], times, text, plan=cache.plan, stream=cache)
    return result


def block_steps(
    transformer: MV2VTransformer | StreamForward,
    cache: StreamCache,
    solver: Solver,
    latents: Tensor,
    text: Tensor,
) -> Iterator[Tensor]:
    """The latents [B, C, F, H, W] after each step of the newest block, the last ones clean.

    solver: fresh. latents: the noise that the block begins with, on the model's device. text:
    embeddings [B, S, text_dim], read where the cache holds no prompt.
    """
    for index, timestep in enumerate(solver.timesteps.tolist()):
        velocity = block_velocity(transformer, cache, latents, timestep, text)
        latents = solver.step(velocity, index, latents)
        yield latents


def require_causal(
    shape: TransformerConfig, name: str, stream: StreamConfig | None
) -> StreamConfig:
    """The settings with which a model streams.

    Raises:
        RequestError: it does something else.
    """
    if shape.has_camera or shape.is_editor:
        kind = "edits by instruction" if shape.is_editor else "renders novel views"
        raise RequestError(f"{name} {kind}, and streams are made from a prompt alone")
    if stream is None:
        raise RequestError(
            f"{name} looks at all frames at once as far as its files tell, and a stream needs a "
            "causal model; if it was trained to be one (Self-Forcing, LongLive, CausVid), say so: "
            "from_pretrained(..., causal=True), --causal"
        )
    return stream


def check_streams(parts: Parts) -> StreamConfig:
    """The settings with which an engine's model streams.

    Raises:
        RequestError: it does not, or not under the engine's configuration.
    """
    checkpoint, config = parts.checkpoint, parts.config
    own = require_causal(checkpoint.config, checkpoint.name, checkpoint.stream)
    refused = {
        "step_cache": (config.step_cache is not None, "a stream has no steps to skip"),
        "scheduler": (config.scheduler is not None, "its steps are those of a StreamConfig"),
        "fast": (config.fast is not None, "its steps are those of a StreamConfig"),
        "parallel": (config.parallel.num_ranks > 1, "a stream runs in one process"),
    }
    for option, (is_asked, why) in refused.items():
        if is_asked:
            raise RequestError(f"{option} cannot be met: {why}; leave it out")
    return own


def checked_prompt(parts: Parts, prompt: str) -> str:
    """A prompt that is read to its end.

    Raises:
        RequestError: there is no text encoder, or it reads only the beginning.
    """
    parts.check_text(prompt, 1.0)
    if parts.text is not None:
        parts.text.require_whole(prompt)
    return prompt


def settings_of(config: StreamConfig) -> dict[str, Any]:
    """What a stream's bits depend on, as a manifest keeps it."""
    fields = dataclasses.asdict(config)
    del fields["snapshot_blocks"]
    settings: dict[str, Any] = json.loads(json.dumps(fields))
    return settings


def identity_of(parts: Parts, config: StreamConfig, seed: int) -> dict[str, Any]:
    """What a resumed stream must agree with."""
    return {
        "checkpoint": parts.checkpoint.name,
        "vae": parts.vae.key,
        "size": list(parts.sampling.size),
        "dtype": str(parts.dtype).removeprefix("torch."),
        "flow_shift": parts.sampling.flow_shift,
        "seed": seed,
        "settings": settings_of(config),
    }


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, without that."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
