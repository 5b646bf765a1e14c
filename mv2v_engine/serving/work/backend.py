"""What makes turns, behind one protocol: a worker process here, or replicas, here or elsewhere.

Events of a job are JSON objects, told apart by "type":

    {"type": "started", "number"}                        the turn's number, before any work
    {"type": "stage_started", "stage"}  {"type": "stage_done", "stage", "seconds"}
    {"type": "step_done", "stage", "step", "total", "seconds_left"}
    {"type": "preview", "step", "total", "image"}        a data URL, if the request says previews
    {"type": "window_started", "number", "total"}
    {"type": "window_done", "number", "total", "seconds_left"}
    {"type": "done", "number", "report", "bytes", "published", "memory"}            the last one,
    {"type": "failed", "code", "message"}   {"type": "cancelled"}                   or these

A turn that is begun again elsewhere has its events again, from "started" on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Protocol

from mv2v_engine.serving.store.records import JobRecord, SessionRecord
from mv2v_engine.serving.store.streams import StreamRecord

# codes of what is not done because the process that did it is gone
WORKER_GONE = ("worker_crashed", "timeout")
# the events that end a turn
LAST_OF_BACKEND = frozenset({"done", "failed", "cancelled"})


class Backend(Protocol):
    """Makes turns in sessions' folders; knows nothing of owners, queues or the database."""

    @property
    def ready(self) -> bool:
        """Whether turns can be made now, after loading and warm-up."""

    @property
    def reason(self) -> str:
        """Why not, while it is not ready."""

    @property
    def is_lost(self) -> bool:
        """Whether it will not be ready again by itself; a turn that it is given fails at once."""

    @property
    def refusal(self) -> str:
        """Why what was asked for can never be had, before it ever was; empty otherwise."""

    @property
    def about(self) -> dict[str, Any] | None:
        """What the engine said when it was first ready; None before.

        {"kind": "views" | "edits" | "streams", "engine": Engine.describe(), "has_text": whether
        prompts can be read, "guides": {"references", "mask"}, which of them edits are given beside
        the video, "stream": None, or of a model that streams {"settings", "block_frames":
        pixel frames of a block, "lead": by how many the first one has fewer, "has_source": whether
        it edits frames that are sent, "refused": why not, by policy}, "memory": the default
        mode, "presets": names of cameras, "sampling": {"num_frames", "size": [height, width],
        "fps", "num_inference_steps", "guidance_scale"}}
        """

    @property
    def capacity(self) -> int:
        """Turns that it makes at once, of different sessions."""

    @property
    def restarts(self) -> int:
        """How often a worker was started again."""

    def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` on the event loop whenever ready, about or restarts have changed."""

    async def start(self) -> None:
        """Begin to load; returns before it is ready."""

    async def stop(self, grace: float) -> None:
        """End within `grace` seconds; jobs that still run then end as `cancelled` or crashed."""

    def run(
        self, job: JobRecord, session: SessionRecord, folder: Path
    ) -> AsyncIterator[dict[str, Any]]:
        """Make a job's turn, or only its files if the folder has the turn already.

        folder: the session's. The iterator always ends with one of the last events.
        """

    def cancel(self, job_id: str) -> None:
        """End a running job, or a stream's block, at its next step; nothing if there is none."""

    async def publish(self, session: SessionRecord, folder: Path, number: int) -> dict[str, Any]:
        """Write a finished turn's mp4 and thumbnail again.

        Returns:
            {"type": "published", "bytes": of the turn's files} or {"type": "failed", ...}.
        """

    async def block(self, record: StreamRecord, folder: Path, number: int) -> dict[str, Any]:
        """Make a stream's next block, at most one of a stream at a time; `cancel` ends it.

        folder: the stream's.

        Returns:
            {"type": "block", "number", "end": bytes of the video with it, "seconds": of its
            making}, {"type": "failed", ...} or {"type": "cancelled"}.
        """

    async def check(self, prompt: str) -> dict[str, Any]:
        """Whether a stream can have a prompt: {"type": "checked"} or {"type": "failed", ...}."""

    async def release(self, session_id: str) -> None:
        """Let go of a session's, or a stream's, memory and files; returns when that is done."""
