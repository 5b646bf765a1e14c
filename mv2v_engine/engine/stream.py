"""A stream: video without end from a causal model, block by block.

A block's latents are made in a few steps and then seen once more, clean: that forward leaves what
later blocks attend to (`models.stream_cache`). The VAE goes on where the block before ended, so
that no seam is seen. Neither grows with the stream, and a block costs what the one before it cost.

A model with the source on its channels (Lucy-Edit's layout) edits frames as they come: the VAE's
encoder goes on, too, and a block begins when its frames are there. Of a source that ends within a
block the last frame is repeated, and the video ends where the source does.

The bits of a block follow from the seed, its number, its prompt, its source and the blocks before.
So a stream that was stored goes on as if nothing had happened: from its last snapshot the latents
that lie there are seen and decoded again, one forward a block, and new ones follow.

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
from typing import Any, get_args

import torch
from torch import Tensor

from mv2v_engine import arguments
from mv2v_engine.config import StreamConfig, StreamPolicy, TransformerConfig
from mv2v_engine.defaults import inference
from mv2v_engine.engine.graphs import StreamForward
from mv2v_engine.engine.parts import Parts
from mv2v_engine.engine.request import prompt_warnings
from mv2v_engine.engine.source import StreamSource, source_warnings
from mv2v_engine.engine.stream_folder import StoredBlock, StreamFolder
from mv2v_engine.engine.window import window_seed
from mv2v_engine.errors import RequestError, StorageError
from mv2v_engine.finite import require_finite
from mv2v_engine.locks import WriterLock
from mv2v_engine.models.dit import MV2VTransformer
from mv2v_engine.models.stream_cache import StreamCache
from mv2v_engine.models.stream_history import check_history
from mv2v_engine.progress import CancelToken, Event, Spans, StepDone, cancel_token, staged
from mv2v_engine.sampling.flow_match import Solver, listed_sigmas, stream_solver, turn_noise
from mv2v_engine.vae import StreamDecoder, StreamEncoder

# blocks whose seconds the report is of: the newest ones, so that it stays as small as the stream
_MEASURED = 10_000
# what the parts of a snapshot are called in its file
_CACHE, _DECODER, _ENCODER = "cache.", "decoder.", "encoder."


@dataclass(frozen=True, eq=False)
class _Given:
    """The source's frames of a block: [T, height, width, 3], T those of a whole block.

    num_frames: those that the source had, the others repeat the last one. latents: [C, F, H, W],
    once they are encoded.
    """

    number: int
    frames: Tensor
    num_frames: int
    latents: Tensor | None = None


@dataclass(frozen=True, eq=False)
class StreamBlock:
    """A finished block.

    number: counted from 1. first_frame: of the video, counted from 0. frames: uint8
    [T, height, width, 3]. seconds: to make it, from when its source's frames were there. is_again:
    it was finished before the stream was resumed.
    """

    number: int
    first_frame: int
    frames: Tensor
    prompt: str
    seconds: float
    is_again: bool


class Stream:
    """Made by `Engine.stream`; not thread-safe.

    num_blocks: how many are finished. cache, decoder, encoder: what they left, the last one None
    without a source. lost: what could not be read again, in words. warnings: what the weights do
    not know of the prompts so far and, once its first block is handed over, of the source.
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
        source: StreamSource | None = None,
    ) -> None:
        self.parts, self.config, self.seed, self.id = parts, config, seed, id
        self.folder, self._lock = folder, lock
        self._prompt, self._read_prompt = checked_prompt(parts, prompt), ""
        shift = parts.sampling.flow_shift if config.is_warped else None
        self._sigmas = listed_sigmas(config.timesteps, shift)
        self._text: Tensor | None = None
        self._forward = StreamForward(parts.transformer, parts.graphs, config.policy)
        self.source = source
        self.encoder = None if source is None else StreamEncoder(parts.vae)
        self._num_encoded = 0
        self._given: _Given | None = None
        self._waited = 0.0
        self._num_recent = (config.window - config.num_fixed) // config.block_frames
        self._num_stored = 0
        self.rewind()
        self.lost: list[str] = []
        self.warnings = list(prompt_warnings(parts.checkpoint, self._prompt))
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
        self._num_frames: int | None = None  # known once the video has ended
        self._is_broken = False
        self._prompt_before = self._prompt_begun = ""
        # blocks that a new prompt may have seen again
        self._recent = deque[tuple[Tensor, Tensor | None]](maxlen=self._num_recent)

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
        self._warn(prompt_warnings(self.parts.checkpoint, prompt))

    def _warn(self, words: tuple[str, ...]) -> None:
        self.warnings += [each for each in words if each not in self.warnings]

    def first_frame(self, number: int) -> int:
        """The first frame of a block; the video's first latent frame is one frame."""
        rate, latent = self.parts.vae.temporal_stride, (number - 1) * self.config.block_frames
        return max(0, latent * rate - rate + 1)

    @property
    def num_frames(self) -> int:
        """How many frames the finished blocks have."""
        return self._num_frames or self.first_frame(self.num_blocks + 1)

    @property
    def fps(self) -> float:
        """Frames a second: the source's, or those that the model was made for."""
        return self.parts.sampling.fps if self.source is None else self.source.fps

    def block_of(self, frame: int) -> int:
        """The number of the block that a frame of the video is in."""
        rate = self.parts.vae.temporal_stride
        return (frame + rate - 1) // rate // self.config.block_frames + 1

    def blocks(
        self, count: int | None = None, cancel: CancelToken | None = None
    ) -> Iterator[StreamBlock]:
        """The next blocks as they finish, up to the stream's block `count`; None: as long as there
        is a source, or without end.

        A resumed stream first hands over those behind its snapshot again. A block counts once the
        next one is asked for; whoever stops in between goes on with the one after. Where `cancel`
        is cancelled, `CancelledError` comes instead of the block under way, which the next call
        without that token makes, or the stream resumed from its folder, to the same bits.

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
            CancelledError: `cancel` was cancelled, seen between two steps, or while frames are
                waited for; the block under way is made again by the next call.
            NotFiniteError: a block's latents or frames are not finite.
            VideoError: what the source gives is no frame, or cannot be read any further.
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
                    "this stream broke off while the VAE ran; resume it from its folder"
                )
            if self._num_frames is not None:
                return
            self._snapshot()
            number = self.num_blocks + 1
            found, waited = self._stored(number), time.perf_counter()
            try:
                if self.source is not None and not self._receive(number, found, token):
                    return
            finally:  # a caller that stops waiting has waited, too
                began = time.perf_counter()
                self._waited += began - waited
            block = yield from self._latents(number, found, token)
            decoded = partial(self._decoded, number, block)
            frames = yield from staged(self.spans, "vae", decoded)
            seconds, is_again = time.perf_counter() - began, found is not None
            if not is_again:
                self._measure(seconds, len(frames))
            first = self.first_frame(number)
            yield StreamBlock(number, first, frames, block.prompt, seconds, is_again)
            given = self._given
            # not before, so that the first frame comes as soon as it can
            if number == 1 and given is not None and given.number == 1:
                self._warn(source_warnings(self.parts.checkpoint, self.parts.vae, given.frames[0]))

    def _receive(self, number: int, found: StoredBlock | None, token: CancelToken) -> bool:
        """Wait for the source's frames of a block that the encoder has not seen; False: no more.

        What has come once is kept, so that a stream that is resumed need not have it again. found:
        as `_stored`.

        Raises:
            StorageError: the source no longer has all frames of a block that is finished.
        """
        assert self.source is not None
        if number <= self._num_encoded:
            return True
        given = self._given
        if given is None or given.number != number:
            first, stop = self.first_frame(number), self.first_frame(number + 1)
            frames = None if self.folder is None else self.folder.read_source(number)
            if frames is None:
                frames = self.source.take(first, stop - first, token.check)
                had = 0 if found is None else found.num_frames or 0
                if had and (frames is None or len(frames) < had):
                    raise StorageError(
                        f"frames {first} to {first + had - 1} of {self.source.name} are needed "
                        f"again, for block {number}, and are not all there; begin the stream anew"
                    )
            if frames is None:
                return False
            repeated = frames[-1:].expand(stop - first - len(frames), -1, -1, -1)
            given = _Given(number, torch.cat([frames, repeated]), len(frames))
            self._given = given
        if self.folder is not None and not self.folder.source_path(number).exists():
            self.folder.save_source(number, given.frames[: given.num_frames])
        return True

    def _encoded(self) -> _Given:
        """The source's frames of the block under way, with their latents."""
        given, encoder = self._given, self.encoder
        assert given is not None and encoder is not None
        self._is_broken = True  # until the encoder's past is whole again
        self._given = given = dataclasses.replace(given, latents=encoder.encode(given.frames))
        self._is_broken, self._num_encoded = False, given.number
        return given

    def _latents(
        self, number: int, found: StoredBlock | None, token: CancelToken
    ) -> Generator[Event, None, StoredBlock]:
        """A block, as it was stored before or as it is made now."""
        given = self._given
        if given is not None and given.number == number and given.latents is None:
            given = yield from staged(self.spans, "vae", self._encoded)
        prompt = self._prompt if found is None else found.prompt
        # what was seen again for a prompt that was begun is not what it was
        if self.config.recache and self.cache.num_blocks >= number:
            prompt = self._prompt_begun
        if self._text is None or prompt != self._read_prompt:
            read = partial(self.parts.text_embedding, prompt)
            self._text = yield from staged(self.spans, "text", read)
            self._read_prompt = prompt
            self.cache.clear_text()
        with self.spans.stage("sampling") as started:
            yield started
            # for a block that was cancelled before, room is made already
            if self.cache.num_blocks < number:
                if self.config.recache and number > 1 and prompt != self._prompt_before:
                    self._see_again(self._text)
                begin_block(self.parts.transformer, self.cache)
                self._prompt_begun = prompt
            edited, num_frames = None, None
            if found is not None:
                edited = found.source
            elif given is not None:
                edited, num_frames = given.latents, given.num_frames
            source = None if edited is None else edited[None].to(self.parts.device)
            if found is not None:
                latents = found.latents[None].to(self.parts.device)
            else:
                latents = yield from self._sampled(number, source, token)
            # what later blocks see of this one
            block_velocity(self._forward, self.cache, latents, 0.0, self._text, source)
        yield self.spans.done("sampling")
        if found is not None:
            return found
        if self.folder is not None:
            self.folder.save_block(number, latents[0], prompt, source=edited, num_frames=num_frames)
            self._num_stored = number
        return StoredBlock(latents[0], prompt, edited, num_frames)

    def _see_again(self, text: Tensor) -> None:
        """Make K and V of the blocks that are held whole anew, as another prompt has them."""
        frames = self.config.block_frames
        held = self.cache.num_recent // frames
        recent = list(self._recent)[-held:] if held > 0 else []
        for later, (latents, source) in zip(reversed(range(len(recent))), recent, strict=True):
            with self.cache.before(later * frames):
                block_velocity(self._forward, self.cache, latents, 0.0, text, source)

    def _sampled(
        self, number: int, source: Tensor | None, token: CancelToken
    ) -> Generator[StepDone, None, Tensor]:
        """Make a block [1, C, F, H, W], one step after the other."""
        total, shape = len(self.config.timesteps), self.parts.transformer.config
        size = (1, shape.out_channels, *self.cache.plan.latent_shapes[0][1:])
        noise, generator = turn_noise(size, window_seed(self.seed, number - 1))
        noise = noise.to(self.parts.device)
        solver = stream_solver(self._sigmas, generator, is_map=shape.has_end_time)
        assert self._text is not None
        began, latents = time.monotonic(), noise
        steps = block_steps(self._forward, self.cache, solver, noise, self._text, source)
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

    def _decoded(self, number: int, block: StoredBlock) -> Tensor:
        """A block's frames; it is finished with them."""
        self._is_broken = True  # until the decoder's past is whole again
        frames = self.decoder.decode(block.latents)
        self._is_broken, self.num_blocks = False, number
        self._finish(block)
        if block.num_frames is not None and block.num_frames < len(frames):
            self._num_frames = self.first_frame(number) + block.num_frames
        return frames[: block.num_frames]

    def _finish(self, block: StoredBlock) -> None:
        """Remember what a block was made for, and the block if it may be seen again."""
        self._prompt_before = block.prompt
        if self.config.recache:
            tensors = block.latents, block.source
            latents, source = (
                None if each is None else each[None].to(self.parts.device) for each in tensors
            )
            assert latents is not None
            self._recent.append((latents, source))

    def _stored(self, number: int) -> StoredBlock | None:
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
        if self.source is not None and self._num_encoded != number:
            return
        cache = {_CACHE + name: tensor for name, tensor in self.cache.tensors().items()}
        decoder = {_DECODER + name: tensor for name, tensor in self.decoder.tensors().items()}
        encoder = {} if self.encoder is None else self.encoder.tensors()
        encoder = {_ENCODER + name: tensor for name, tensor in encoder.items()}
        self.folder.save_snapshot(number, cache | decoder | encoder)
        self._snapshot_at = number
        self.folder.remove_source(number)

    def restore(self) -> None:
        """Take up what the folder holds: its newest snapshot, and how far the stream is.

        A snapshot that cannot be read is left out, and said in `lost`.
        """
        assert self.folder is not None
        self._num_stored = self.folder.num_blocks
        if self.source is not None:
            # a block may have its frames before it is finished
            begun = self.folder.source_path(self._num_stored + 1).exists()
            self.source.begin(self.first_frame(self._num_stored + begun + 1))
        try:
            taken, tensors = self.folder.read_snapshot()
            if not 0 < taken <= self._num_stored:
                return
            self.cache.load(_under(_CACHE, tensors), taken, self.parts.device)
            self.decoder.load(_under(_DECODER, tensors))
            if self.encoder is not None:
                self.encoder.load(_under(_ENCODER, tensors))
            oldest = taken if not self.config.recache else max(1, taken - self._num_recent + 1)
            for number in range(oldest, taken + 1):
                self._finish(self.folder.read_block(number))
        except (StorageError, ValueError) as error:
            self.lost.append(f"the snapshot is left out: {error}")
            self.rewind()
            if self.source is not None:
                self.encoder = StreamEncoder(self.parts.vae)
            return
        self.num_blocks = self._snapshot_at = self._num_encoded = taken

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
            "frames": self.num_frames,
            "fps": self.fps,
            "seed": self.seed,
            "prompt": self.prompt,
            "settings": settings_of(self.config),
            "made_now": dict(self._made),
            "latency": latency,
            "cache": self.cache.describe(),
            "graphs": self._forward.report(),
            **self._source_report(),
            "seconds": dict(self.spans.seconds),
            self.spans.peak_name: dict(self.spans.peak_bytes),
            "cache_bytes": self.cache.num_bytes,
            "decoder_bytes": self.decoder.num_bytes,
            **({"lost": self.lost} if self.lost else {}),
            **({"warnings": self.warnings} if self.warnings else {}),
            "engine": self.parts.describe(),
        }

    def _source_report(self) -> dict[str, Any]:
        if self.source is None or self.encoder is None:
            return {}
        told = {**self.source.report(), "waited_seconds": self._waited}
        return {"source": told, "encoder_bytes": self.encoder.num_bytes}

    def close(self) -> None:
        """Let go of the folder, of the source and of captured steps."""
        self._forward.close()
        if self.source is not None:
            self.source.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@inference
def begin_block(transformer: MV2VTransformer, cache: StreamCache) -> None:
    """Make room for a stream's next block (`MV2VTransformer.begin_block`)."""
    transformer.begin_block(cache)


@inference
def block_velocity(
    transformer: MV2VTransformer | StreamForward,
    cache: StreamCache,
    latents: Tensor,
    timestep: float,
    text: Tensor,
    source: Tensor | None = None,
    end: float | None = None,
) -> Tensor:
    """The velocity [B, C, F, H, W] of a stream's newest block, whose K and V are left in the cache.

    timestep: of the block. At 0 the latents are clean, and what they leave is what later blocks
    see of them. source: latents [B, C, F, H, W] for a model that takes them on the channels. end:
    the timestep to which a flow map's step goes.
    """
    times = latents.new_full((len(latents),), timestep)
    ends = None if end is None else torch.full_like(times, end)
    if source is not None:
        latents = torch.cat([latents, source], 1)
    result: Tensor = transformer(
        [latents], times, text, plan=cache.plan, stream=cache, end_timestep=ends
    )
    return result


def block_steps(
    transformer: MV2VTransformer | StreamForward,
    cache: StreamCache,
    solver: Solver,
    latents: Tensor,
    text: Tensor,
    source: Tensor | None = None,
) -> Iterator[Tensor]:
    """The latents [B, C, F, H, W] after each step of the newest block, the last ones clean.

    solver: fresh. latents: the noise that the block begins with, on the model's device. text:
    embeddings [B, S, text_dim], read where the cache holds no prompt. source: as `block_velocity`.
    """
    ends = [None] * len(solver.timesteps) if solver.ends is None else solver.ends.tolist()
    for index, timestep in enumerate(solver.timesteps.tolist()):
        velocity = block_velocity(transformer, cache, latents, timestep, text, source, ends[index])
        latents = solver.step(velocity, index, latents)
        yield latents


def require_causal(
    shape: TransformerConfig, name: str, stream: StreamConfig | None
) -> StreamConfig:
    """The settings with which a model streams.

    Raises:
        RequestError: it does something else.
    """
    if shape.vace_layers:
        raise RequestError(f"{name} has VACE's blocks, which see a whole video: use run edit")
    if shape.has_camera:
        raise RequestError(
            f"{name} renders novel views, and streams are made from a prompt, or edit a source"
        )
    if stream is None:
        raise RequestError(
            f"{name} looks at all frames at once as far as its files tell, and a stream needs a "
            "causal model; if it was trained to be one (Self-Forcing, LongLive, CausVid), load it "
            "with causal=True"
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


def refused_policies(parts: Parts, config: StreamConfig) -> dict[str, str]:
    """The policies that a model cannot stream with, and why."""
    found, shape, (_, _, *grid) = {}, parts.transformer.config, parts.latent_shape
    for policy in get_args(StreamPolicy):
        try:
            check_policy(shape, parts.checkpoint.name, dataclasses.replace(config, policy=policy))
            StreamCache(shape, (grid[0], grid[1]), dataclasses.replace(config, policy=policy))
        except RequestError as error:
            found[policy] = str(error)
    return found


def check_policy(shape: TransformerConfig, name: str, config: StreamConfig) -> None:
    """Refuse a policy that the weights lack parts for.

    Raises:
        RequestError: so it is.
    """
    if config.policy == "history":
        check_history(shape, name, config)


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
    # folders that are older than these choices lack them
    if not config.recache:
        del fields["recache"]
    if config.policy != "history":
        del fields["history_rate"], fields["history_slots"]
    settings: dict[str, Any] = json.loads(json.dumps(fields))
    return settings


def check_source(shape: TransformerConfig, name: str, has_source: bool) -> None:
    """Refuse a source for a model that takes none, and the other way about.

    Raises:
        RequestError: so it is.
    """
    takes = bool(shape.source_channels)
    if takes and not has_source:
        raise RequestError(
            f"{name} edits by instruction, and there is nothing to edit; give it a source: a "
            "video, or frames as they come"
        )
    if has_source and not takes:
        raise RequestError(
            f"{name} makes video from a prompt alone, and takes no source; leave it out"
        )


def identity_of(
    parts: Parts, config: StreamConfig, seed: int, source: StreamSource | None = None
) -> dict[str, Any]:
    """What a resumed stream must agree with."""
    edited = {} if source is None else {"source": source.identity, "fps": source.fps}
    return {
        **edited,
        "decoder": parts.vae.decoder_key,
        "checkpoint": parts.checkpoint.name,
        "vae": parts.vae.key,
        "size": list(parts.sampling.size),
        "dtype": str(parts.products).removeprefix("torch."),
        "quantize_text": parts.config.quantize_text,
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
