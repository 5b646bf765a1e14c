"""Sessions: an uploaded video, its turns and what they take."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response, status
from pydantic import ValidationError

from mv2v_engine.serving.errors import ApiError
from mv2v_engine.serving.http.fields import field_error
from mv2v_engine.serving.http.routes.files import FILE_ERRORS, WITH_RANGE, answer_file, file_answers
from mv2v_engine.serving.http.routes.parameters import (
    ANY,
    BODY,
    AfterSession,
    Configured,
    Key,
    Limit,
    Order,
    Owner,
    Serving,
    SessionId,
)
from mv2v_engine.serving.http.schemas import (
    MAX_NAME,
    MAX_REFERENCES,
    BranchRequest,
    Changes,
    Footprint,
    Session,
    Sessions,
    SessionWithFootprint,
    SourceChoices,
    refusals,
)
from mv2v_engine.serving.http.uploads import Form, file_schema, received_form

router = APIRouter(prefix="/v1/sessions", tags=["sessions"])
# what an uploaded video may be refused for
UPLOAD = (
    "unsupported_media",
    "unreadable_video",
    "video_too_long",
    "video_out_of_range",
    "video_too_slow",
    "too_many_frames",
    "too_many_pixels",
    "unprocessable_turn",
    "too_many_sessions",
    "too_many_uploads",
    "idempotency_conflict",
    "disk_full",
)
# what edits are given beside the video, by its field, and how many files that may be
GUIDES = {"reference": MAX_REFERENCES, "mask": 1}
GUIDE_SCHEMAS = {
    "reference": file_schema(
        "images that edits refer to, in order, if the model takes any", MAX_REFERENCES
    ),
    "mask": file_schema(
        "a video as large and as long as the video, or one image of its size: what is bright there "
        "is made anew, what is dark stays; if the model takes any"
    ),
}
_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["video"],
                    "additionalProperties": False,
                    "properties": {
                        "video": file_schema("a video file; its name and type are not looked at"),
                        **GUIDE_SCHEMAS,
                        "name": {
                            "type": "string",
                            "maxLength": MAX_NAME,
                            "description": "how people call it",
                        },
                    }
                    | SourceChoices.model_json_schema()["properties"],
                }
            }
        },
    }
}


def clean_name(name: str) -> str:
    """A name as it is shown: one line without control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in name).strip()


def cleaned(body: Changes) -> dict[str, Any]:
    """What is to be changed, the name as it is shown."""
    changes = body.set()
    if "name" in changes:
        changes["name"] = clean_name(changes["name"])
    return changes


def taken_guides(form: Form) -> dict[str, Any]:
    """What a form has for `Service.create_session` beside the video."""
    return {"references": form.take("reference"), "mask": next(iter(form.take("mask")), None)}


# what a branch is refused with
BRANCH = ("not_found", "too_many_sessions", "disk_full", "busy", "damaged")


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    response_model=Session,
    responses=refusals(*ANY, *BODY, *UPLOAD),
    openapi_extra=_FORM,
)
async def create_session(
    request: Request,
    response: Response,
    service: Serving,
    config: Configured,
    owner: Owner,
    key: Key = None,
) -> Session:
    """Begin a session with a video, which is decoded to its end before it is taken."""
    limit = config.limits.upload_bytes
    files = {"video": 1, **GUIDES}
    async with received_form(request, files, limit, service.upload_path) as form:
        fields = dict(form.fields)
        name = clean_name(fields.pop("name", ""))
        if len(name) > MAX_NAME:
            raise ApiError(
                "invalid_request",
                f"name may have {MAX_NAME} characters, got {len(name)}; shorten it",
                param="name",
            )
        try:
            choices = SourceChoices.model_validate(fields).choices()
        except ValidationError as error:
            found: Sequence[Mapping[str, Any]] = error.errors(include_url=False)
            known = (*files, "name", *SourceChoices.model_fields)
            raise field_error(found, known, 0) from error
        if "video" not in form.files:
            raise ApiError(
                "invalid_request",
                "the form has no file in the field 'video'; send the video there",
                param="video",
            )
        (video,) = form.take("video")
        guides = taken_guides(form)
        record = await service.create_session(
            owner, video, name, **guides, key=key, choices=choices
        )
    response.headers["Location"] = f"/v1/sessions/{record.id}"
    return Session.model_validate(record)


@router.get("", response_model=Sessions, responses=refusals(*ANY, "not_found"))
async def list_sessions(
    service: Serving,
    owner: Owner,
    limit: Limit = 20,
    after: AfterSession = None,
    order: Order = "desc",
) -> Any:
    """Sessions by creation."""
    page = await service.sessions(owner, limit=limit, after=after, is_newest_first=order == "desc")
    data = [Session.model_validate(record) for record in page.items]
    return Sessions.of(data, has_more=page.has_more)


@router.get(
    "/{session_id}", response_model=SessionWithFootprint, responses=refusals(*ANY, "not_found")
)
async def get_session(service: Serving, owner: Owner, session_id: SessionId) -> Any:
    """A session and its footprint: bytes on disk and in memory, tokens of the next turn."""
    record, footprint = await asyncio.gather(
        service.session(owner, session_id), service.footprint(owner, session_id)
    )
    frames = service.source_frames(record)
    return SessionWithFootprint(
        **Session.model_validate(record).model_dump(),
        footprint=Footprint(**asdict(footprint)),
        source_frames=None if frames is None else list(frames),
    )


@router.patch(
    "/{session_id}",
    response_model=Session,
    responses=refusals(*ANY, *BODY, "not_found", "edit_conflict", "disk_full"),
)
async def edit_session(
    service: Serving, owner: Owner, session_id: SessionId, body: Changes
) -> Session:
    """Change a session's name, notes, or whether it is a favourite."""
    return Session.model_validate(await service.edit_session(owner, session_id, cleaned(body)))


@router.delete(
    "/{session_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=refusals(*ANY, "wrong_origin", "not_found"),
)
async def delete_session(service: Serving, owner: Owner, session_id: SessionId) -> None:
    """Remove a session and all that is in it; what runs or waits in it is cancelled."""
    await service.delete_session(owner, session_id)


@router.post(
    "/{session_id}/branches",
    status_code=status.HTTP_201_CREATED,
    response_model=Session,
    responses=refusals(*ANY, *BODY, *BRANCH),
)
async def branch_session(
    response: Response,
    service: Serving,
    owner: Owner,
    session_id: SessionId,
    body: BranchRequest,
) -> Session:
    """A new session of the same video that has its turns up to this one, or of another part."""
    record = await service.branch(owner, session_id, body.turn, body.window)
    response.headers["Location"] = f"/v1/sessions/{record.id}"
    return Session.model_validate(record)


@router.get(
    "/{session_id}/source",
    response_class=Response,
    responses=file_answers("video/mp4", "video/webm", "application/octet-stream")
    | refusals(*ANY, *FILE_ERRORS),
    openapi_extra=WITH_RANGE,
)
async def get_session_source(
    request: Request, service: Serving, owner: Owner, session_id: SessionId
) -> Response:
    """The video as it was uploaded."""
    path = await service.source(owner, session_id)
    return await answer_file(request, path, name=session_id, is_attachment=True)


@router.get(
    "/{session_id}/export",
    response_class=Response,
    responses=file_answers("application/zip") | refusals(*ANY, *FILE_ERRORS, "disk_full"),
    openapi_extra=WITH_RANGE,
)
async def export_session(
    request: Request, service: Serving, owner: Owner, session_id: SessionId
) -> Response:
    """A zip of the session's videos and pictures, one sheet of them all, and its reports."""
    path = await service.export(owner, session_id)
    return await answer_file(
        request,
        path,
        name=f"{session_id}.zip",
        media_type="application/zip",
        is_attachment=True,
        is_last_use=True,
    )
