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
from mv2v_engine.serving.http.routes.sessions import cleaned
from mv2v_engine.serving.http.schemas import (
    Answers,
    Changes,
    DeletedTurn,
    Job,
    Turn,
    TurnRequest,
    Turns,
    refusals,
)
from mv2v_engine.serving.store.records import TurnFile

router = APIRouter(prefix="/v1/sessions/{session_id}/turns", tags=["turns"])
# what a turn may be refused for
SUBMIT = (
    "unprocessable_turn",
    "queue_full",
    "idempotency_conflict",
    "not_found",
    "damaged",
    "host_not_allowed",
)

_KNOWN: Answers = {200: {"model": Job, "description": "the job that this key has already made"}}


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
    return Job.model_validate(record)


@router.get("", response_model=Turns, responses=refusals(*ANY, "not_found"))
async def list_turns(service: Serving, owner: Owner, session_id: SessionId) -> Turns:
    """The finished turns of a session, in order."""
    records = await service.turns(owner, session_id)
    return Turns(data=[Turn.model_validate(record) for record in records])


@router.get("/{number}", response_model=Turn, responses=refusals(*ANY, "not_found"))
async def get_turn(
    service: Serving, owner: Owner, session_id: SessionId, number: TurnNumber
) -> Turn:
    """A turn and its report: what was remembered, tokens, seconds, bytes."""
    return Turn.model_validate(await service.turn(owner, session_id, number))


@router.patch(
    "/{number}",
    response_model=Turn,
    responses=refusals(*ANY, *BODY, "not_found", "edit_conflict", "disk_full"),
)
async def edit_turn(
    service: Serving, owner: Owner, session_id: SessionId, number: TurnNumber, body: Changes
) -> Turn:
    """Change a turn's name, notes, or whether it is a favourite."""
    return Turn.model_validate(await service.edit_turn(owner, session_id, number, cleaned(body)))


@router.delete(
    "/{number}",
    response_model=DeletedTurn,
    responses=refusals(*ANY, "wrong_origin", "not_found", "busy", "disk_full"),
)
async def delete_turn(
    service: Serving, owner: Owner, session_id: SessionId, number: TurnNumber
) -> DeletedTurn:
    """Remove a turn's files, and remember it no more; turns that remembered it are named."""
    return DeletedTurn.model_validate(await service.delete_turn(owner, session_id, number))


def _add_file(which: TurnFile, suffix: str, media_type: str, words: str) -> None:
    """The route of one of a turn's files."""

    async def answer(
        request: Request, service: Serving, owner: Owner, session_id: SessionId, number: TurnNumber
    ) -> Response:
        path = await service.turn_file(owner, session_id, number, which)
        name = f"{session_id}_turn_{number:04d}.{suffix}"
        return await answer_file(request, path, name=name, media_type=media_type)

    router.add_api_route(
        f"/{{number}}/{which}",
        answer,
        name=f"get_turn_{which}",
        description=words,
        response_class=Response,
        responses=file_answers(media_type) | refusals(*ANY, *FILE_ERRORS, "not_finished"),
        openapi_extra=WITH_RANGE,
    )


_add_file("video", "mp4", "video/mp4", "A turn's video.")
_add_file("thumbnail", "jpg", "image/jpeg", "A picture of a turn.")
