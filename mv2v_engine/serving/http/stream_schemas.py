"""Streams over the wire: requests and answers as pydantic models, with an example of each."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mv2v_engine.config import StreamPolicy
from mv2v_engine.serving.http.schemas import CREATED, Asked, JobError, ListingPart, Text, example
from mv2v_engine.serving.store.streams import StreamState
from mv2v_engine.serving.work.streaming import Stream, Waiting

STREAM_ID = "stream_0123456789abcdef01234567"
_REQUEST: dict[str, Any] = {"prompt": "a red kite over a beach", "seed": 7}
# a year at 24 frames a second, in blocks of 12
_MOST = 100_000_000


class StreamRequest(Asked):
    """A stream. Without blocks or frames it goes on until it is cancelled, or nobody reads it.

    frames: rounded up to whole blocks. What is left out is the model's default.
    """

    model_config = ConfigDict(json_schema_extra=example(_REQUEST))

    prompt: Text = Field(default="", description="what the video shows")
    seed: int | None = Field(default=None, ge=0, le=2**63 - 1)
    blocks: int | None = Field(default=None, ge=1, le=_MOST, description="after which it ends")
    frames: int | None = Field(default=None, ge=1, le=_MOST, description="the same in frames")
    policy: StreamPolicy | None = Field(
        default=None, description="what a block sees of those before it"
    )

    @model_validator(mode="after")
    def _has_one_end(self) -> StreamRequest:
        if self.blocks is not None and self.frames is not None:
            raise ValueError("a stream ends after blocks or after frames, got both; give one")
        return self


class PromptRequest(Asked):
    """What a stream shows from the next block on."""

    model_config = ConfigDict(json_schema_extra=example({"prompt": "the kite comes down"}))

    prompt: Text


class PromptAnswer(BaseModel):
    """first_block: the first one that is asked for with the prompt."""

    object: Literal["stream.prompt"] = "stream.prompt"
    id: str
    prompt: str
    first_block: int


class Latency(BaseModel):
    """Seconds of the newest 1,000 blocks of this service, each from its order to its answer.

    first_frame_seconds: from the request, or the service's start, to the first block.
    engine_seconds_median: of what the model and the VAE take of a block.
    """

    first_frame_seconds: float
    frames_per_second: float
    block_seconds_median: float
    block_seconds_p99: float
    block_seconds_max: float
    engine_seconds_median: float


class StreamStatus(BaseModel):
    """A stream. Times are unix seconds, sizes pixels and bytes.

    prompt: of the blocks to come. blocks: finished ones; num_blocks: after which it ends, null if
    it goes on. waits_for: why no block of a running one is made now: for a reader, for frames to
    edit, or for a worker. codec: what a player must know, as `video/mp4; codecs="avc1.…"` has it.
    restarts: how often it went on where it stood after a process had ended. bytes: on the disk;
    of a running one they are counted every ten seconds.
    """

    model_config = ConfigDict(
        json_schema_extra=example(
            {
                "object": "stream",
                "id": STREAM_ID,
                "checkpoint": "self_forcing_dmd",
                "state": "running",
                "waits_for": None,
                "prompt": "a red kite over a beach",
                "seed": 7,
                "policy": "memrope",
                "num_blocks": None,
                "blocks": 41,
                "frames": 489,
                "seconds": 30.5625,
                "fps": 16.0,
                "width": 832,
                "height": 480,
                "codec": "avc1.64001f",
                "created": CREATED,
                "ended": None,
                "error": None,
                "readers": 1,
                "restarts": 0,
                "bytes": 98304000,
                "latency": None,
            }
        ),
    )

    object: Literal["stream"] = "stream"
    id: str
    checkpoint: str
    state: StreamState
    waits_for: Waiting | None
    prompt: str
    seed: int
    policy: StreamPolicy | None
    num_blocks: int | None
    blocks: int
    frames: int
    seconds: float
    fps: float
    width: int
    height: int
    codec: str | None
    created: float
    ended: float | None
    error: JobError | None
    readers: int
    restarts: int
    bytes: int
    latency: Latency | None


class StreamList(ListingPart[StreamStatus]):
    pass


_SAME = (
    *("id", "checkpoint", "state", "prompt", "seed", "policy", "fps", "width", "height"),
    *("created", "ended", "restarts", "bytes"),
)


def status_of(stream: Stream) -> StreamStatus:
    """A stream as it is now."""
    record, latency = stream.record, stream.latency()
    return StreamStatus(
        **{name: getattr(record, name) for name in _SAME},
        waits_for=stream.waits_for,
        num_blocks=record.blocks,
        blocks=stream.num_blocks,
        frames=stream.num_frames,
        seconds=stream.video_seconds,
        codec=stream.codec,
        error=None if record.error is None else JobError(**record.error),
        readers=stream.num_readers,
        latency=None if latency is None else Latency(**latency),
    )
