"""Logs as JSON lines on stderr: time, level, event, session, job, and the event's own fields.

An event is a constant name and its fields are numbers, ids and names of ours: no prompt, no file
name, no token and no message of an exception, which may quote any of them, gets into a line. What
is logged in words keeps them: this package's own, which quote no user, and from warnings on those
of libraries.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timezone
from types import MappingProxyType
from typing import Any

from mv2v_engine.serving.store.records import JobRecord, SessionRecord
from mv2v_engine.serving.store.streams import StreamRecord
from mv2v_engine.serving.watch.listener import Listener

_OWN = logging.getLogger("mv2v_engine.serving")
_NONE: Mapping[str, str] = MappingProxyType({})
_IDS: ContextVar[Mapping[str, str]] = ContextVar("ids", default=_NONE)
_ID_IN_TEXT = re.compile(r"(?<![0-9a-z_])(session|job|stream)_[0-9a-f]{24}(?![0-9a-f])")
# asked every few seconds by whoever watches the service
_PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
_PATH_LENGTH = 200


@contextmanager
def log_ids(
    *,
    session: str | None = None,
    job: str | None = None,
    stream: str | None = None,
    request: str | None = None,
) -> Iterator[None]:
    """Every line that this thread or task logs in the block carries the ids that are given."""
    given = {"session": session, "job": job, "stream": stream, "request": request}
    token = _IDS.set({**_IDS.get(), **{name: id for name, id in given.items() if id is not None}})
    try:
        yield
    finally:
        _IDS.reset(token)


def log_event(
    event: str,
    *,
    level: int = logging.INFO,
    error: BaseException | None = None,
    **fields: str | float | None,
) -> None:
    """Write a line. event: a constant such as "job_finished". error: its type and place only."""
    _OWN.log(level, event, exc_info=error, extra={"fields": fields})


def configure_logs(level: int = logging.INFO) -> None:
    """Make JSON lines on stderr of everything that this process logs, uvicorn included.

    level: the lowest that is written; under DEBUG successful probes are written too.

    uvicorn is to be started with `log_config=None`, or it makes loggers of its own.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    handler.addFilter(_is_wanted)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)
    for name in (_OWN.name, "uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(level)


class LogListener(Listener):
    """Writes a line for whatever happens to sessions, jobs and the worker; none for steps."""

    def job_queued(self, job: JobRecord) -> None:
        log_event("job_queued", session=job.session, job=job.id, attempts=job.attempts)

    def job_started(self, job: JobRecord) -> None:
        log_event(
            "job_started",
            session=job.session,
            job=job.id,
            turn=job.number,
            attempts=job.attempts,
        )

    def job_ended(self, job: JobRecord, report: dict[str, Any] | None) -> None:
        seconds = None
        if job.started is not None and job.ended is not None:
            seconds = round(job.ended - job.started, 3)
        log_event(
            "job_ended",
            level=logging.ERROR if job.state == "failed" else logging.INFO,
            session=job.session,
            job=job.id,
            outcome=job.state,
            code=job.error["code"] if job.error else None,
            turn=job.number,
            seconds=seconds,
        )

    def session_created(self, session: SessionRecord) -> None:
        log_event(
            "session_created",
            session=session.id,
            kind=session.kind,
            frames=session.frames,
            width=session.width,
            height=session.height,
            bytes=session.bytes,
        )

    def session_deleted(self, session_id: str) -> None:
        log_event("session_deleted", session=session_id)

    def stream_created(self, stream: StreamRecord) -> None:
        log_event("stream_created", stream=stream.id, blocks=stream.blocks, policy=stream.policy)

    def stream_ended(self, stream: StreamRecord) -> None:
        log_event(
            "stream_ended",
            level=logging.ERROR if stream.state == "failed" else logging.INFO,
            stream=stream.id,
            outcome=stream.state,
            code=stream.error["code"] if stream.error else None,
            bytes=stream.bytes,
            restarts=stream.restarts,
        )

    def stream_deleted(self, stream: StreamRecord) -> None:
        log_event("stream_deleted", stream=stream.id)

    def worker_restarted(self, reason: str) -> None:
        log_event("worker_restarted", level=logging.ERROR, reason=reason)


class JsonLines(logging.Formatter):
    """One JSON object a record, on one line."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, timezone.utc)
        line: dict[str, Any] = {
            "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
        }
        own = getattr(record, "fields", None)
        if own is not None:
            fields = {"event": record.getMessage(), **_IDS.get(), **own}
        elif record.name == "uvicorn.access":
            fields = _request_fields(record)
        else:
            words = record.getMessage()
            fields = {"event": "message", **_IDS.get(), **_ids_in(words)}
            fields |= {"logger": record.name, "message": words}
        if record.exc_info is not None and record.exc_info[1] is not None:
            fields["error"] = _described(record.exc_info[1])
        return json.dumps(line | fields, ensure_ascii=True, default=str)


def _is_wanted(record: logging.LogRecord) -> bool:
    """Whether a line is worth writing. A probe's is of level debug, whatever was answered."""
    if record.name != "uvicorn.access" or record.levelno > logging.INFO:
        return True
    if _request_fields(record)["path"] in _PROBES:
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
    return record.levelno >= logging.getLogger(record.name).getEffectiveLevel()


def _request_fields(record: logging.LogRecord) -> dict[str, Any]:
    """What uvicorn's access log says, without the query, and with the ids that the path names."""
    assert isinstance(record.args, tuple)
    client, method, target, _, status = record.args
    path = str(target).partition("?")[0]
    return {
        "event": "request",
        **_IDS.get(),
        **_ids_in(path),
        "method": method,
        "path": path[:_PATH_LENGTH],
        "status": status,
        "client": client,
    }


def _ids_in(text: str) -> dict[str, str]:
    """The session and the job that a text names."""
    return {found[1]: found[0] for found in _ID_IN_TEXT.finditer(text)}


def _described(error: BaseException) -> list[dict[str, Any]]:
    """An exception and its causes, newest first: types and places, without their words."""
    chain: list[dict[str, Any]] = []
    seen: set[int] = set()
    next_one: BaseException | None = error
    while next_one is not None and id(next_one) not in seen:
        seen.add(id(next_one))
        frames = traceback.extract_tb(next_one.__traceback__)
        places = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        chain.append({"type": type(next_one).__name__, "at": places})
        hidden = next_one.__suppress_context__
        next_one = next_one.__cause__ or (None if hidden else next_one.__context__)
    return chain
