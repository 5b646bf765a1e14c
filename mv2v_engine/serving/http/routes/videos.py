"""OpenAI's shape of videos over the same jobs: a video's id is its job's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import ValidationError

from mv2v_engine.serving.errors import ApiError
from mv2v_engine.serving.http.bodies import no_json
from mv2v_engine.serving.http.fields import field_error
from mv2v_engine.serving.http.openai_schemas import (
    DeletedVideo,
    RemixRequest,
    Video,
    VideoRequest,
    Videos,
)
from mv2v_engine.serving.http.routes.files import FILE_ERRORS, WITH_RANGE, answer_file, file_answers
from mv2v_engine.serving.http.routes.parameters import (
    ANY,
    BODY,
    AfterJob,
    Configured,
    JobId,
    Key,
    Limit,
    Order,
    Owner,
    Serving,
)
from mv2v_engine.serving.http.routes.sessions import (
    GUIDE_SCHEMAS,
    GUIDES,
    UPLOAD,
    taken_guides,
)
from mv2v_engine.serving.http.routes.turns import SUBMIT
from mv2v_engine.serving.http.schemas import JobError, refusals
from mv2v_engine.serving.http.uploads import Form, file_schema, received_form
from mv2v_engine.serving.service import Service
from mv2v_engine.serving.store.records import JobRecord, SessionRecord
from mv2v_engine.serving.work.turn_request import made_size

router = APIRouter(prefix="/v1/videos", tags=["videos (OpenAI)"])
_FILE_FIELD = "input_reference"
_FILES = {_FILE_FIELD: 1, **GUIDES}
_STATUS: dict[str, Literal["queued", "in_progress", "completed", "failed"]] = {
    "queued": "queued",
    "running": "in_progress",
    "finished": "completed",
    "failed": "failed",
    "cancelled": "failed",
}
# fields of a form that may hold JSON, and how that begins
_JSON_FIELDS = {"camera": "{", "reference_urls": "["}
# seconds of a result that a client may be wrong about: OpenAI's are whole
_SECONDS_SLACK = 0.5


def _request_body() -> dict[str, Any]:
    """The form and the JSON of a new video, for the schema."""
    schema = VideoRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    files = {_FILE_FIELD: file_schema("the video to start from"), **GUIDE_SCHEMAS}
    form = {**schema, "properties": {**schema["properties"], **files}}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {"schema": form},
                "application/json": {"schema": schema},
            },
        }
    }


def _video(
    request: Request,
    job: JobRecord,
    session: SessionRecord,
    about: dict[str, Any],
    said: Sequence[str] = (),
) -> Video:
    """A job as a video. said: warnings of its finished turn."""
    asked = job.request.get("prompt") or job.request.get("camera")
    percent: int = request.app.state.percentages.of(job)
    return Video(
        id=job.id,
        model=session.checkpoint,
        status=_STATUS[job.state],
        progress=percent,
        created_at=int(job.created),
        completed_at=int(job.ended) if job.ended is not None else None,
        size=session.size or made_size(about, None),
        seconds=f"{_seconds(session, about):g}",
        prompt=asked if isinstance(asked, str) else None,
        remixed_from_video_id=job.request.get("remixed_from"),
        error=JobError(**job.error) if job.error is not None else None,
        session_id=session.id,
        warnings=list(dict.fromkeys((*session.warnings, *job.warnings, *said))),
    )


def _seconds(session: SessionRecord, about: dict[str, Any]) -> float:
    """The seconds of a result: a window of the model for views, the whole video for edits."""
    frames = about["sampling"]["num_frames"] if session.kind == "views" else session.frames
    return round(frames / session.fps, 3)


def _check_model(asked: RemixRequest, about: dict[str, Any]) -> None:
    """Refuse what this service does not make, rather than make something else."""
    model = about["engine"]["checkpoint"]
    if asked.model not in (None, model):
        raise ApiError(
            "not_made_here",
            f"there is no model {asked.model[:100]!r} here, only {model!r}; ask for that or leave "
            "model out",
            param="model",
        )


def _check_size(asked: RemixRequest, session: SessionRecord, about: dict[str, Any]) -> None:
    """Refuse another size than that of a session that there is."""
    size = session.size or made_size(about, None)
    if asked.size not in (None, size):
        raise ApiError(
            "not_made_here",
            f"session {session.id} makes videos of {size}, not {asked.size[:100]!r}; ask for that, "
            "leave size out, or begin a session",
            param="size",
        )


def _check_seconds(asked: RemixRequest, session: SessionRecord, about: dict[str, Any]) -> None:
    if asked.seconds is None:
        return
    made = _seconds(session, about)
    try:
        is_right = abs(float(asked.seconds) - made) <= _SECONDS_SLACK
    except (ValueError, OverflowError):
        is_right = False
    if not is_right:
        raise ApiError(
            "not_made_here",
            f"the result lasts {made:g} seconds, not {str(asked.seconds)[:100]!r}; ask for that or "
            "leave seconds out",
            param="seconds",
        )


async def _asked(
    request: Request, stack: AsyncExitStack, service: Service, limit: int
) -> tuple[VideoRequest, Form]:
    """What a body asks for, a form or JSON alike."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        try:
            asked = await request.json()
            for name in _FILES if isinstance(asked, dict) else ():
                if name in asked:
                    raise ApiError(
                        "invalid_request",
                        f"{name} is a file: send it and all other fields as multipart/form-data",
                        param=name,
                    )
            return VideoRequest.model_validate(asked), Form()
        except ValidationError as error:
            raise invalid(error) from error
        except (ValueError, RecursionError) as error:
            why = no_json(error, await request.body())
            raise ApiError("malformed_request", f"the body {why}") from error
    form = await stack.enter_async_context(
        received_form(request, _FILES, limit, service.upload_path)
    )
    fields: dict[str, Any] = dict(form.fields)
    name = ""
    try:
        for name in [name for name in _JSON_FIELDS if name in fields]:
            if fields[name].startswith(_JSON_FIELDS[name]):
                fields[name] = json.loads(fields[name])
        # numbers are text in a form
        return VideoRequest.model_validate(fields, strict=False), form
    except ValidationError as error:
        raise invalid(error) from error
    except (ValueError, RecursionError) as error:
        why = no_json(error, form.fields[name])
        raise ApiError("invalid_request", f"{name} {why}", param=name) from error


def invalid(error: ValidationError) -> ApiError:
    """A model's complaint as an answer."""
    found: Sequence[Mapping[str, Any]] = error.errors(include_url=False)
    return field_error(found, [*VideoRequest.model_fields, *_FILES], 0)


@router.post(
    "",
    response_model=Video,
    responses=refusals(*ANY, *BODY, *UPLOAD, *SUBMIT, "not_made_here", "not_fetched"),
    openapi_extra=_request_body(),
)
async def create_video(
    request: Request, service: Serving, config: Configured, owner: Owner, key: Key = None
) -> Video:
    """Begin a session with input_reference or video_url, or take that of session_id; ask a turn."""
    async with AsyncExitStack() as stack:
        asked, form = await _asked(request, stack, service, config.limits.upload_bytes)
        return await begun(request, service, owner, asked, form, key)


async def begun(
    request: Request,
    service: Service,
    owner: str,
    asked: VideoRequest,
    form: Form,
    key: str | None,
) -> Video:
    """A new video of what a form, a session or a URL holds."""
    about = service.require_about()
    _check_model(asked, about)
    starts = (form.files.get(_FILE_FIELD), asked.session_id, asked.video_url)
    if sum(start is not None for start in starts) != 1:
        raise ApiError(
            "invalid_request",
            f"a new video needs {_FILE_FIELD}, the file of a video to start from, video_url, its "
            "address, or session_id, the session of one that is here: exactly one of them",
            param=_FILE_FIELD,
        )
    choices = asked.choices()
    chosen = [
        name
        for name, value in asdict(choices).items()
        if value is not None and name != "size"  # it may repeat the session's
    ]
    fetched = asked.urls(_FILE_FIELD)
    chosen += [name for name in GUIDES if name in form.files]
    chosen += [name for name, field, _ in fetched if field in GUIDES]
    if "mask" in form.files and "mask_url" in chosen:
        raise ApiError(
            "invalid_request", "mask and mask_url are given; leave one out", param="mask"
        )
    if asked.session_id is not None and chosen:
        raise ApiError(
            "invalid_request",
            f"{chosen[0]} is chosen with {_FILE_FIELD}, and a session has its own; leave it out",
            param=chosen[0],
        )
    is_new = asked.session_id is None
    if is_new:
        try:
            for name, field, url in fetched:
                path = await service.fetch(owner, url, name)
                form.files.setdefault(field, []).append(path)
        except BaseException:
            await form.remove()
            raise
        (video,) = form.take(_FILE_FIELD)
        session = await service.create_session(
            owner, video, "", **taken_guides(form), key=key, choices=choices
        )
    else:
        session = await service.session(owner, asked.session_id or "")
    try:
        _check_size(asked, session, about)
        _check_seconds(asked, session, about)
        job, _ = await service.submit(owner, session.id, asked.turn(session.kind), key=key)
    except ApiError:
        if is_new:
            await _forget_unused(service, owner, session.id)
        raise
    return _video(request, job, session, about)


async def _forget_unused(service: Service, owner: str, session_id: str) -> None:
    """Remove a session that was made for a turn that was refused.

    One with jobs was made by an earlier request with the same key.
    """
    if not (await service.jobs(owner, session=session_id, limit=1)).items:
        await service.delete_session(owner, session_id)


@router.get("", response_model=Videos, responses=refusals(*ANY, "not_found"))
async def list_videos(
    request: Request,
    service: Serving,
    owner: Owner,
    limit: Limit = 20,
    after: AfterJob = None,
    order: Order = "desc",
) -> Any:
    """Videos by creation."""
    about = service.require_about()
    page = await service.jobs(owner, limit=limit, after=after, is_newest_first=order == "desc")
    sessions: dict[str, SessionRecord] = {}
    data = []
    for job in page.items:
        try:
            if job.session not in sessions:
                sessions[job.session] = await service.session(owner, job.session)
        except ApiError:
            continue  # deleted meanwhile
        said = await _said(service, owner, job)
        data.append(_video(request, job, sessions[job.session], about, said))
    return Videos.of(data, has_more=page.has_more)


@router.get("/{video_id}", response_model=Video, responses=refusals(*ANY, "not_found"))
async def get_video(request: Request, service: Serving, owner: Owner, video_id: JobId) -> Video:
    """A video's status and progress."""
    about = service.require_about()
    job = await service.job(owner, video_id)
    said = await _said(service, owner, job)
    return _video(request, job, await service.session(owner, job.session), about, said)


async def _said(service: Service, owner: str, job: JobRecord) -> Sequence[str]:
    """The warnings of a job's finished turn."""
    if job.state != "finished" or job.number is None:
        return ()
    with suppress(ApiError):  # deleted meanwhile
        return (await service.turn(owner, job.session, job.number)).warnings
    return ()


@router.delete(
    "/{video_id}",
    response_model=DeletedVideo,
    responses=refusals(*ANY, "wrong_origin", "not_found", "busy"),
)
async def delete_video(service: Serving, owner: Owner, video_id: JobId) -> DeletedVideo:
    """Remove a video and its session, if it is the session's only one."""
    job = await service.job(owner, video_id)
    if len((await service.jobs(owner, session=job.session, limit=2)).items) > 1:
        raise ApiError(
            "busy",
            f"other videos were made in the same session, {job.session}, and remember this one; "
            f"delete them all with DELETE /v1/sessions/{job.session}",
        )
    await service.delete_session(owner, job.session)
    return DeletedVideo(id=video_id)


@router.get(
    "/{video_id}/content",
    response_class=Response,
    responses=file_answers("video/mp4", "image/jpeg")
    | refusals(*ANY, *FILE_ERRORS, "not_finished"),
    openapi_extra=WITH_RANGE,
)
async def get_video_content(
    request: Request,
    service: Serving,
    owner: Owner,
    video_id: JobId,
    variant: Annotated[Literal["video", "thumbnail"], Query()] = "video",
) -> Response:
    """The finished video, or a picture of it."""
    job = await service.job(owner, video_id)
    if job.state != "finished" or job.number is None:
        raise ApiError(
            "not_finished",
            f"this video is {_STATUS[job.state]}; its content is there once it is completed",
        )
    path = await service.turn_file(owner, job.session, job.number, variant)
    suffix, kind = ("mp4", "video/mp4") if variant == "video" else ("jpg", "image/jpeg")
    return await answer_file(request, path, name=f"{video_id}.{suffix}", media_type=kind)


@router.post(
    "/{video_id}/remix",
    response_model=Video,
    responses=refusals(*ANY, *BODY, *SUBMIT, "not_made_here"),
)
async def remix_video(
    request: Request,
    service: Serving,
    owner: Owner,
    video_id: JobId,
    body: RemixRequest,
    key: Key = None,
) -> Video:
    """One more turn in the video's session, which remembers it and all others there."""
    about = service.require_about()
    origin = await service.job(owner, video_id)
    session = await service.session(owner, origin.session)
    _check_model(body, about)
    _check_size(body, session, about)
    _check_seconds(body, session, about)
    turn = body.turn(session.kind) | {"remixed_from": video_id}
    job, _ = await service.submit(owner, session.id, turn, key=key)
    return _video(request, job, session, about)
