"""Streams as the service runs them: one task each, which asks the backend for block after block.

The video on the disk is all that lies between the backend and who reads: a reader takes it at its
own pace, a slow one holds up nobody and nothing in memory grows with it. A stream without an end is
made so many seconds ahead of the reader that is furthest and waits there; one that waits for too
long ends. A stream with an end is made to it, whoever reads.

A block is asked for with the prompt of that moment, so a new prompt holds from the next block on.
When the worker or the service ends, the stream goes on from its folder, to the same bits.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import shutil
import statistics
import time
from array import array
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

from mv2v_engine.errors import RequestError, StorageError
from mv2v_engine.serving.config import ServingConfig
from mv2v_engine.serving.errors import ApiError, client_words, disk_errors, failed
from mv2v_engine.serving.store.folders import Store
from mv2v_engine.serving.store.records import Page, new_id
from mv2v_engine.serving.store.source_frames import SourceFrames
from mv2v_engine.serving.store.streams import (
    StreamRecord,
    ended_record,
    folder_bytes,
    read_records,
    save_record,
    stream_folder,
    video_path,
)
from mv2v_engine.serving.watch.listener import Listener
from mv2v_engine.serving.work.backend import WORKER_GONE, Backend
from mv2v_engine.serving.work.stream_request import make_stream
from mv2v_engine.video.fragments import codec_of, fragment_ends, read_head

log = logging.getLogger("mv2v_engine.serving")
Json = dict[str, Any]
Waiting = Literal["reader", "source", "worker"]

# blocks whose seconds a status is of
_MEASURED = 1_000
_CHUNK_BYTES = 256 << 10
# seconds between two counts of a stream's bytes: its files are many
_COUNT_SECONDS = 10.0
# seconds that a cancelled block has to reach its next step when the service stops
_LAST_STEP_SECONDS = 15.0
# an empty box, which players skip: it keeps a connection on which nothing happens
NOTHING = b"\0\0\0\x08free"
_GONE = (
    "the worker ended {tries} times while it made block {number}; what there is of the stream stays"
)
# what ends a stream with all that was asked for, and yet not as it was asked
_UNREAD = (
    "nobody read the stream, or sent it frames, for {seconds:g} s, so it has ended; what there is "
    "of it stays"
)
_LIMIT = (
    "the token's streams have {seconds:g} s of video, which is all that it may keep; delete one to "
    "make another"
)


class Stream:
    """One stream in this process: its record, where its blocks lie, and who waits for more.

    ends: for every finished block, where its fragment ends in the video. head: the video's bytes
    before the first one. waits_for: why no block is made now, of one that is live. furthest: the
    last block that a reader has taken whole.
    """

    def __init__(self, record: StreamRecord, head: bytes = b"", ends: Iterable[int] = ()) -> None:
        self.record, self.head, self.ends = record, head, array("Q", ends)
        self.waits_for: Waiting | None = None
        # the frames of a stream that edits what is sent to it, and whether somebody sends
        self.source: SourceFrames | None = None
        self.is_fed = False
        self.furthest = self.num_readers = 0
        self.is_cancelling = self.is_stopping = False
        self.task: asyncio.Task[None] | None = None
        self.first_seconds: float | None = None
        self.seconds = deque[float](maxlen=_MEASURED)
        self.engine_seconds = deque[float](maxlen=_MEASURED)
        self.frames = deque[int](maxlen=_MEASURED)
        self.counted = float("-inf")  # when its bytes were, by the monotonic clock
        self._changed = asyncio.Event()

    @property
    def num_blocks(self) -> int:
        return len(self.ends)

    @property
    def num_frames(self) -> int:
        return self.record.num_frames(self.num_blocks)

    @property
    def video_seconds(self) -> float:
        return self.num_frames / self.record.fps

    @property
    def codec(self) -> str | None:
        """What a player must be able to play; None before the first block."""
        return codec_of(self.head) if self.head else None

    def span(self, number: int) -> tuple[int, int]:
        """Where a block's fragment begins and ends in the video."""
        return (self.ends[number - 2] if number > 1 else len(self.head)), self.ends[number - 1]

    def changed(self) -> None:
        """Wake whoever waits for something to happen."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def change(self, patience: float | None) -> bool:
        """Wait for the next `changed`, no longer than so many seconds; whether it came."""
        try:
            await asyncio.wait_for(self._changed.wait(), patience)
        except asyncio.TimeoutError:
            return False
        return True

    def latency(self) -> Json | None:
        """How fast blocks came, of those that this process saw; None before the first."""
        if not self.seconds:
            return None
        newest = sorted(self.seconds)
        return {
            "first_frame_seconds": self.first_seconds,
            "frames_per_second": sum(self.frames) / sum(self.seconds),
            "block_seconds_median": statistics.median(newest),
            "block_seconds_p99": newest[min(len(newest) - 1, int(0.99 * len(newest)))],
            "block_seconds_max": newest[-1],
            "engine_seconds_median": statistics.median(self.engine_seconds),
        }


class Streams:
    """All streams of a store. Refusals are `ApiError`s, owners come first, as in `Service`."""

    def __init__(
        self,
        config: ServingConfig,
        store: Store,
        backend: Backend,
        tell: Callable[[Callable[[Listener], None]], None],
        clock: Callable[[], float],
    ) -> None:
        """tell: tells all listeners. clock: the store's, in seconds."""
        self.config, self.store, self.backend = config, store, backend
        self._tell, self._clock = tell, clock
        self._streams: dict[str, Stream] = {}
        self._is_stopping = False

    async def recover(self) -> None:
        """Take up what lies in the store; before `start`."""
        for record in await asyncio.to_thread(read_records, self.store):
            video = video_path(stream_folder(self.store, record.id))
            head = await asyncio.to_thread(read_head, video)
            ends = await asyncio.to_thread(fragment_ends, video)
            if not record.is_ended:
                record = replace(record, restarts=record.restarts + 1)
                await asyncio.to_thread(save_record, self.store, record)
            self._streams[record.id] = self._with_source(Stream(record, head, ends))

    def start(self) -> None:
        """Go on with the streams that have not ended."""
        for stream in self._streams.values():
            if not stream.record.is_ended:
                self._go(stream)

    async def stop(self) -> None:
        """Begin no more blocks; those under way are made at the next start, to the same bits."""
        self._is_stopping = True
        tasks = []
        for stream in self._streams.values():
            stream.is_stopping = True
            stream.changed()
            if stream.task is not None:
                self.backend.cancel(stream.record.id)
                tasks.append(stream.task)
        if tasks:
            await asyncio.wait(tasks, timeout=_LAST_STEP_SECONDS)

    async def ended(self) -> None:
        """Wait for blocks whose worker did not answer; once the backend has stopped."""
        tasks = [stream.task for stream in self._streams.values() if stream.task is not None]
        if tasks:
            await asyncio.wait(tasks)

    def wake(self) -> None:
        """The backend has changed."""
        for stream in self._streams.values():
            stream.changed()

    @property
    def num_live(self) -> int:
        return sum(not stream.record.is_ended for stream in self._streams.values())

    def find(self, owner: str, stream_id: str) -> Stream:
        """Raises not_found."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.record.owner != owner:
            raise ApiError("not_found", f"no stream {stream_id[:100]}; it may have been deleted")
        return stream

    def listed(
        self, owner: str, *, limit: int, after: str | None, is_newest_first: bool
    ) -> Page[Stream]:
        """Streams in order of creation, those behind `after`. Raises not_found: no such one."""
        own = [one for one in self._streams.values() if one.record.owner == owner]
        if is_newest_first:
            own.reverse()
        if after is not None:
            own = own[own.index(self.find(owner, after)) + 1 :]
        return Page(tuple(own[:limit]), len(own) > limit)

    async def create(
        self, owner: str, about: Json, request: Json, *, key: str | None
    ) -> tuple[Stream, bool]:
        """Begin a stream; the one that the idempotency key has begun already, if it has.

        about: as `Backend.about`. request: of "prompt", "seed", "blocks", "frames" and "policy"
        those that were set.

        Raises unprocessable_turn, too_many_streams, stream_limit, idempotency_conflict, disk_full.
        """
        text = json.dumps(request, sort_keys=True)
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        if key is not None and (known := self._of_key(owner, key, digest)) is not None:
            return known, False
        try:
            record = make_stream(owner, new_id("stream"), request, about)
        except RequestError as error:
            raise ApiError("unprocessable_turn", client_words(str(error))) from error
        record = replace(record, key=key, digest=digest, used=self._clock())
        self.store.require_free(self.config.min_free_bytes)
        await self._check(record.prompt)
        # the same request may have been a little faster; from here to the place nothing else runs
        if key is not None and (known := self._of_key(owner, key, digest)) is not None:
            return known, False
        self._require_place(owner)
        stream = self._streams[record.id] = self._with_source(Stream(record))
        try:
            with disk_errors():
                await asyncio.to_thread(save_record, self.store, record)
        except BaseException:
            del self._streams[record.id]
            await asyncio.to_thread(self.store.remove, stream_folder(self.store, record.id))
            raise
        self._tell(lambda listener: listener.stream_created(record))
        self._go(stream)
        return stream, True

    async def set_prompt(self, owner: str, stream_id: str, prompt: str) -> int:
        """Change the prompt of the blocks to come; the number of the first of them.

        Raises not_found, busy: it has ended; unprocessable_turn, disk_full.
        """
        stream = self.find(owner, stream_id)
        self._require_live(stream)
        await self._check(prompt)
        self._require_live(stream)
        begun = stream.num_blocks + (stream.waits_for is None)
        await self._save(stream, prompt=prompt)
        return begun + 1

    async def cancel(self, owner: str, stream_id: str) -> Stream:
        """End a stream at its next step; what there is of it stays. Raises not_found."""
        stream = self.find(owner, stream_id)
        await self._end_task(stream)
        return stream

    async def remove(self, owner: str, stream_id: str, *, is_idle: bool = False) -> None:
        """End a stream and remove its files; it does not exist from the call on.

        is_idle: only if nobody reads it. Raises not_found, busy.
        """
        stream = self.find(owner, stream_id)
        if is_idle and (stream.num_readers or not stream.record.is_ended):
            raise ApiError("busy", "somebody reads the stream")
        del self._streams[stream_id]
        await self._end_task(stream)
        await asyncio.to_thread(self.store.remove, stream_folder(self.store, stream_id))
        await asyncio.to_thread(self.store.spare.keep)
        self._tell(lambda listener: listener.stream_deleted(stream.record))

    def ended_records(self) -> list[StreamRecord]:
        """Those that may go by themselves."""
        return [stream.record for stream in self._streams.values() if stream.record.is_ended]

    async def read(
        self, stream: Stream, first: int, last: int | None, keep_alive: float
    ) -> AsyncIterator[bytes]:
        """The video from a block on, its head before it, until `last` or the stream's end.

        Where nothing comes for so many seconds, an empty box does.
        """
        path = video_path(stream_folder(self.store, stream.record.id))
        stream.num_readers += 1
        stream.record = replace(stream.record, used=self._clock())
        file = None
        try:
            number = first
            while last is None or number <= last:
                if number > stream.num_blocks:
                    if stream.record.is_ended or stream.is_cancelling or self._is_stopping:
                        return
                    if not await stream.change(keep_alive) and file is not None:
                        yield NOTHING
                    continue
                if file is None:
                    file = await asyncio.to_thread(path.open, "rb")
                    yield stream.head
                start, end = stream.span(number)
                await asyncio.to_thread(file.seek, start)
                while start < end:
                    data = await asyncio.to_thread(file.read, min(_CHUNK_BYTES, end - start))
                    if not data:
                        return  # it was harmed meanwhile
                    start += len(data)
                    yield data
                # whoever asks for more has taken what was given
                if number > stream.furthest:
                    stream.furthest = number
                    stream.changed()
                number += 1
        finally:
            stream.num_readers -= 1
            stream.record = replace(stream.record, used=self._clock())
            if file is not None:
                file.close()

    def _with_source(self, stream: Stream) -> Stream:
        if stream.record.has_source:
            folder = stream_folder(self.store, stream.record.id)
            stream.source = SourceFrames(folder, stream.record)
        return stream

    def _of_key(self, owner: str, key: str, digest: str) -> Stream | None:
        for stream in self._streams.values():
            if (stream.record.owner, stream.record.key) == (owner, key):
                if stream.record.digest == digest:
                    return stream
                raise ApiError(
                    "idempotency_conflict",
                    f"Idempotency-Key {key!r} came with another stream before; use a new key",
                )
        return None

    def _require_place(self, owner: str) -> None:
        own = [s for s in self._streams.values() if s.record.owner == owner]
        live = sum(not stream.record.is_ended for stream in own)
        for count, most, whose in (
            (live, self.config.stream_share, " of this token"),
            (self.num_live, self.config.max_streams, ""),
        ):
            if count >= most:
                raise ApiError(
                    "too_many_streams",
                    f"{count} streams{whose} are being made and no more may; cancel one, or try "
                    "again later",
                    headers={"Retry-After": "30"},
                )
        if self._seconds_left(owner) <= 0:
            raise ApiError("stream_limit", _LIMIT.format(seconds=self.config.limits.stream_seconds))

    def _seconds_left(self, owner: str) -> float:
        own = [s.video_seconds for s in self._streams.values() if s.record.owner == owner]
        return self.config.limits.stream_seconds - sum(own)

    def _require_live(self, stream: Stream) -> None:
        if stream.record.is_ended or stream.is_cancelling:
            raise ApiError("busy", "the stream has ended; begin another")

    async def _check(self, prompt: str) -> None:
        answer = await self.backend.check(prompt)
        if answer["type"] == "failed":
            gone = answer["code"] in WORKER_GONE
            code = "not_ready" if gone else answer["code"]
            headers = {"Retry-After": "5"} if gone else None
            raise ApiError(code, client_words(answer["message"]), headers=headers)

    def _go(self, stream: Stream) -> None:
        stream.task = asyncio.create_task(self._drive(stream), name=stream.record.id)

    async def _end_task(self, stream: Stream) -> None:
        """Let a stream that is made come to its end."""
        if stream.task is None:
            return
        stream.is_cancelling = True
        stream.changed()
        self.backend.cancel(stream.record.id)
        await asyncio.wait([stream.task])

    async def _drive(self, stream: Stream) -> None:
        """Make a stream to its end, or to the service's."""
        driven = self._made(stream, time.monotonic())
        outcome = (await asyncio.gather(driven, return_exceptions=True))[0]
        stream.waits_for = None
        if isinstance(outcome, BaseException):
            log.error("stream %s failed", stream.record.id, exc_info=outcome)
            outcome = _failed(failed("internal", "a fault of the service ended the stream"))
        if outcome is None:
            return
        await self.backend.release(stream.record.id)
        state, why = outcome
        record = replace(stream.record, state=state, error=why, used=self._clock())
        try:
            record = await asyncio.to_thread(ended_record, self.store, record)
            await asyncio.to_thread(save_record, self.store, record)
        except (StorageError, OSError) as fault:
            # it ends again at the next start
            log.error("the end of %s is not on the disk: %s", record.id, fault)
            record = replace(record, ended=time.time())
        stream.record, stream.task = record, None
        stream.changed()
        self._tell(lambda listener: listener.stream_ended(record))

    async def _made(self, stream: Stream, began: float) -> tuple[Any, Json | None] | None:
        """Ask for blocks until there is a reason to end, which is given; None if the service ends.

        began: when the stream was asked for, or taken up again.
        """
        tries, folder = 0, stream_folder(self.store, stream.record.id)
        while not self._is_stopping:
            if (end := self._end_of(stream)) is not None:
                return end
            if not await self._may_go_on(stream):
                return "cancelled", {
                    "code": "unread",
                    "message": _UNREAD.format(seconds=self.config.stream_unread),
                }
            if self._is_stopping or self._end_of(stream) is not None:
                continue
            asked, number = time.monotonic(), stream.num_blocks + 1
            answer = await self.backend.block(stream.record, folder, number)
            if answer["type"] == "block":
                tries = 0
                await self._took(stream, answer, asked, began)
            elif answer["type"] == "cancelled":
                if not (stream.is_cancelling or self._is_stopping):
                    return _failed(failed("internal", "the worker gave the stream up"))
            elif answer["code"] in WORKER_GONE and tries + 1 < self.config.max_attempts:
                tries += 1
                stream.record = replace(stream.record, restarts=stream.record.restarts + 1)
            elif not (stream.is_cancelling or self._is_stopping):
                if answer["code"] in WORKER_GONE:
                    answer["message"] = _GONE.format(tries=tries + 1, number=number)
                return _failed(answer)
        return None

    def _end_of(self, stream: Stream) -> tuple[Any, Json | None] | None:
        """Why a stream makes no more blocks; None if it does."""
        record = stream.record
        if stream.is_cancelling:
            return "cancelled", {"code": "cancelled", "message": "the stream was cancelled"}
        if record.blocks is not None and stream.num_blocks >= record.blocks:
            return "finished", None
        source, next_one = stream.source, stream.num_blocks + 1
        if source is not None and source.is_ended and not source.has(next_one):
            return "finished", None
        about = self.backend.about
        if about is not None and about["engine"]["checkpoint"] != record.checkpoint:
            name = about["engine"]["checkpoint"]
            message = f"the stream was made by {record.checkpoint}, and this service runs {name}"
            return _failed(failed("unprocessable_turn", message))
        if self._seconds_left(record.owner) <= 0:
            message = _LIMIT.format(seconds=self.config.limits.stream_seconds)
            return "finished", {"code": "stream_limit", "message": message}
        if shutil.disk_usage(self.store.root).free < self.config.min_free_bytes:
            return _failed(failed("disk_full", "the store's disk is full; what there is stays"))
        return None

    async def _may_go_on(self, stream: Stream) -> bool:
        """Wait until the next block is wanted and can be made; False if it takes too long."""
        deadline = time.monotonic() + self.config.stream_unread
        while not (self._is_stopping or self._end_of(stream) is not None):
            if self.backend.is_lost or self.backend.ready:
                stream.waits_for = self._lacks(stream)
                if stream.waits_for is None:
                    return True
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
            else:
                stream.waits_for, left = "worker", None
            await stream.change(left)
        return True

    def _lacks(self, stream: Stream) -> Waiting | None:
        """What the next block waits for, beside a worker."""
        record = stream.record
        if stream.source is not None:
            # the client that sends frames sets the pace
            return None if stream.source.has(stream.num_blocks + 1) else "source"
        ahead = stream.num_frames - record.num_frames(stream.furthest)
        is_ahead = ahead >= self.config.stream_ahead * record.fps
        return "reader" if record.blocks is None and is_ahead else None

    async def _took(self, stream: Stream, answer: Json, asked: float, began: float) -> None:
        """A block is in the video."""
        now, before = time.monotonic(), stream.num_frames
        folder = stream_folder(self.store, stream.record.id)
        if not stream.num_blocks:
            stream.head = await asyncio.to_thread(read_head, video_path(folder))
        if stream.first_seconds is None:
            stream.first_seconds = now - began
        stream.ends.append(answer["end"])
        stream.seconds.append(now - asked)
        stream.engine_seconds.append(answer["seconds"])
        stream.frames.append(stream.num_frames - before)
        if stream.source is not None:
            stream.source.drop(stream.num_blocks)
        if now - stream.counted >= _COUNT_SECONDS:
            stream.counted, size = now, await asyncio.to_thread(folder_bytes, folder)
            stream.record = replace(stream.record, bytes=size)
        stream.changed()
        frames, seconds = stream.frames[-1], now - asked
        self._tell(lambda listener: listener.stream_block(stream.record, frames, seconds))

    async def _save(self, stream: Stream, **changes: Any) -> None:
        """Change a record, on the disk first."""
        record = replace(stream.record, used=self._clock(), **changes)
        with disk_errors():
            await asyncio.to_thread(save_record, self.store, record)
        stream.record = replace(stream.record, used=record.used, **changes)


def _failed(event: Json) -> tuple[Any, Json]:
    return "failed", {"code": event["code"], "message": client_words(event["message"])}
