"""Turns: asked for, listed, and their results."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response, status

from mv2v_engine.serving.http.routes.files import FILE_ERRORS, WITH_RANGE, answer_file, file_answers
from mv2v_engine.serving.http.routes.parameters import (
    ANY,
    BODY,
    Key,
    Owner,
    Serving,
    SessionId,
    TurnNumber,
)
from mv2v_engine.serving.http.schemas import Answers, Job, Turn, TurnRequest, Turns, refusals
from mv2v_engine.serving.store.records import JobRecord, TurnRecord

router = APIRouter(prefix="/v1/sessions/{session_id}/turns", tags=["turns"])
# what a turn may be refused for
SUBMIT = ("unprocessable_turn", "queue_full", "idempotency_conflict", "not_found", "damaged")

_KNOWN: Answers = {200: {"model": Job, "description": "the job that this key has already made"}}


def job_of(record: JobRecord) -> Job:
    return Job.model_validate(record)


def turn_of(record: TurnRecord) -> Turn:
    return Turn.model_validate(record)


@router.post(
    "",
    status_code=status.HTTP_202_ACCEPTED,
    response_model=Job,
    responses=_KNOWN | refusals(*ANY, *BODY, *SUBMIT),
)
async def submit_turn(
    response: Response,
    service: Serving,
    owner: Owner,
    session_id: SessionId,
    body: TurnRequest,
    key: Key = None,
) -> Job:
    """Ask for a turn. It waits in the queue and is made by the one worker."""
    record, is_new = await service.submit(owner, session_id, body.to_dict(), key=key)
    if not is_new:
        response.status_code = status.HTTP_200_OK
    response.headers["Location"] = f"/v1/jobs/{record.id}"
    return job_of(record)


@router.get("", response_model=Turns, responses=refusals(*ANY, "not_found"))
async def list_turns(service: Serving, owner: Owner, session_id: SessionId) -> Turns:
    """The finished turns of a session, in order."""
    records = await service.turns(owner, session_id)
    return Turns(data=[turn_of(record) for record in records])


@router.get("/{number}", response_model=Turn, responses=refusals(*ANY, "not_found"))
async def get_turn(
    service: Serving, owner: Owner, session_id: SessionId, number: TurnNumber
) -> Turn:
    """A turn and its report: what was remembered, tokens, seconds, bytes."""
    return turn_of(await service.turn(owner, session_id, number))


_FILE = refusals(*ANY, *FILE_ERRORS, "not_finished")


@router.get(
    "/{number}/video",
    response_class=Response,
    responses=file_answers("video/mp4") | _FILE,
    openapi_extra=WITH_RANGE,
)
async def get_turn_video(
    request: Request, service: Serving, owner: Owner, session_id: SessionId, number: TurnNumber
) -> Response:
    """A turn's video."""
    path = await service.turn_file(owner, session_id, number, "video")
    name = f"{session_id}_turn_{number:04d}.mp4"
    return await answer_file(request, path, name=name, media_type="video/mp4")


@router.get(
    "/{number}/thumbnail",
    response_class=Response,
    responses=file_answers("image/jpeg") | _FILE,
    openapi_extra=WITH_RANGE,
)
async def get_turn_thumbnail(
    request: Request, service: Serving, owner: Owner, session_id: SessionId, number: TurnNumber
) -> Response:
    """A picture of a turn."""
    path = await service.turn_file(owner, session_id, number, "thumbnail")
    name = f"{session_id}_turn_{number:04d}.jpg"
    return await answer_file(request, path, name=name, media_type="image/jpeg")
