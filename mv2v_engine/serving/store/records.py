"""What the service keeps: sessions, turns and jobs, as its database holds them.

Times are unix seconds. `owner` is the SHA-256 of the bearer token, "" without tokens.
"""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from mv2v_engine.config import Alpha, Fit

Kind = Literal["views", "edits"]
JobState = Literal["queued", "running", "finished", "failed", "cancelled"]
TurnFile = Literal["video", "thumbnail"]
Record = TypeVar("Record")

ENDED: frozenset[JobState] = frozenset({"finished", "failed", "cancelled"})
# event types that end a job, and its stream of events
LAST_EVENTS = frozenset({"finished", "failed", "cancelled"})
# the event that is a picture: the next one takes its place
PREVIEW = "preview"
# what a session was made of, by the path in its folder: the video, images under a number, a mask
SOURCE, REFERENCES, MASK = "source", "references", "mask"

_ID = {kind: re.compile(rf"{kind}_[0-9a-f]{{24}}") for kind in ("session", "job", "stream")}


def new_id(kind: Literal["session", "job", "stream"]) -> str:
    """A name that nobody can guess, and that is a safe file name."""
    return f"{kind}_{secrets.token_hex(12)}"


def is_id(kind: Literal["session", "job", "stream"], text: str) -> bool:
    """Whether a name from outside is one that `new_id` could have given."""
    return _ID[kind].fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class ProbedVideo:
    """What an upload was found to be. seconds: its duration. notes: what is changed of it."""

    frames: int
    width: int
    height: int
    fps: float
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Uploads:
    """Files that came for a session: its video, and what its edits are given beside it.

    references: images, in the order in which the model sees them. mask: a video or an image.
    """

    video: Path
    references: tuple[Path, ...] = ()
    mask: Path | None = None

    def named(self) -> dict[str, Path]:
        """Every file by its path in the session's folder, the video first."""
        found = {SOURCE: self.video}
        found |= {f"{REFERENCES}/{n:02d}": path for n, path in enumerate(self.references, 1)}
        return found if self.mask is None else found | {MASK: self.mask}

    def remove(self) -> None:
        """Remove those that are still there."""
        for path in self.named().values():
            path.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """How a session's video is read, as its user chose; None is the service's own way.

    window: which frames the model is given, as `video.transforms.select_window` names them.
    fps: the rate that the video is taken for. alpha, fit: as in `EngineConfig`. size: of the turns,
    WIDTHxHEIGHT as OpenAI's clients write it.
    """

    window: str | None = None
    fps: float | None = None
    alpha: Alpha | None = None
    fit: Fit | None = None
    size: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionRecord:
    """One source and its turns.

    kind: "views" takes cameras, "edits" instructions. name: for people, never a path.
    frames, width, height: of the uploaded video. fps: of its turns. bytes: of the upload and all
        turns.
    parent, parent_turn: the session and turn that this one branched from.
    warnings: what the user should know of the source, such as frames that the model does not see.
    window: which part of the video it is about, as its user chose; None if nobody chose one.
    asked_fps: the rate that its user chose; None is the video's own. alpha, fit, size: how its
        video is read, whatever the service is told later; None in sessions of before there was a
        choice.
    files: what is promised of the uploads (`digests`). identity: what the engine's manifest says of
        the session, once it has a turn. damage: why it takes no more turns, if it was damaged.
    notes, is_favourite: what its user says of it. edited: when its user last did.
    """

    id: str
    owner: str = field(repr=False)
    kind: Kind
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
    parent: str | None = None
    parent_turn: int | None = None
    warnings: tuple[str, ...] = ()
    window: str | None = None
    asked_fps: float | None = None
    alpha: Alpha | None = None
    fit: Fit | None = None
    size: str | None = None
    files: dict[str, Any] = field(default_factory=dict, repr=False)
    identity: dict[str, Any] | None = field(default=None, repr=False)
    damage: str | None = None
    notes: str = ""
    is_favourite: bool = False
    edited: float | None = None

    @property
    def uploads(self) -> tuple[str, ...]:
        """Paths in the folder of what the session was made of, the video's first."""
        return (SOURCE, *sorted(self.files.keys() - {SOURCE}))

    @property
    def references(self) -> tuple[str, ...]:
        """Paths in the folder of the images that its edits refer to, in order."""
        return tuple(name for name in self.uploads if name.startswith(f"{REFERENCES}/"))

    @property
    def num_references(self) -> int:
        return len(self.references)

    @property
    def has_mask(self) -> bool:
        """Whether its edits have a mask."""
        return MASK in self.files


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnRecord:
    """One finished turn.

    number: from 1. job: that made it; None in a branch, whose turns another session's jobs made.
    request: as it was asked. report: as the engine gave it. bytes: of its files.
    is_published: whether its mp4 and thumbnail are written; if not, they are made again soon.
    files: what is promised of them (`digests`). entry: its row of the engine's manifest, without
        the report. damage: what is lost of it, if its latents are.
    name, notes, is_favourite, edited: as of a session. deleted: when it was; the number is taken.
    forgotten: numbers of the turns that it remembered and that were deleted since.
    """

    session: str
    number: int
    job: str | None
    request: dict[str, Any]
    report: dict[str, Any]
    created: float
    bytes: int
    is_published: bool
    files: dict[str, Any] = field(default_factory=dict, repr=False)
    entry: dict[str, Any] | None = field(default=None, repr=False)
    damage: str | None = None
    name: str = ""
    notes: str = ""
    is_favourite: bool = False
    edited: float | None = None
    deleted: float | None = None
    forgotten: tuple[int, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was changed of its camera or of an edited video, its sound among it, and what
        the model does not know of what was asked."""
        report = self.report
        changed = (*report.get("notes", ()), *report.get("source", {}).get("notes", ()))
        return (*changed, *report.get("warnings", ()))


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRecord:
    """One turn that was asked for.

    request: camera (text or a trajectory's JSON) or prompt, and what else was set of seed,
        num_inference_steps, guidance_scale, memory and previews.
    number: the turn's, once it is known. attempts: how often it was begun.
    error: {"code", "message"} of a job that failed or was cancelled.
    progress: the last event. position: in the queue, from 1, while it waits.
    """

    id: str
    session: str
    owner: str = field(repr=False)
    state: JobState
    request: dict[str, Any]
    number: int | None
    created: float
    started: float | None = None
    ended: float | None = None
    attempts: int = 0
    error: dict[str, str] | None = None
    progress: dict[str, Any] | None = None
    position: int | None = None
    is_cancelling: bool = False

    @property
    def is_ended(self) -> bool:
        return self.state in ENDED

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was changed of its camera, such as that it was resampled."""
        camera = self.request.get("camera")
        return tuple(camera.get("notes", ())) if isinstance(camera, dict) else ()


def new_job(session: SessionRecord, request: dict[str, Any]) -> JobRecord:
    """A turn that is asked for."""
    return JobRecord(
        id=new_id("job"),
        session=session.id,
        owner=session.owner,
        state="queued",
        request=request,
        number=None,
        created=time.time(),
    )


@dataclass(frozen=True, slots=True)
class JobEvent:
    """Something that happened to a job. number: increases; kind: is data["type"]."""

    number: int
    kind: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Page(Generic[Record]):
    """A part of a list. has_more: whether records follow the last of these."""

    items: tuple[Record, ...]
    has_more: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """What a session takes.

    disk_bytes: of its files. memory_bytes: of its latents in the engine's memory.
    next_turn_tokens: by kind, of a turn with the last one's camera; None until the worker has made
        a turn in it, or once it has let go of it.
    """

    disk_bytes: int
    memory_bytes: int
    next_turn_tokens: dict[str, int] | None
