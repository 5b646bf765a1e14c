"""The service without HTTP: what routes call. Owners come first, and refusals are `ApiError`s.

A session of another owner does not exist. The methods can be called from one event loop; SQLite
and files are worked on by other threads.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from mv2v_engine.serving.backend import Backend
from mv2v_engine.serving.config import Limits, ServingConfig
from mv2v_engine.serving.listener import Listener
from mv2v_engine.serving.records import (
    Footprint,
    JobEvent,
    JobRecord,
    Page,
    ProbedVideo,
    SessionRecord,
    TurnFile,
    TurnRecord,
)

# decodes an upload within the limits; raises ApiError with the limit's own code
Probe = Callable[[Path, Limits], Awaitable[ProbedVideo]]


class Service:
    """One store, one backend. Its methods raise `ApiError` with the code that its docstring names.

    config: as given. listeners: told of everything that happens (see `Listener`).
    """

    def __init__(
        self,
        config: ServingConfig,
        backend: Backend,
        probe: Probe,
        listeners: Sequence[Listener] = (),
    ) -> None:
        raise NotImplementedError

    async def start(self) -> None:
        """Lock the store, recover what a kill left behind, and begin to load the engine.

        Raises:
            StorageError: another service runs on the store, or it cannot be written.
        """
        raise NotImplementedError

    async def stop(self) -> None:
        """Take no more turns, give the one under way its grace, then put it back in the queue."""
        raise NotImplementedError

    @property
    def ready(self) -> bool:
        """Whether turns are made: the engine is warm and the service is not stopping."""
        raise NotImplementedError

    @property
    def reason(self) -> str:
        """Why it is not ready, in words."""
        raise NotImplementedError

    @property
    def about(self) -> dict[str, Any] | None:
        """What the engine is, as `Backend.about`; None until it was ready once."""
        raise NotImplementedError

    @property
    def queue_depth(self) -> int:
        """Turns that wait."""
        raise NotImplementedError

    @property
    def num_running(self) -> int:
        """Turns that are being made."""
        raise NotImplementedError

    def require_about(self) -> dict[str, Any]:
        """As `about`. Raises not_ready with Retry-After before the engine was ready once."""
        raise NotImplementedError

    async def upload_path(self) -> Path:
        """A new path in the store's uploads folder, for a body to be streamed to.

        Raises disk_full below `min_free_bytes`. What lies there is removed at the next start.
        """
        raise NotImplementedError

    async def create_session(
        self, owner: str, upload: Path, name: str, *, key: str | None = None
    ) -> SessionRecord:
        """Make a session of an uploaded video, which is moved into it, or removed on a refusal.

        key: of idempotency; the same key and file give the same session again.

        Raises not_ready, disk_full, too_many_sessions, the probe's codes, idempotency_conflict.
        """
        raise NotImplementedError

    async def sessions(
        self, owner: str, *, limit: int = 20, after: str | None = None, is_newest_first: bool = True
    ) -> Page[SessionRecord]:
        """Sessions in order of creation, those behind `after`. Raises not_found: no such `after`."""
        raise NotImplementedError

    async def session(self, owner: str, session_id: str) -> SessionRecord:
        """Raises not_found."""
        raise NotImplementedError

    async def source(self, owner: str, session_id: str) -> Path:
        """The uploaded file. Raises not_found."""
        raise NotImplementedError

    async def turns(self, owner: str, session_id: str) -> tuple[TurnRecord, ...]:
        """Finished turns in order. Raises not_found."""
        raise NotImplementedError

    async def turn(self, owner: str, session_id: str, number: int) -> TurnRecord:
        """Raises not_found."""
        raise NotImplementedError

    async def turn_file(self, owner: str, session_id: str, number: int, which: TurnFile) -> Path:
        """A turn's mp4 or thumbnail.

        Raises not_found; not_finished with Retry-After while the file is made again after a crash.
        """
        raise NotImplementedError

    async def footprint(self, owner: str, session_id: str) -> Footprint:
        """Raises not_found."""
        raise NotImplementedError

    async def delete_session(self, owner: str, session_id: str) -> None:
        """Cancel its jobs, wait until the worker has let go, remove everything.

        It does not exist for anybody from the beginning of the call on. Raises not_found.
        """
        raise NotImplementedError

    async def branch(self, owner: str, session_id: str, number: int) -> SessionRecord:
        """A new session of the same source with turns 1 to `number` (0: none).

        A session of edits branches with number 0 alone, for its turns do not build on each other.

        Raises not_found, invalid_request, disk_full, too_many_sessions.
        """
        raise NotImplementedError

    async def export(self, owner: str, session_id: str) -> Path:
        """A zip of the session's videos, thumbnails and reports; the caller removes it.

        Raises not_found, disk_full.
        """
        raise NotImplementedError

    async def submit(
        self, owner: str, session_id: str, request: dict[str, Any], *, key: str | None = None
    ) -> tuple[JobRecord, bool]:
        """Ask for a turn.

        request: "camera" (a preset, a move, or a trajectory's JSON) or "prompt", and of "seed",
            "num_inference_steps", "guidance_scale", "memory" those that were set.
        key: of idempotency; the same key and request give the same job again.

        Returns:
            the job, and whether it is new.

        Raises not_found, not_ready, unprocessable_turn, queue_full, idempotency_conflict.
        """
        raise NotImplementedError

    async def job(self, owner: str, job_id: str) -> JobRecord:
        """With its newest progress and its position. Raises not_found."""
        raise NotImplementedError

    async def jobs(
        self,
        owner: str,
        *,
        session: str | None = None,
        limit: int = 20,
        after: str | None = None,
        is_newest_first: bool = True,
    ) -> Page[JobRecord]:
        """Jobs in order of creation, of one session or of all. Raises not_found."""
        raise NotImplementedError

    async def cancel(self, owner: str, job_id: str) -> JobRecord:
        """Cancel a job that waits at once, one that runs at its next step; nothing if it ended.

        Returns the job as it is then. Raises not_found.
        """
        raise NotImplementedError

    async def events(self, owner: str, job_id: str, *, after: int = 0) -> AsyncIterator[JobEvent]:
        """A job's events behind number `after`, then as they happen, to the job's end.

        Raises not_found when it is awaited, before the first event. A reader that leaves changes
        nothing.
        """
        raise NotImplementedError
