"""What the service's API answers: its objects, events and refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from mv2v_engine.errors import MV2VError


class ServiceError(MV2VError):
    """The service refused a request, or a job has failed.

    code: one of the service's codes. status: of the HTTP answer, None of a job. param: the field of
    the request that is at fault. retry_after: seconds after which the service may be asked again.
    request_id: by which the service's log tells of the request.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        status: int | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.status, self.param = code, message, status, param
        self.retry_after, self.request_id = retry_after, request_id


class UnreachableError(MV2VError):
    """No answer came from the service."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """A source video and its turns; times are unix seconds, sizes pixels and bytes.

    footprint: what the session takes, where one session was asked for.
    """

    id: str
    kind: str
    name: str
    checkpoint: str
    frames: int
    width: int
    height: int
    fps: float
    created: float
    touched: float
    bytes: int
    num_turns: int
    parent: str | None
    parent_turn: int | None
    warnings: list[str]
    damage: str | None
    num_references: int = 0
    has_mask: bool = False
    footprint: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A finished turn. report: what was remembered, tokens, seconds and bytes."""

    session: str
    number: int
    job: str | None
    request: dict[str, Any]
    report: dict[str, Any]
    created: float
    bytes: int
    warnings: list[str]
    damage: str | None


@dataclass(frozen=True, kw_only=True)
class Job:
    """A turn that was asked for. number: the turn's. progress: the last event's data."""

    id: str
    session: str
    state: Literal["queued", "running", "finished", "failed", "cancelled"]
    request: dict[str, Any]
    number: int | None
    created: float
    started: float | None
    ended: float | None
    attempts: int
    error: dict[str, str] | None
    progress: dict[str, Any] | None
    position: int | None
    is_cancelling: bool
    warnings: list[str]


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A stream. blocks: finished ones; num_blocks: after which it ends, None if it goes on."""

    id: str
    checkpoint: str
    state: str
    waits_for: str | None
    prompt: str
    seed: int
    num_blocks: int | None
    blocks: int
    frames: int
    seconds: float
    fps: float
    width: int
    height: int
    error: dict[str, str] | None
    latency: dict[str, float] | None


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the service runs. sampling: the defaults of a turn. limits: of an upload.

    guides: whether edits take "references", and a "mask".
    """

    id: str
    kind: str
    has_text: bool
    memory: str
    presets: list[str]
    sampling: dict[str, Any]
    limits: dict[str, Any]
    guides: dict[str, bool] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """What has happened to a job. number: increases. data: as docs/serving.md lists it by kind."""

    number: int
    kind: str
    data: dict[str, Any]


Answer = TypeVar("Answer", Session, Turn, Job, Stream, Model)


def read(kind: type[Answer], body: Mapping[str, Any]) -> Answer:
    """What an answer holds; fields of a newer service are left out."""
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in body.items() if name in known})
