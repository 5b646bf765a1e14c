"""Streams: begun, read while they grow, told another prompt, ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, suppress
from typing import Annotated, Any

from fastapi import (
    APIRouter,
    Path,
    Query,
    Request,
    Response,
    WebSocket,
    WebSocketDisconnect,
    status,
)
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocketState

from mv2v_engine.serving.errors import ApiError
from mv2v_engine.serving.http.headers import refusal
from mv2v_engine.serving.http.routes.jobs import KEEP_ALIVE_SECONDS
from mv2v_engine.serving.http.routes.parameters import (
    ANY,
    BODY,
    Key,
    Limit,
    Order,
    Owner,
    Serving,
)
from mv2v_engine.serving.http.schemas import Answers, refusals
from mv2v_engine.serving.http.stream_schemas import (
    STREAM_ID,
    PromptAnswer,
    PromptRequest,
    StreamList,
    StreamRequest,
    StreamStatus,
    status_of,
)
from mv2v_engine.serving.service import Service
from mv2v_engine.serving.work.uploading import SourceUpload

router = APIRouter(prefix="/v1/streams", tags=["streams"])
_A_STREAM: dict[str, Any] = {"pattern": "^stream_[0-9a-f]{24}$"}
StreamId = Annotated[str, Path(examples=[STREAM_ID], json_schema_extra=_A_STREAM)]
AfterStream = Annotated[
    str | None, Query(description="those that follow this one", json_schema_extra=_A_STREAM)
]
BlockNumber = Annotated[int | None, Query(ge=1, le=2**31 - 1)]
# what a stream may be refused for
BEGIN = (
    "unprocessable_turn",
    "too_many_streams",
    "stream_limit",
    "idempotency_conflict",
    "disk_full",
)
_KNOWN: Answers = {
    200: {"model": StreamStatus, "description": "the stream that this key has already begun"}
}
_VIDEO: Answers = {
    200: {
        "description": "an mp4 in fragments, one a block, which plays while it comes",
        "content": {"video/mp4": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    response_model=StreamStatus,
    responses=_KNOWN | refusals(*ANY, *BODY, *BEGIN),
)
async def create_stream(
    response: Response, service: Serving, owner: Owner, body: StreamRequest, key: Key = None
) -> StreamStatus:
    """Begin a stream. Blocks are made at once; read them at its video."""
    stream, is_new = await service.begin_stream(owner, body.to_dict(), key=key)
    if not is_new:
        response.status_code = status.HTTP_200_OK
    response.headers["Location"] = f"/v1/streams/{stream.record.id}"
    return status_of(stream)


@router.get("", response_model=StreamList, responses=refusals(*ANY, "not_found"))
async def list_streams(
    service: Serving,
    owner: Owner,
    limit: Limit = 20,
    after: AfterStream = None,
    order: Order = "desc",
) -> Any:
    """Streams by creation."""
    page = service.streams.listed(owner, limit=limit, after=after, is_newest_first=order == "desc")
    return StreamList.of([status_of(stream) for stream in page.items], has_more=page.has_more)


@router.get("/{stream_id}", response_model=StreamStatus, responses=refusals(*ANY, "not_found"))
async def get_stream(service: Serving, owner: Owner, stream_id: StreamId) -> StreamStatus:
    """How far a stream is, what it waits for, and how fast its blocks come."""
    return status_of(service.streams.find(owner, stream_id))


@router.post(
    "/{stream_id}/prompt",
    response_model=PromptAnswer,
    responses=refusals(*ANY, *BODY, "not_found", "busy", "unprocessable_turn", "disk_full"),
)
async def set_stream_prompt(
    service: Serving, owner: Owner, stream_id: StreamId, body: PromptRequest
) -> PromptAnswer:
    """Change what a stream shows, from the next block on; the one under way keeps its prompt."""
    first = await service.stream_prompt(owner, stream_id, body.prompt)
    return PromptAnswer(id=stream_id, prompt=body.prompt, first_block=first)


_END = refusals(*ANY, "wrong_origin", "not_found")


@router.post("/{stream_id}/cancel", response_model=StreamStatus, responses=_END)
async def cancel_stream(service: Serving, owner: Owner, stream_id: StreamId) -> StreamStatus:
    """End a stream at its next step. Its finished blocks stay."""
    return status_of(await service.cancel_stream(owner, stream_id))


@router.delete("/{stream_id}", status_code=status.HTTP_204_NO_CONTENT, responses=_END)
async def delete_stream(service: Serving, owner: Owner, stream_id: StreamId) -> None:
    """End a stream and remove all of it."""
    await service.delete_stream(owner, stream_id)


@router.get(
    "/{stream_id}/video",
    response_class=Response,
    responses=_VIDEO | refusals(*ANY, "not_found", "damaged"),
)
async def get_stream_video(
    request: Request,
    service: Serving,
    owner: Owner,
    stream_id: StreamId,
    first: BlockNumber = None,
    last: BlockNumber = None,
) -> Response:
    """A stream's video, block after block as they finish, to its end.

    It begins with the block `first`: if not given, with the newest one of a stream that is being
    made, and with the first one of one that has ended. With `last` it ends behind that block. Every
    block is a fragment that begins with a key frame; what a player needs before it comes first.
    """
    if first is not None and last is not None and last < first:
        message = f"last must be {first} or more, as first is, got {last}"
        raise ApiError("invalid_request", message, param="last")
    state = request.app.state
    parts = await service.stream_video(owner, stream_id, first, last, KEEP_ALIVE_SECONDS)
    body = _until(parts, state.stopping, state.metrics.stream_reader())
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(body, headers=headers, media_type="video/mp4")


_FRAMES: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
# between two messages of a WebSocket
_IDLE_SECONDS = 30.0


@router.put(
    "/{stream_id}/source",
    response_model=StreamStatus,
    responses=refusals(*ANY, *BODY, "not_found", "busy", "unprocessable_turn", "disk_full"),
    openapi_extra=_FRAMES,
)
async def put_stream_source(
    request: Request,
    service: Serving,
    owner: Owner,
    stream_id: StreamId,
    end: Annotated[bool, Query(description="no more frames will come after these")] = False,
) -> StreamStatus:
    """Send frames for a stream to edit: RGB, 8 bits a channel, of the stream's size, one after the
    other.

    The body may be as long as the stream and is read as fast as blocks are made. A block begins
    when its frames are there. A WebSocket at the same address takes the same bytes, in messages of
    any size, and the text `end`.
    """
    stream = service.streams.find(owner, stream_id)
    kind = request.headers.get("content-type", "application/octet-stream")
    if kind.partition(";")[0].strip().lower() != "application/octet-stream":
        message = (
            "raw frames are expected as application/octet-stream, got another type; decode a video "
            "first, as ffmpeg -f rawvideo -pix_fmt rgb24 does"
        )
        raise ApiError("unsupported_media", message)
    with SourceUpload(stream) as upload, suppress(ClientDisconnect):
        try:
            async for data in request.stream():
                await upload.write(data)
        except HTTPException as error:  # its length has no limit, so that it is late
            message = f"the frames stopped coming; {upload.goes_on}"
            raise ApiError("request_timeout", message) from error
        if end:
            await upload.end()
    return status_of(stream)


async def source_socket(socket: WebSocket) -> None:
    """The same as `put_stream_source` for a browser, which cannot send a body without an end.

    What is refused before it is open is an answer as any; later it is a close with its reason.
    """
    service: Service = socket.app.state.service
    try:
        stream = service.streams.find(socket.state.owner, socket.path_params["stream_id"])
        with SourceUpload(stream) as upload:
            await socket.accept("mv2v" if "mv2v" in socket.scope["subprotocols"] else None)
            while True:
                message = await asyncio.wait_for(socket.receive(), _IDLE_SECONDS)
                if message["type"] == "websocket.disconnect":
                    return
                data = message.get("bytes")
                if data is not None:
                    await upload.write(data)
                elif message.get("text") == "end":
                    await upload.end()
                    await socket.close()
                    return
                else:
                    code, words = 1003, "frames come in binary messages, and of texts there is end"
                    break
    except ApiError as error:
        if socket.application_state is WebSocketState.CONNECTING:
            await socket.send_denial_response(refusal(error))
            return
        code, words = 1008, error.message[:120]
    except asyncio.TimeoutError:
        code, words = 1001, f"no frame came for {_IDLE_SECONDS:g} s; {upload.goes_on}"
    with suppress(WebSocketDisconnect):  # it may have left by now
        await socket.close(code, words)


# beside the router, whose dependencies are of requests
SOURCE_SOCKET = WebSocketRoute(f"{router.prefix}/{{stream_id}}/source", source_socket)


async def _until(
    parts: AsyncIterator[bytes], stopping: asyncio.Event, counted: AbstractContextManager[None]
) -> AsyncIterator[bytes]:
    """The parts, until the last one or the service's end. counted: entered while they are read."""
    with counted:
        try:
            async for part in parts:
                yield part
                if stopping.is_set():
                    return
        finally:
            await parts.aclose()  # type: ignore[attr-defined]
