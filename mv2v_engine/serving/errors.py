"""What the service refuses and how a job fails: one table of codes, one shape on the wire.

`{"error": {"message", "type", "param", "code", "request_id"}}`, as OpenAI's clients read it. A code
has one HTTP status; those that only jobs have are never an answer's own and carry none.
"""

from __future__ import annotations

import errno
import functools
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mv2v_engine.config import EngineConfig
from mv2v_engine.errors import (
    CameraError,
    InUseError,
    MemoryBudgetError,
    MV2VError,
    NotFiniteError,
    RequestError,
    StorageError,
    VideoError,
)
from mv2v_engine.serving.config import ServingConfig
from mv2v_engine.settings import flags, in_options

INVALID, AUTHENTICATION, RATE, SERVER = (
    "invalid_request_error",
    "authentication_error",
    "rate_limit_error",
    "server_error",
)


# an absolute path, in quotes with spaces and all, else up to the first of them
_PATH = re.compile(
    r"(?<=['\"])/(?:[^/'\"\n]+/)*(?P<quoted>[^/'\"\n]*)(?=['\"])"
    r"|(?<![\w.:/<])/(?:[^/\s'\"]+/)+(?P<last>[^/\s'\":;,]*)"
)


# what only who sees the folders can do
_OTHER_PLACE = re.compile(
    r"(?<=; )(?:[^;]*choose another (?:folder|place)|restore (?:it|the file|the folder))[^;]*"
)


@dataclass(frozen=True, slots=True)
class Kind:
    """What a code stands for. status: of the HTTP answer, None if only jobs fail with it."""

    status: int | None
    type: str
    meaning: str


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "malformed_request": Kind(400, INVALID, "no readable HTTP, JSON or multipart body"),
        "not_made_here": Kind(
            400, INVALID, "the model makes no video of this size, length or name"
        ),
        "wrong_host": Kind(400, INVALID, "the Host header names another host than the service's"),
        "wrong_origin": Kind(403, INVALID, "the request comes from another site's page"),
        "authentication_required": Kind(401, AUTHENTICATION, "no bearer token, or a wrong one"),
        "request_timeout": Kind(408, INVALID, "the header or the body stopped coming"),
        "not_found": Kind(404, INVALID, "no such route, session, turn, job or file for this token"),
        "method_not_allowed": Kind(405, INVALID, "the route has other methods"),
        "busy": Kind(409, INVALID, "the state of the session or the job does not allow this"),
        "edit_conflict": Kind(409, INVALID, "somebody else has changed it meanwhile"),
        "idempotency_conflict": Kind(409, INVALID, "the Idempotency-Key came with another request"),
        "not_finished": Kind(409, INVALID, "the turn has no result yet, or will have none"),
        "damaged": Kind(410, SERVER, "the files are not those recorded, and cannot be made again"),
        "too_large": Kind(413, INVALID, "the body or the file has too many bytes"),
        "unsupported_media": Kind(415, INVALID, "the body is of another content type"),
        "range_not_satisfiable": Kind(416, INVALID, "the byte range lies outside the file"),
        "invalid_request": Kind(422, INVALID, "a field is missing, unknown, or out of range"),
        "unreadable_video": Kind(422, INVALID, "the file is no video, or a damaged one"),
        "video_too_long": Kind(422, INVALID, "the video lasts too many seconds"),
        "too_many_frames": Kind(422, INVALID, "the video has too many frames"),
        "too_many_pixels": Kind(422, INVALID, "the frames of the video are too large"),
        "video_out_of_range": Kind(
            422, INVALID, "the rate or the shape of the frames is not taken"
        ),
        "video_too_slow": Kind(422, INVALID, "decoding the video takes too long or too much"),
        "unprocessable_turn": Kind(
            422, INVALID, "the model or the session cannot do this turn or stream"
        ),
        "host_not_allowed": Kind(422, INVALID, "the service may not ask the host of this URL"),
        "not_fetched": Kind(422, INVALID, "the URL gave no file, or not in time"),
        "too_many_sessions": Kind(429, RATE, "there are as many sessions as one token may have"),
        "too_many_uploads": Kind(429, RATE, "as many uploads are under way as one token may have"),
        "too_many_streams": Kind(429, RATE, "as many streams are made as may be at once"),
        "stream_limit": Kind(
            429, RATE, "the token's streams have as many seconds of video as it may keep"
        ),
        "too_many_connections": Kind(503, SERVER, "as many connections are busy as may be open"),
        "queue_full": Kind(429, RATE, "as many turns wait as may; Retry-After says for how long"),
        "internal": Kind(500, SERVER, "a fault of the service"),
        "not_ready": Kind(503, SERVER, "the service is starting or stopping, or has no worker"),
        "disk_full": Kind(507, SERVER, "the disk has no room for another upload"),
        "cancelled": Kind(None, INVALID, "the turn was cancelled; the session is as before"),
        "worker_crashed": Kind(None, SERVER, "the process that rendered the turn died"),
        "out_of_memory": Kind(None, SERVER, "the device or the host has too little memory"),
        "not_finite": Kind(None, SERVER, "the model computed NaN or infinity; nothing was kept"),
        "unread": Kind(None, INVALID, "the stream waited too long for a reader, or for frames"),
        "timeout": Kind(None, SERVER, "the turn hung: its worker said nothing for too long"),
    }
)


@functools.cache
def _settings() -> tuple[dict[str, str], dict[str, str]]:
    """What a client calls settings, by their names: fields of requests; options of the service."""
    from mv2v_engine.serving.http.schemas import SourceChoices, TurnRequest

    own = SourceChoices.model_fields | TurnRequest.model_fields
    fields, options = {}, {}
    for name, option in (flags(EngineConfig) | flags(ServingConfig)).items():
        word = option.removeprefix("--").replace("-", "_")
        if word in own:
            fields[name] = word
        else:
            options[name] = option
    return fields, options


def client_words(message: str) -> str:
    """An error of the engine as a client may read it.

    Of a path on the server it has the last part, of a setting the field of the request, or the
    option that the service would have to be started with, and of what only a caller of the library
    can do, who could do that here.
    """
    message = _OTHER_PLACE.sub("whoever runs the service can restore it", message)
    fields, options = _settings()
    message = in_options(message, fields)
    told = in_options(message, options)
    if told != message:
        message = f"{told}; options with -- are set by whoever runs the service"
    return _PATH.sub(lambda found: found["last"] or found["quoted"] or "a folder", message)


class ApiError(Exception):
    """An answer other than success. code: of `KINDS`, which gives its status and type.

    param: the field of the request that is at fault, if one is. headers: of the answer.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param
        self.headers = dict(headers or {})

    @property
    def status(self) -> int:
        status = KINDS[self.code].status
        assert status is not None, f"{self.code} is for jobs alone"
        return status

    @property
    def type(self) -> str:
        return KINDS[self.code].type

    def to_dict(self, request_id: str | None = None) -> dict[str, Any]:
        """The body of the answer to a request; None before there is one."""
        return error_body(self.code, self.message, self.param, request_id)


def error_body(
    code: str, message: str, param: str | None = None, request_id: str | None = None
) -> dict[str, Any]:
    """An error in the shape that OpenAI's clients read, with the id that the log has it under."""
    fields = {"message": message, "type": KINDS[code].type, "param": param, "code": code}
    return {"error": fields | {"request_id": request_id}}


# what an error of the engine is to a job, the first that it is an instance of; else `internal`
_CODES: tuple[tuple[type[MV2VError], str], ...] = (
    (MemoryBudgetError, "out_of_memory"),
    (NotFiniteError, "not_finite"),
    (RequestError, "unprocessable_turn"),
    (CameraError, "unprocessable_turn"),
    (VideoError, "unprocessable_turn"),
    (InUseError, "busy"),
)
# what the system calls a full disk
FULL = (errno.ENOSPC, errno.EDQUOT)


def failure(error: MV2VError) -> dict[str, Any]:
    """What an error of the engine makes of a job: its last event."""
    message = str(error)
    code = next((code for kind, code in _CODES if isinstance(error, kind)), "internal")
    cause = error.__cause__
    if isinstance(error, InUseError):
        message = (
            f"the session is in use: {error.holder} writes into its folder; ask again once that "
            "has ended"
        )
    elif isinstance(error, StorageError) and isinstance(cause, OSError) and cause.errno in FULL:
        code = "disk_full"
        message = _OTHER_PLACE.sub("delete sessions, and ask for the turn again", message)
    return failed(code, message)


def failed(code: str, message: str) -> dict[str, Any]:
    """The last event of a job without a turn."""
    return {"type": "failed", "code": code, "message": message}


def queue_full(seconds: float, waiting: int, whose: str = "") -> ApiError:
    """Refuse a turn for now. seconds: after which it may be worth another try."""
    wait = max(1, round(seconds))
    return ApiError(
        "queue_full",
        f"{waiting} turns{whose} are waiting and no more may; try again in {wait} s",
        headers={"Retry-After": str(wait)},
    )


@contextmanager
def disk_errors() -> Iterator[None]:
    """A full disk as disk_full, whoever found out."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "full" not in str(error):
            raise
        raise _disk_full() from error
    except OSError as error:
        cause = error.__cause__ if isinstance(error, StorageError) else error
        if not isinstance(cause, OSError) or cause.errno not in FULL:
            raise
        raise _disk_full() from error


@contextmanager
def full_disk(root: Path) -> Iterator[None]:
    """What a full disk does to a start, as one error."""
    try:
        with disk_errors():
            yield
    except StorageError:
        raise
    except (ApiError, sqlite3.OperationalError, OSError) as error:
        raise StorageError(
            f"the disk of the store {root} is full, or fails ({error}); make a few MB of room and "
            "start again"
        ) from error


def _disk_full() -> ApiError:
    return ApiError("disk_full", "the store's disk is full; delete sessions, or make room")
