"""Videos as OpenAI's clients ask for them and read them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mv2v_engine.serving.http.schemas import (
    CREATED,
    JOB_ID,
    MAX_REFERENCES,
    SESSION_ID,
    JobError,
    ListingPart,
    SourceChoices,
    TurnRequest,
    example,
)
from mv2v_engine.serving.store.records import Kind as SessionKind


class RemixRequest(TurnRequest):
    """One more turn in a video's session, in OpenAI's words.

    For a model of novel views a prompt without camera is read as the camera.
    """

    model_config = ConfigDict(json_schema_extra=example({"prompt": "pan_right"}))

    model: str | None = Field(default=None, description="the checkpoint's name, as /v1/models says")
    seconds: str | int | float | None = Field(
        default=None,
        description="of the result, which model and video decide: others are refused",
    )
    size: str | None = Field(
        default=None,
        description="WIDTHxHEIGHT of the result, one that the model was made for; a session has "
        "its own: others are refused",
    )

    def turn(self, kind: SessionKind) -> dict[str, Any]:
        """What is asked of a model of this kind."""
        asked = TurnRequest.to_dict(self)
        for name in (
            "session_id",
            "video_url",
            "reference_urls",
            "mask_url",
            "model",
            "seconds",
            "size",
            *SourceChoices.model_fields,
        ):
            asked.pop(name, None)
        if not asked.get("prompt"):
            asked.pop("prompt", None)
        elif kind == "views" and "camera" not in asked:
            asked["camera"] = asked.pop("prompt")
        return asked


class VideoRequest(SourceChoices, RemixRequest):
    """A new video: of the file in the form's input_reference, or of a session that there is.

    window, fps, alpha, fit and size say how the file is read, references and a mask are what edits
    are given beside it; a session has its own.
    """

    model_config = ConfigDict(
        json_schema_extra=example({"prompt": "arc:-40", "session_id": SESSION_ID})
    )

    session_id: str | None = Field(default=None, description="one more turn in this session")
    video_url: str | None = Field(
        default=None, description="of the file to start from, if the service may ask its host"
    )
    reference_urls: Annotated[list[str], Field(max_length=MAX_REFERENCES)] | None = Field(
        default=None, description="of images that the edit refers to, in order"
    )
    mask_url: str | None = Field(
        default=None, description="of a video or an image: what is bright there is made anew"
    )

    def urls(self, video: str) -> list[tuple[str, str, str]]:
        """What is to be fetched: its name here, the form's field of such a file, and its URL.

        video: the field of the video.
        """
        named = [("video_url", video, self.video_url), ("mask_url", "mask", self.mask_url)]
        named += [("reference_urls", "reference", url) for url in self.reference_urls or ()]
        return [(name, field, url) for name, field, url in named if url is not None]


class Video(BaseModel):
    """A job as OpenAI's clients see it."""

    model_config = ConfigDict(
        json_schema_extra=example(
            {
                "object": "video",
                "id": JOB_ID,
                "model": "tiny-nvs",
                "status": "in_progress",
                "progress": 60,
                "created_at": int(CREATED),
                "completed_at": None,
                "expires_at": None,
                "size": "160x96",
                "seconds": "2.125",
                "prompt": "arc:-40",
                "remixed_from_video_id": None,
                "error": None,
                "session_id": SESSION_ID,
                "warnings": ["the model takes 17 frames: frames 0 to 16 of 40"],
            }
        )
    )

    object: Literal["video"] = "video"
    id: str
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None = None
    size: str
    seconds: str
    prompt: str | None
    remixed_from_video_id: str | None
    error: JobError | None
    session_id: str
    warnings: list[str]


class DeletedVideo(BaseModel):
    """What OpenAI's clients expect of a deletion."""

    object: Literal["video.deleted"] = "video.deleted"
    id: str
    deleted: Literal[True] = True


class Videos(ListingPart[Video]):
    pass
