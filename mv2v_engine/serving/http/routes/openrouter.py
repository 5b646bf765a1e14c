"""OpenRouter's shape of videos: a translation of /v1/videos, whose jobs they are."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response, status
from pydantic import BaseModel, ConfigDict, Discriminator, Field, ValidationError

from mv2v_engine.serving.errors import ApiError
from mv2v_engine.serving.http.openai_schemas import VideoRequest
from mv2v_engine.serving.http.routes.files import FILE_ERRORS, WITH_RANGE, file_answers
from mv2v_engine.serving.http.routes.parameters import ANY, BODY, JobId, Key, Owner, Serving
from mv2v_engine.serving.http.routes.sessions import UPLOAD
from mv2v_engine.serving.http.routes.turns import SUBMIT
from mv2v_engine.serving.http.routes.videos import begun, get_video_content, invalid
from mv2v_engine.serving.http.schemas import (
    JOB_ID,
    MAX_REFERENCES,
    Finite,
    Text,
    example,
    refusals,
)
from mv2v_engine.serving.http.uploads import Form
from mv2v_engine.serving.store.records import JobRecord
from mv2v_engine.serving.work.turn_request import made_size

router = APIRouter(prefix="/api/v1/videos", tags=["videos (OpenRouter)"])
State = Literal["pending", "in_progress", "completed", "failed", "cancelled"]
_STATUS: dict[str, State] = {
    "queued": "pending",
    "running": "in_progress",
    "finished": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
}
_VIDEO_URL = "https://videos.example/clip.mp4"


class Address(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    url: str


class InputVideo(BaseModel):
    """The video to start from."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["video_url"]
    video_url: Address


class InputImage(BaseModel):
    """An image that an edit refers to."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["image_url"]
    image_url: Address


class GenerationRequest(BaseModel):
    """A video in OpenRouter's words.

    This service's own are session_id, one more turn in a session, and mask_url.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra=example(
            {
                "model": "tiny-nvs",
                "prompt": "arc:-40",
                "input_references": [{"type": "video_url", "video_url": {"url": _VIDEO_URL}}],
            }
        ),
    )

    model: str
    prompt: Text
    input_references: Annotated[
        list[Annotated[InputVideo | InputImage, Discriminator("type")]],
        Field(max_length=1 + MAX_REFERENCES),
    ] = []
    mask_url: str | None = None
    session_id: str | None = None
    size: str | None = None
    duration: Finite | None = None
    seed: int | None = Field(default=None, ge=0, le=2**63 - 1)
    callback_url: str | None = None

    def to_video(self) -> VideoRequest:
        """The same for /v1/videos.

        Raises:
            ApiError: invalid_request.
        """
        same = ("model", "prompt", "session_id", "size", "seed", "callback_url", "mask_url")
        fields = {name: getattr(self, name) for name in same} | {"seconds": self.duration}
        given = self.input_references
        videos = [each.video_url.url for each in given if isinstance(each, InputVideo)]
        images = [each.image_url.url for each in given if isinstance(each, InputImage)]
        if len(videos) > 1:
            message = f"input_references may have one video, got {len(videos)}; leave others out"
            raise ApiError("invalid_request", message, param="input_references")
        fields |= {"video_url": next(iter(videos), None), "reference_urls": images or None}
        try:
            return VideoRequest.model_validate(fields)
        except ValidationError as error:
            raise invalid(error) from error


class Generation(BaseModel):
    """A job as OpenRouter's clients see it. unsigned_urls: of its content, once it is completed."""

    model_config = ConfigDict(
        json_schema_extra=example(
            {"id": JOB_ID, "polling_url": f"/api/v1/videos/{JOB_ID}", "status": "pending"}
        )
    )

    id: str
    polling_url: str
    status: State
    unsigned_urls: list[str] | None = None
    error: str | None = None


class VideoModel(BaseModel):
    """The model in OpenRouter's words. supported_sizes: WIDTHxHEIGHT."""

    id: str
    canonical_slug: str
    name: str
    created: int
    supported_sizes: list[str]
    supported_durations: None = None
    supported_resolutions: None = None
    supported_aspect_ratios: None = None
    supported_frame_images: None = None
    generate_audio: Literal[False] = False
    seed: Literal[True] = True
    allowed_passthrough_parameters: list[str]


class VideoModels(BaseModel):
    data: list[VideoModel]


@router.post(
    "",
    status_code=status.HTTP_202_ACCEPTED,
    response_model=Generation,
    response_model_exclude_none=True,
    responses=refusals(*ANY, *BODY, *UPLOAD, *SUBMIT, "not_made_here", "not_fetched"),
)
async def create_generation(
    request: Request, service: Serving, owner: Owner, body: GenerationRequest, key: Key = None
) -> Generation:
    """Ask for a video of input_references, or for one more turn in session_id."""
    video = await begun(request, service, owner, body.to_video(), Form(), key)
    return await get_generation(request, service, owner, video.id)


@router.get("/models", response_model=VideoModels, responses=refusals(*ANY))
async def list_video_models(service: Serving, owner: Owner) -> VideoModels:
    """The one model that this service runs."""
    about = service.require_about()
    name = about["engine"]["checkpoint"]
    return VideoModels(
        data=[
            VideoModel(
                id=name,
                canonical_slug=name,
                name=name,
                created=0,
                supported_sizes=[made_size(about, None)],
                allowed_passthrough_parameters=[],
            )
        ]
    )


@router.get(
    "/{video_id}",
    response_model=Generation,
    response_model_exclude_none=True,
    responses=refusals(*ANY, "not_found"),
)
async def get_generation(
    request: Request, service: Serving, owner: Owner, video_id: JobId
) -> Generation:
    """How far a video is, and where it is once it is completed."""
    job: JobRecord = await service.job(owner, video_id)
    path = f"{router.prefix}/{job.id}"
    content = f"{request.base_url}{path.lstrip('/')}/content?index=0"
    return Generation(
        id=job.id,
        polling_url=path,
        status=_STATUS[job.state],
        unsigned_urls=[content] if job.state == "finished" else None,
        error=None if job.error is None else job.error["message"],
    )


@router.get(
    "/{video_id}/content",
    response_class=Response,
    responses=file_answers("video/mp4") | refusals(*ANY, *FILE_ERRORS, "not_finished"),
    openapi_extra=WITH_RANGE,
)
async def get_generation_content(
    request: Request,
    service: Serving,
    owner: Owner,
    video_id: JobId,
    index: Annotated[int, Query(ge=0, le=0, description="a job makes one video")] = 0,
) -> Response:
    """The finished video."""
    return await get_video_content(request, service, owner, video_id)
