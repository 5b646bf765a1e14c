"""Jobs: turns that were asked for, their progress as it happens, and an end to them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from mv2v_engine.serving.http.routes.parameters import (
    A_SESSION,
    ANY,
    AfterJob,
    JobId,
    Limit,
    Order,
    Owner,
    Serving,
)
from mv2v_engine.serving.http.schemas import SESSION_ID, Answers, Job, Jobs, refusals
from mv2v_engine.serving.store.records import JobEvent

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
# proxies close a connection that is silent for longer
KEEP_ALIVE_SECONDS = 15.0
_EVENT = {
    "type": "object",
    "required": ["id", "event", "data"],
    "properties": {
        "id": {"type": "string", "description": "its number, which increases"},
        "event": {"type": "string", "description": "the type that data has"},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "description": "an object with the type queued (position), started, stage_started "
            "(stage), stage_done (stage, seconds), step_done (stage, step, total, seconds_left), "
            "preview (step, total, image), for who asked for previews, "
            "window_started, window_done (number, total), finished (turn), failed (error) or "
            "cancelled",
        },
    },
    "examples": [
        {
            "id": "3",
            "event": "step_done",
            "data": '{"type": "step_done", "stage": "sampling", "step": 1, "total": 10, '
            '"seconds_left": 2.9}',
        }
    ],
}
_STREAM: Answers = {
    200: {
        "description": "every event of the job, numbered, until its end; a comment line when "
        "nothing happens",
        "content": {"text/event-stream": {"schema": _EVENT}},
    }
}


@router.get("", response_model=Jobs, responses=refusals(*ANY, "not_found"))
async def list_jobs(
    service: Serving,
    owner: Owner,
    session: Annotated[
        str | None,
        Query(
            description="of this session alone",
            examples=[SESSION_ID],
            json_schema_extra=A_SESSION,
        ),
    ] = None,
    limit: Limit = 20,
    after: AfterJob = None,
    order: Order = "desc",
) -> Any:
    """Jobs by creation."""
    page = await service.jobs(
        owner, session=session, limit=limit, after=after, is_newest_first=order == "desc"
    )
    data = [Job.model_validate(record) for record in page.items]
    return Jobs.of(data, has_more=page.has_more)


_TAGGED: Answers = {304: {"description": "If-None-Match has the tag (ETag) of the state as it is"}}


@router.get("/{job_id}", response_model=Job, responses=_TAGGED | refusals(*ANY, "not_found"))
async def get_job(service: Serving, owner: Owner, job_id: JobId) -> Job:
    """A job's state, its place in the queue or its last event."""
    return Job.model_validate(await service.job(owner, job_id))


_CANCEL = refusals(*ANY, "wrong_origin", "not_found")


@router.post("/{job_id}/cancel", response_model=Job, responses=_CANCEL)
@router.delete("/{job_id}", response_model=Job, responses=_CANCEL, name="delete_job")
async def cancel_job(service: Serving, owner: Owner, job_id: JobId) -> Job:
    """End a job that waits at once, one that runs at its next step."""
    return Job.model_validate(await service.cancel(owner, job_id))


@router.get(
    "/{job_id}/events",
    response_class=Response,
    responses=_STREAM | refusals(*ANY, "not_found"),
)
async def stream_events(
    request: Request,
    service: Serving,
    owner: Owner,
    job_id: JobId,
    last_event_id: Annotated[
        int, Header(ge=0, le=2**63 - 1, description="events up to this number are not sent again")
    ] = 0,
) -> Response:
    """Server-sent events: stages, steps and windows as they happen, with the seconds left.

    The stream ends with the job. A client that leaves changes nothing and can take it up again.
    """
    events = await service.events(owner, job_id, after=last_event_id)
    state = request.app.state
    body = event_lines(events, state.stopping, state.metrics.event_stream())
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(body, headers=headers, media_type="text/event-stream")


async def event_lines(
    events: AsyncIterator[JobEvent],
    stopping: asyncio.Event,
    counted: AbstractContextManager[None],
    *,
    keep_alive: float = KEEP_ALIVE_SECONDS,
) -> AsyncIterator[str]:
    """Events in the format of text/event-stream, until the last one or the service's end.

    counted: entered while the stream is read.
    """
    ending = asyncio.ensure_future(stopping.wait())
    coming = asyncio.ensure_future(anext(events, None))
    with counted:
        try:
            while True:
                await asyncio.wait(
                    {coming, ending}, timeout=keep_alive, return_when=asyncio.FIRST_COMPLETED
                )
                if coming.done():
                    event = coming.result()
                    if event is None:
                        return
                    # before the yield, where a client that leaves ends this: then there is always
                    # a task under way, and cancelling it ends the iterator too
                    coming = asyncio.ensure_future(anext(events, None))
                    data = json.dumps(event.data, ensure_ascii=False)
                    yield f"id: {event.number}\nevent: {event.kind}\ndata: {data}\n\n"
                elif ending.done():
                    return
                else:
                    yield ": nothing new\n\n"
        finally:
            ending.cancel()
            coming.cancel()
