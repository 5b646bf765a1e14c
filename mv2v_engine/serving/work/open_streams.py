"""Streams that a host has open, and how a block of one is made.

A block is one order: the server asks for the next one when it wants it, so a stream that waits
costs its memory alone. Whatever goes wrong, the stream is closed here and goes on from its folder.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mv2v_engine import Engine
from mv2v_engine.engine.stream import Stream, StreamBlock, checked_prompt
from mv2v_engine.engine.stream_folder import StreamFolder
from mv2v_engine.progress import CancelToken
from mv2v_engine.serving.store.source_frames import SourceFrames
from mv2v_engine.serving.store.streams import StreamRecord, engine_folder, video_path
from mv2v_engine.video.fragments import FragmentWriter, append_fragments, fragment_ends

Json = dict[str, Any]


@dataclass(slots=True)
class OpenStream:
    """A stream, and the writer behind the last whole fragment of its video."""

    stream: Stream
    writer: FragmentWriter

    def close(self) -> None:
        self.writer.close()
        self.stream.close()


class OpenStreams:
    """Not thread-safe; one block of a stream at a time. max_open: held in memory at once."""

    def __init__(self, engine: Engine, max_open: int) -> None:
        self.engine, self.max_open = engine, max_open
        self._open: OrderedDict[str, OpenStream] = OrderedDict()
        self._busy: set[str] = set()

    def warm_up(self) -> None:
        """Make a block of nothing."""
        prompt, source = "a video" if self.engine.text is not None else "", {}
        if self.engine.is_editor:
            height, width = self.engine.sampling.size
            source = _source(lambda first: (np.zeros((height, width, 3), np.uint8),) * 99)
        with self.engine.stream(prompt, **source) as stream:
            next(stream.blocks(1))

    def check(self, prompt: str) -> None:
        """Refuse a prompt that is not read to its end. Raises RequestError."""
        checked_prompt(self.engine, prompt)

    def block(self, asked: Json, folder: Path, cancel: CancelToken) -> Generator[None, None, Json]:
        """Make a stream's block of a number, with those before it that are not in its video.

        asked: `protocol.stream_fields`. Comes back after every step.

        Returns:
            {"type": "block", "number", "end": bytes of the video with it, "seconds": of its making}

        Raises:
            MV2VError: as `Stream.events`, or the folder does not take it.
        """
        self._busy.add(asked["id"])
        try:
            opened = self._opened(asked, folder)
            opened.stream.prompt = asked["prompt"]
            seconds, video = 0.0, video_path(folder)
            for event in opened.stream.events(asked["number"], cancel):
                if isinstance(event, StreamBlock):
                    # blocks behind a snapshot are handed over again, and lie there already
                    if event.number > opened.writer.num_fragments:
                        opened.writer.add(event.frames)
                    seconds = event.seconds
                else:
                    yield
        finally:
            self._busy.discard(asked["id"])
        # all fragments are looked through only where this one lay there already
        is_last = opened.writer.num_fragments == asked["number"]
        end = video.stat().st_size if is_last else fragment_ends(video)[asked["number"] - 1]
        return {"type": "block", "number": asked["number"], "end": end, "seconds": seconds}

    def release(self, stream_id: str) -> None:
        """Let go of a stream; its folder stays."""
        opened = self._open.pop(stream_id, None)
        if opened is not None:
            opened.close()

    def close(self) -> None:
        for stream_id in list(self._open):
            self.release(stream_id)

    def _opened(self, asked: Json, folder: Path) -> OpenStream:
        """A stream, opened again from its folder if it is not in memory."""
        opened = self._open.pop(asked["id"], None)
        if opened is None:
            opened = self._restored(asked, folder)
        self._open[asked["id"]] = opened
        idle = [name for name in self._open if name not in self._busy]
        for name in idle[: max(len(self._open) - self.max_open, 0)]:
            self.release(name)
        return opened

    def _restored(self, asked: Json, folder: Path) -> OpenStream:
        config = self.engine.checkpoint.stream
        if config is not None and asked["policy"] is not None:
            config = dataclasses.replace(config, policy=asked["policy"])
        kept, video = StreamFolder(engine_folder(folder)), video_path(folder)
        # the account of frames that were sent up
        given: Json = {}
        if asked["source"] is not None:
            given = _source(SourceFrames(folder, StreamRecord(**asked["source"])).frames)
        stream = self.engine.stream(
            asked["prompt"],
            id=asked["id"],
            seed=asked["seed"],
            config=config,
            store=kept.folder,
            resume=kept.exists(),
            is_locked=True,  # the store has one worker
            **given,
        )
        whole = len(fragment_ends(video))
        if whole < stream.num_blocks:
            stream.rewind()  # the video has lost some, and they are made again
        writer = append_fragments(
            video,
            self.engine.sampling.fps,
            num_fragments=whole,
            num_frames=stream.first_frame(whole + 1),
        )
        return OpenStream(stream, writer)


def _source(frames: Callable[[int], Iterable[np.ndarray]]) -> Json:
    """The argument of `Engine.stream` for frames from a number on."""
    return {"source": frames}
