"""Who wants to know what the service does: metrics, logs and traces implement this."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from mv2v_engine.serving.store.records import JobRecord, SessionRecord
from mv2v_engine.serving.store.streams import StreamRecord


class Listener:
    """Called on the service's event loop, after the fact is in the database; must not block.

    Every method does nothing here, so that one overrides what one needs.
    """

    def job_queued(self, job: JobRecord) -> None:
        """A turn was asked for, or was put back into the queue."""

    def job_started(self, job: JobRecord) -> None:
        """A turn is begun: job.started - job.created seconds after it was asked for."""

    def job_event(self, job: JobRecord, event: dict[str, Any]) -> None:
        """A stage, a step or a window of a running job (`backend` lists them)."""

    def job_ended(self, job: JobRecord, report: dict[str, Any] | None) -> None:
        """It finished, failed or was cancelled. report: the turn's, if there is one."""

    def session_created(self, session: SessionRecord) -> None:
        """A video was uploaded, or a session branched."""

    def session_deleted(self, session_id: str) -> None:
        """A session is gone: deleted by its owner or by retention."""

    def stream_created(self, stream: StreamRecord) -> None:
        """A stream was begun."""

    def stream_block(self, stream: StreamRecord, frames: int, seconds: float) -> None:
        """A block of so many frames is in a stream's video, so long after it was asked for."""

    def stream_ended(self, stream: StreamRecord) -> None:
        """It finished, failed or was cancelled."""

    def stream_deleted(self, stream: StreamRecord) -> None:
        """It is gone: deleted by its owner or by retention."""

    def worker_restarted(self, reason: str) -> None:
        """The worker ended and is started again."""


class Caught:
    """A block whose error, whatever it is, ends there and is kept in `error`."""

    error: Exception | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self.error = error if isinstance(error, Exception) else None
        return self.error is not None
