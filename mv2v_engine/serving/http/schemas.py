"""What goes over the wire: requests and answers as pydantic models, with an example of each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)

from mv2v_engine.config import MAX_GUIDANCE_SCALE, MAX_STEPS, Alpha, Fit, MemoryMode
from mv2v_engine.serving.errors import KINDS, error_body
from mv2v_engine.serving.store.records import Choices
from mv2v_engine.serving.store.records import Kind as SessionKind
from mv2v_engine.video.scan import MAX_FPS, MIN_FPS

Item = TypeVar("Item")
SESSION_ID, JOB_ID = "session_0123456789abcdef01234567", "job_89abcdef0123456789abcdef"
REQUEST_ID = "req_0123456789abcdef01234567"
CREATED = 1_790_000_000.25
_REQUEST: dict[str, Any] = {"camera": "arc:-40", "seed": 7}
_PROGRESS = {
    "type": "step_done",
    "stage": "sampling",
    "step": 6,
    "total": 10,
    "seconds_left": 1.4,
}

# presets and moves and their numbers; never the name of a file. The pattern is for the schema
# alone: the camera's own check says which ones there are
_MOVE = "[A-Za-z_]+(:[-+0-9.,eE ]+)?"
CameraText = Annotated[
    str,
    StringConstraints(max_length=100),
    Field(json_schema_extra={"pattern": rf"^{_MOVE}( *\+ *{_MOVE})*$"}),
]
Text = Annotated[str, StringConstraints(max_length=8192)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Row3 = Annotated[list[Finite], Field(min_length=3, max_length=3)]
Row4 = Annotated[list[Finite], Field(min_length=4, max_length=4)]
Intrinsics = Annotated[list[Row3], Field(min_length=3, max_length=3)]
Pose = Annotated[list[Row4], Field(min_length=3, max_length=3)]
MAX_POSES = 4096
# images that the edits of a session may refer to
MAX_REFERENCES = 8
# which frames of a longer or shorter video the model is given
WINDOW = "^(first|middle|last|even|pad|[0-9]{1,9})$"
WINDOW_HELP = "first, middle, last, even, pad, or the number of the frame to start at"


def checked_window(window: str) -> str:
    """A window of a request.

    Raises:
        ValueError: there is none of this name.
    """
    if not re.fullmatch(WINDOW, window):
        raise ValueError(f"window must be {WINDOW_HELP}, got {window[:20]!r}")
    return window


Window = Annotated[
    str, AfterValidator(checked_window), Field(json_schema_extra={"pattern": WINDOW})
]


class SourceChoices(BaseModel):
    """How an uploaded video is read. What is left out is as the service reads all videos."""

    model_config = ConfigDict(extra="forbid")

    window: Window | None = Field(
        default=None, description=f"which frames the model is given: {WINDOW_HELP}"
    )
    fps: Finite | None = Field(
        default=None, ge=MIN_FPS, le=MAX_FPS, description="the rate that the video is taken for"
    )
    alpha: Alpha | None = Field(
        default=None, description="what is put behind transparent pixels, or refuse them"
    )
    fit: Fit | None = Field(
        default=None, description="cut the edges off to the model's shape, or add black bars"
    )
    size: str | None = Field(
        default=None, description="WIDTHxHEIGHT of the turns, one that the model was made for"
    )

    def choices(self) -> Choices:
        return Choices(**{name: getattr(self, name) for name in SourceChoices.model_fields})


# what a route says of its answers, by status
Answers = dict[int | str, dict[str, Any]]


def example(*values: Mapping[str, Any]) -> dict[str, Any]:
    return {"examples": [dict(value) for value in values]}


class Asked(BaseModel):
    """What a client sends: no field but these, and no text for a number."""

    model_config = ConfigDict(extra="forbid", strict=True)

    def to_dict(self) -> dict[str, Any]:
        """What was set, as the service takes it."""
        return self.model_dump(mode="json", exclude_none=True)


class Kept(BaseModel):
    """What the service keeps, made of its records."""

    model_config = ConfigDict(from_attributes=True)


class Trajectory(Asked):
    """A camera's path: one pose a frame, camera-to-world, OpenCV axes, metres."""

    format: Literal["mv2v-camera"]
    version: Literal[1]
    convention: Literal["opencv camera-to-world, metres"] = "opencv camera-to-world, metres"
    size: Annotated[list[Annotated[int, Field(ge=1, le=16384)]], Field(min_length=2, max_length=2)]
    intrinsics: Intrinsics | Annotated[list[Intrinsics], Field(max_length=MAX_POSES)] | None = None
    poses: Annotated[list[Pose], Field(min_length=1, max_length=MAX_POSES)]


FileName = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class CameraFiles(Asked):
    """A camera file as a command line names it, with what it holds.

    spec: a name of `files`, with a camera's name and options where it has some. files: text, JSON,
    or {"base64": bytes}, by name. The server's own files are never opened.
    """

    model_config = ConfigDict(
        json_schema_extra=example(
            {
                "spec": "poses.json?relative&scale=0.01",
                "files": {"poses.json": [[[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]]},
            }
        ),
    )

    spec: Annotated[str, StringConstraints(min_length=1, max_length=1000)]
    files: Annotated[
        dict[FileName, str | dict[str, Any] | list[Any]], Field(min_length=1, max_length=4)
    ]


def _camera_kind(value: Any) -> str:
    """The object that a camera is meant to be. Errors leave out a tag in capitals."""
    if isinstance(value, dict):
        return "CameraFiles" if "files" in value or "spec" in value else "Trajectory"
    return "CameraFiles" if isinstance(value, CameraFiles) else "Trajectory"


CameraObject = Annotated[
    Annotated[Trajectory, Tag("Trajectory")] | Annotated[CameraFiles, Tag("CameraFiles")],
    Discriminator(_camera_kind),
]


class TurnRequest(Asked):
    """A turn: a camera for a model of novel views, an instruction for one that edits.

    What is left out takes the model's default.
    """

    model_config = ConfigDict(
        json_schema_extra=example(_REQUEST, {"prompt": "make the sphere red"})
    )

    camera: CameraText | CameraObject | None = Field(
        default=None,
        description="a preset (pan_right), moves (arc:-40+tilt:5), a trajectory, or camera files",
    )
    prompt: Text | None = Field(default=None, description="the instruction")
    seed: int | None = Field(default=None, ge=0, le=2**63 - 1)
    num_inference_steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    guidance_scale: Finite | None = Field(default=None, ge=0, le=MAX_GUIDANCE_SCALE)
    memory: MemoryMode | None = None
    previews: bool | None = Field(
        default=None, description="a small picture of every step among the job's events"
    )

    callback_url: Annotated[str, StringConstraints(max_length=2000)] | None = Field(
        default=None, description="told of the turn's end, if the service may ask its host"
    )

    @model_validator(mode="after")
    def _is_something(self) -> TurnRequest:
        if self.camera is None and self.prompt is None:
            raise ValueError("a turn needs a camera or a prompt, got neither")
        return self


class BranchRequest(Asked):
    """Where the new session goes on from."""

    model_config = ConfigDict(json_schema_extra=example({"turn": 1}))

    turn: int = Field(ge=0, le=2**31 - 1, description="the last turn to take along; 0 for none")
    window: Window | None = Field(
        default=None, description=f"another part of the video, with turn 0 alone: {WINDOW_HELP}"
    )


MAX_NAME = 200
Name = Annotated[str, StringConstraints(max_length=MAX_NAME)]


class Changes(BaseModel):
    """What is said of a session or a turn; what is left out stays."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra=example({"name": "from the left"})
    )

    name: Name = Field(default="", description="how people call it")
    notes: Text = ""
    is_favourite: bool = False
    edited: Finite | None = Field(
        default=None,
        description="its `edited` as you read it; changed elsewhere since, it is refused",
    )

    @model_validator(mode="after")
    def _is_something(self) -> Changes:
        if not self.model_fields_set - {"edited"}:
            raise ValueError("nothing is to be changed; give name, notes or is_favourite")
        return self

    def set(self) -> dict[str, Any]:
        """What is to be changed, and what that is based on."""
        return self.model_dump(exclude_unset=True)


class DeletedTurn(BaseModel):
    """A turn that is gone. dependents: turns that remembered it, which stay as they are.

    waiting: jobs that wait in its session, and will not remember it.
    """

    model_config = ConfigDict(
        from_attributes=True,
        json_schema_extra=example(
            {
                "object": "turn.deleted",
                "session": SESSION_ID,
                "number": 1,
                "dependents": [2],
                "waiting": [JOB_ID],
            }
        ),
    )

    object: Literal["turn.deleted"] = "turn.deleted"
    session: str
    number: int
    dependents: list[int]
    waiting: list[str]


class Footprint(BaseModel):
    """What a session takes. next_turn_tokens: by kind, null where the engine cannot tell."""

    disk_bytes: int
    memory_bytes: int
    next_turn_tokens: dict[str, int] | None


class Session(Kept):
    """A source video and its turns. Times are unix seconds, sizes pixels and bytes.

    fps: of the turns. window, alpha, fit, size: how the video is read; null where nobody ever
    chose. num_references, has_mask: images that its edits refer to, and whether they have a mask.
    """

    model_config = ConfigDict(
        json_schema_extra=example(
            {
                "object": "session",
                "id": SESSION_ID,
                "kind": "views",
                "name": "clip.mp4",
                "checkpoint": "tiny-nvs",
                "frames": 17,
                "width": 160,
                "height": 96,
                "fps": 8.0,
                "created": CREATED,
                "touched": CREATED,
                "bytes": 48_211,
                "num_turns": 0,
                "parent": None,
                "parent_turn": None,
                "warnings": [],
                "window": None,
                "alpha": "black",
                "fit": "crop",
                "size": "160x96",
                "num_references": 0,
                "has_mask": False,
                "damage": None,
                "notes": "",
                "is_favourite": False,
                "edited": None,
            }
        ),
    )

    object: Literal["session"] = "session"
    id: str
    kind: SessionKind
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
    window: str | None
    alpha: Alpha | None
    fit: Fit | None
    size: str | None
    num_references: int
    has_mask: bool
    damage: str | None
    notes: str
    is_favourite: bool
    edited: float | None


class SessionWithFootprint(Session):
    """A session and what it takes.

    source_frames: numbers of the frames that the model sees, from 0; null where that is not known.
    """

    footprint: Footprint
    source_frames: list[int] | None


class Turn(Kept):
    """A finished turn. report: the engine's own, of memory, tokens, seconds and bytes.

    warnings: what was changed of its camera, and what the model does not know. forgotten: turns
    that it remembered and that were deleted since.
    """

    model_config = ConfigDict(
        json_schema_extra=example(
            {
                "object": "turn",
                "session": SESSION_ID,
                "number": 1,
                "job": JOB_ID,
                "request": _REQUEST,
                "report": {"turn": 1, "camera": "arc:-40", "seconds": {"sampling": 3.1}},
                "created": CREATED,
                "bytes": 96_412,
                "warnings": [],
                "damage": None,
                "name": "",
                "notes": "",
                "is_favourite": False,
                "edited": None,
                "forgotten": [],
            }
        ),
    )

    object: Literal["turn"] = "turn"
    session: str
    number: int
    job: str | None
    request: dict[str, Any]
    report: dict[str, Any]
    created: float
    bytes: int
    warnings: list[str]
    damage: str | None
    name: str
    notes: str
    is_favourite: bool
    edited: float | None
    forgotten: list[int]


class JobError(BaseModel):
    """Why a job has no turn."""

    code: str
    message: str


class Job(Kept):
    """A turn that was asked for. progress: the last event, as the stream of events has it.

    warnings: what was changed of its camera. A camera's files are kept as the trajectory in them.
    """

    model_config = ConfigDict(
        json_schema_extra=example(
            {
                "object": "job",
                "id": JOB_ID,
                "session": SESSION_ID,
                "state": "running",
                "request": _REQUEST,
                "number": 1,
                "created": CREATED,
                "started": CREATED + 1,
                "ended": None,
                "attempts": 1,
                "error": None,
                "progress": _PROGRESS,
                "position": None,
                "is_cancelling": False,
                "warnings": [],
            }
        ),
    )

    object: Literal["job"] = "job"
    id: str
    session: str
    state: Literal["queued", "running", "finished", "failed", "cancelled"]
    request: dict[str, Any]
    number: int | None
    created: float
    started: float | None
    ended: float | None
    attempts: int
    error: JobError | None
    progress: dict[str, Any] | None
    position: int | None
    is_cancelling: bool
    warnings: list[str]


class Sampling(BaseModel):
    """What a turn makes by default. size: height and width. sizes: others that can be asked for."""

    num_frames: int
    size: list[int]
    sizes: list[list[int]] = []
    fps: float
    num_inference_steps: int
    guidance_scale: float


class UploadLimits(Kept):
    """What an uploaded video may have at most. pixels: of one frame."""

    upload_bytes: int
    frames: int
    pixels: int
    seconds: float


class StreamSettings(BaseModel):
    """How a model streams. block_frames: of every block but the first, which has `lead` fewer.

    has_source: whether it edits frames that are sent to its streams. refused: policies that it
    cannot stream with, and why.
    """

    settings: dict[str, Any]
    block_frames: int
    lead: int
    has_source: bool
    refused: dict[str, str]


class Guides(BaseModel):
    """What edits of the model are given beside the video: images to refer to, and a mask."""

    references: bool
    mask: bool


class Model(BaseModel):
    """What this service runs.

    kind: what it makes. stream: null of a model that makes turns of sessions.

    engine: device, types and backends. presets: names of cameras. preset_poses: the path of each,
    sampled evenly from its first frame to its last, as a trajectory's poses.
    """

    object: Literal["model"] = "model"
    id: str
    created: int
    owned_by: str
    kind: SessionKind | Literal["streams"]
    stream: StreamSettings | None
    has_text: bool
    guides: Guides
    memory: MemoryMode
    presets: list[str]
    preset_poses: dict[str, list[Pose]]
    sampling: Sampling
    limits: UploadLimits
    engine: dict[str, Any]


class Listing(BaseModel, Generic[Item]):
    object: Literal["list"] = "list"
    data: list[Item]


class ListingPart(Listing[Item], Generic[Item]):
    """Items with an id each, and whether there are more behind them."""

    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, data: Sequence[Any], *, has_more: bool) -> Any:
        """Part of a list that goes on behind it, or does not."""
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return cls(data=[*data], first_id=first, last_id=last, has_more=has_more)


class Sessions(ListingPart[Session]):
    pass


class Turns(Listing[Turn]):
    has_more: Literal[False] = False


class Jobs(ListingPart[Job]):
    pass


class Models(Listing[Model]):
    pass


class Health(BaseModel):
    """reason: why it is not ready."""

    status: Literal["ok", "not_ready"]
    reason: str | None = None


class Version(BaseModel):
    """What runs here. model_digest: of the weights that make the pictures, alike on all devices."""

    model_config = ConfigDict(protected_namespaces=())

    version: str
    torch: str
    abi: int
    model: str | None
    model_digest: str | None


class ErrorFields(BaseModel):
    message: str
    type: str
    param: str | None
    code: str
    request_id: str | None


class ErrorBody(BaseModel):
    """Every answer of status 400 and above."""

    model_config = ConfigDict(
        json_schema_extra=example(
            error_body("not_found", "there is no session of this name", None, REQUEST_ID)
        )
    )

    error: ErrorFields


def refusals(*codes: str) -> Answers:
    """A route's error answers for its OpenAPI, by status, with an example of each code."""
    answers: Answers = {}
    for code in dict.fromkeys(codes):
        kind = KINDS[code]
        assert kind.status is not None, code
        answer = answers.setdefault(
            kind.status,
            {"model": ErrorBody, "content": {"application/json": {"examples": {}}}},
        )
        said = answer.get("description")
        answer["description"] = f"{said}; or {kind.meaning}" if said else kind.meaning
        example = {"summary": code, "value": error_body(code, kind.meaning, None, REQUEST_ID)}
        answer["content"]["application/json"]["examples"][code] = example
        if kind.status in (429, 503):
            answer["headers"] = {
                "Retry-After": {
                    "description": "seconds after which to try again",
                    "schema": {"type": "integer"},
                }
            }
    return answers
