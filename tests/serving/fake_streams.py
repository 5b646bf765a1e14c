"""A backend that makes streams of boxes without a model, as large and as fast as a test wants."""

from __future__ import annotations

import asyncio
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from mv2v_engine.serving.store.source_frames import SourceFrames
from mv2v_engine.serving.store.streams import StreamRecord, video_path
from mv2v_engine.video.fragments import append_fragments, fragment_ends
from tests.serving.conftest import HeldBackend

FPS, BLOCK_FRAMES = 8.0, 8
STREAMS: dict[str, Any] = {
    "kind": "streams",
    "has_text": True,
    "guides": {"references": False, "mask": False},
    "stream": {
        "settings": {},
        "block_frames": BLOCK_FRAMES,
        "lead": 3,
        "has_source": False,
        "refused": {},
    },
}
EDITS = STREAMS | {"stream": STREAMS["stream"] | {"has_source": True}}
CRASHED = {"type": "failed", "code": "worker_crashed", "message": "the worker ended by SIGKILL"}


def stream_record(**changes: Any) -> StreamRecord:
    """A stream of 4x2 pixels, blocks of 4 frames and 3 before them, as the store has it."""
    texts = {"id": "stream_1", "owner": "", "checkpoint": "causal", "prompt": ""}
    sizes = {"seed": 0, "fps": 16.0, "width": 4, "height": 2, "block_frames": 4, "lead": 3}
    others = {"blocks": None, "policy": None, "created": 0.0}
    return StreamRecord(**{**texts, **sizes, **others, **changes})


def box(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


HEAD = box(b"ftyp") + box(b"moov", b"avcC\x01\x64\x00\x1f")


class StreamBackend(HeldBackend):
    """size: bytes of a fragment. go: an Event that every block waits for. fails: what the next
    blocks answer, instead of being made. asked: (id, number, prompt) of every block."""

    def __init__(self, size: int = 1000, about: dict[str, Any] = STREAMS) -> None:
        super().__init__(**about)
        self.size = size
        self.failures: list[dict[str, Any]] = []
        self.asked: list[tuple[str, int, str]] = []
        self.under_way: set[str] = set()

    async def block(self, record: StreamRecord, folder: Path, number: int) -> dict[str, Any]:
        self.asked.append((record.id, number, record.prompt))
        assert record.id not in self.under_way, "one block of a stream at a time"
        self.under_way.add(record.id)
        try:
            while not self.go.is_set() and record.id not in self._cancelled:
                await asyncio.sleep(0.002)
        finally:
            self.under_way.discard(record.id)
        if record.id in self._cancelled:
            return {"type": "cancelled"}
        if self.failures:
            return self.failures.pop(0)
        video = video_path(folder)
        self.write(video, record, number)
        end = fragment_ends(video)[number - 1]
        return {"type": "block", "number": number, "end": end, "seconds": 0.001}

    def write(self, video: Path, record: StreamRecord, number: int) -> None:
        """Append a block's fragment."""
        with video.open("ab") as file:
            if number == 1:
                file.write(HEAD)
            file.write(box(b"moof") + box(b"mdat", bytes([number % 256]) * self.size))

    async def check(self, prompt: str) -> dict[str, Any]:
        return {"type": "checked"}

    def cancel(self, job_id: str) -> None:
        if job_id in self.under_way:
            self._cancelled.add(job_id)
        super().cancel(job_id)


class Negatives(StreamBackend):
    """An editor that stands for a model with a source: its video is the negative of the frames.

    given: the bytes of each stream's frames, as they were sent.
    """

    def __init__(self) -> None:
        super().__init__(about=EDITS)
        self.given: dict[str, bytes] = defaultdict(bytes)

    def write(self, video: Path, record: StreamRecord, number: int) -> None:
        first = record.num_frames(number - 1)
        frames = next(SourceFrames(video.parent, record).frames(first))
        self.given[record.id] += frames.tobytes()
        made = {"num_fragments": number - 1, "num_frames": first}
        with append_fragments(video, record.fps, **made) as writer:
            writer.add(255 - torch.from_numpy(frames))
