"""A backend that makes streams of boxes without a model, as large and as fast as a test wants."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path
from typing import Any

from mv2v_engine.serving.store.streams import StreamRecord, video_path
from mv2v_engine.video.fragments import fragment_ends
from tests.serving.conftest import HeldBackend

FPS, BLOCK_FRAMES = 8.0, 8
STREAMS: dict[str, Any] = {
    "kind": "streams",
    "has_text": True,
    "stream": {"settings": {}, "block_frames": BLOCK_FRAMES, "lead": 3, "has_source": False},
}
CRASHED = {"type": "failed", "code": "worker_crashed", "message": "the worker ended by SIGKILL"}


def box(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


HEAD = box(b"ftyp") + box(b"moov", b"avcC\x01\x64\x00\x1f")


class StreamBackend(HeldBackend):
    """size: bytes of a fragment. go: an Event that every block waits for. fails: what the next
    blocks answer, instead of being made. asked: (id, number, prompt) of every block."""

    def __init__(self, size: int = 1000) -> None:
        super().__init__(**STREAMS)
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
        with video.open("ab") as file:
            if number == 1:
                file.write(HEAD)
            file.write(box(b"moof") + box(b"mdat", bytes([number % 256]) * self.size))
        end = fragment_ends(video)[number - 1]
        return {"type": "block", "number": number, "end": end, "seconds": 0.001}

    async def check(self, prompt: str) -> dict[str, Any]:
        return {"type": "checked"}

    def cancel(self, job_id: str) -> None:
        if job_id in self.under_way:
            self._cancelled.add(job_id)
        super().cancel(job_id)
