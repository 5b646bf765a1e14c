"""Streams of a store: for each a folder with its record, the engine's own files and its video.

    streams/<id>/  record.json    whose it is, what was asked, what became of it
                   engine/        the engine's: latents of every block (engine.stream_folder)
                   video.mp4      a fragment for every block, appended as it finishes

How many blocks are finished, the video tells; the record is replaced, whole, when something else
changes. A folder without a readable record is set aside at the next start, as a session's is.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mv2v_engine.errors import StorageError
from mv2v_engine.files import make_folder, save_json
from mv2v_engine.serving.store.digests import promised
from mv2v_engine.serving.store.folders import Store
from mv2v_engine.serving.store.records import is_id

log = logging.getLogger("mv2v_engine.serving")

StreamState = Literal["running", "finished", "cancelled", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamRecord:
    """One stream. Times are unix seconds.

    prompt: of the blocks to come. blocks: after which it ends; None: it goes on. policy: what a
        block sees of those before; None, in records that are older: the checkpoint's. has_source:
        it edits frames that are sent to it.
    fps: of the video. width, height: its pixels. block_frames: of every block but the first, which
        has `lead` fewer.
    error: {"code", "message"} of one that failed, was cancelled, or came to a limit.
    used: on the store's clock, when it was last read or changed. bytes: of its files; of one that
        is made, when they were last counted.
    files: what is promised of an ended one's video (`digests`). restarts: how often it was begun
        again where it stood, because a process had ended.
    """

    id: str
    owner: str = field(repr=False)
    checkpoint: str
    prompt: str = field(repr=False)
    seed: int
    blocks: int | None
    policy: str | None
    has_source: bool = False
    fps: float
    width: int
    height: int
    block_frames: int
    lead: int
    created: float
    state: StreamState = "running"
    ended: float | None = None
    error: dict[str, str] | None = None
    used: float = 0.0
    bytes: int = 0
    files: dict[str, Any] = field(default_factory=dict, repr=False)
    restarts: int = 0
    key: str | None = field(default=None, repr=False)
    digest: str | None = field(default=None, repr=False)

    @property
    def is_ended(self) -> bool:
        return self.state != "running"

    def num_frames(self, blocks: int) -> int:
        """Frames of the video's first blocks."""
        return max(0, blocks * self.block_frames - self.lead)

    def num_blocks(self, frames: int) -> int:
        """Blocks that have so many frames together, the last one whole."""
        return -(-(frames + self.lead) // self.block_frames)


def stream_folder(store: Store, stream_id: str) -> Path:
    """A stream's folder; the id must be one."""
    assert is_id("stream", stream_id), stream_id
    return store.streams / stream_id


def engine_folder(folder: Path) -> Path:
    """What the engine keeps of a stream."""
    return folder / "engine"


def video_path(folder: Path) -> Path:
    """A stream's video."""
    return folder / "video.mp4"


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder that may change meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def save_record(store: Store, record: StreamRecord) -> None:
    """Write a record, with the store's spare bytes where the disk is full.

    Raises:
        StorageError: it cannot be written; the record is what it was.
    """
    folder = stream_folder(store, record.id)
    make_folder(folder)
    try:
        save_json(folder / "record.json", dataclasses.asdict(record))
    except StorageError:
        if not store.spare.give_up():
            raise
        save_json(folder / "record.json", dataclasses.asdict(record))


def ended_record(store: Store, record: StreamRecord) -> StreamRecord:
    """A record that ends now, with what is promised of its video."""
    folder = stream_folder(store, record.id)
    video = video_path(folder)
    files = promised(folder, [video]) if video.exists() else {}
    return dataclasses.replace(record, ended=time.time(), files=files, bytes=folder_bytes(folder))


def read_records(store: Store) -> list[StreamRecord]:
    """All streams of a store, the oldest first; what is none is set aside, and said in the log."""
    found = []
    for folder in sorted(store.streams.iterdir()):
        try:
            if not is_id("stream", folder.name):
                raise ValueError("no stream has this name")
            fields = json.loads((folder / "record.json").read_text(encoding="utf-8"))
            record = StreamRecord(**fields)
            if record.id != folder.name:
                raise ValueError(f"the record is of {record.id}")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            if (
                folder.is_dir()
                and not (folder / "record.json").exists()
                and not any(folder.glob("engine/blocks/*"))
            ):
                store.discard(folder)  # it was never answered for
                continue
            place = store.set_aside(folder, folder.name)
            log.warning(
                "the stream in %s has no readable record (%s): it was set aside, to %s",
                folder,
                type(error).__name__,
                place,
            )
            continue
        found.append(record)
    return sorted(found, key=lambda record: record.created)
