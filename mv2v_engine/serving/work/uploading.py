"""Frames on their way up: from a client's bytes to a block's file, no faster than the model."""

from __future__ import annotations

import asyncio

from mv2v_engine.serving.errors import ApiError, disk_errors
from mv2v_engine.serving.store.source_frames import MOST_BLOCKS
from mv2v_engine.serving.work.streaming import Stream

_LOOK_SECONDS = 1.0


class SourceUpload:
    """One client that sends frames, RGB of 8 bits a channel at the stream's size, row by row.

    A stream has one at a time; entering raises busy if there is another, and unprocessable_turn if
    the stream takes no source. What is left of a block that was not filled goes when it leaves.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream, self.num_frames = stream, 0
        self._held = bytearray()

    def __enter__(self) -> SourceUpload:
        if self.stream.source is None:
            raise ApiError("unprocessable_turn", "the model makes video from a prompt alone")
        if self.stream.is_fed:
            raise ApiError("busy", "another client sends frames to this stream")
        self.source = self.stream.source
        self._require_live()
        self.stream.is_fed = True
        return self

    def __exit__(self, *error: object) -> None:
        self.stream.is_fed = False

    @property
    def goes_on(self) -> str:
        """Where the next client begins, in words: a block is kept whole or not at all."""
        number = self.source.first_lacking(self.stream.num_blocks + 1)
        return (
            f"go on from frame {self.source.first_frame(number)}, counted from 0: those of a block "
            "that was not filled are not kept"
        )

    async def write(self, data: bytes) -> None:
        """Take bytes, once there is room for them. Raises busy: the stream has ended; disk_full."""
        view = memoryview(data)
        while view:
            await self._room()
            wanted = self.source.block_bytes(self._number) - len(self._held)
            self._held += view[:wanted]
            view = view[wanted:]
            if len(self._held) == self.source.block_bytes(self._number):
                whole, self._held = bytes(self._held), bytearray()
                with disk_errors():
                    await asyncio.to_thread(self.source.keep, self._number, whole)
                self.num_frames += len(whole) // self.source.frame_bytes
                self.stream.changed()

    async def end(self) -> None:
        """No more frames will come: the stream ends behind its last whole block."""
        with disk_errors():
            await asyncio.to_thread(self.source.end)
        self.stream.changed()

    async def _room(self) -> None:
        """Wait until few enough blocks wait for the model."""
        while True:
            self._require_live()
            self._number = self.source.first_lacking(self.stream.num_blocks + 1)
            if self._number <= self.stream.num_blocks + MOST_BLOCKS:
                return
            await self.stream.change(_LOOK_SECONDS)

    def _require_live(self) -> None:
        stream = self.stream
        if stream.is_stopping:
            message = f"the service is stopping; when it is back, {self.goes_on}"
            raise ApiError("not_ready", message)
        is_over = stream.source is not None and stream.source.is_ended
        if stream.record.is_ended or stream.is_cancelling or is_over:
            why = stream.record.error
            said = "; begin another" if why is None else f": {why['message']}"
            raise ApiError("busy", f"the stream takes no more frames{said}")
