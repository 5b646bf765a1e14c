"""The state of a job, asked for again and again: the same bytes for as long as nothing changed."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mv2v_engine.serving.http.headers import header
from mv2v_engine.serving.service import Service

PREFIX = "/v1/jobs/"
_MOST = 4096  # answers that are kept, the ones asked for last
_PRIVATE = (b"cache-control", b"private, no-cache")


@dataclass(frozen=True, slots=True)
class _Kept:
    """An answer. version: of the job when it was asked for. route: what it is counted under."""

    version: tuple[int, int]
    route: Any
    headers: list[tuple[bytes, bytes]]
    body: bytes
    tag: bytes


class JobStatuses:
    """Answers `GET /v1/jobs/{job_id}` from what was answered before, while the job has not changed.

    A job may have changed once anything was written to the database, or an event of it has come:
    then the application is asked again. Every answer has a tag (`ETag`), and a client that sends
    it back (`If-None-Match`) gets 304 and no body while it holds.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._kept: OrderedDict[tuple[str, str], _Kept] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        job_id = path.removeprefix(PREFIX)
        if (
            scope["type"] != "http"
            or scope["method"] != "GET"
            or job_id == path
            or "/" in job_id
            or scope["query_string"]
        ):
            await self._app(scope, receive, send)
            return
        key = scope["state"]["owner"], job_id
        # before the question, so that a change under way makes the next one ask again
        version = self._service.job_version(job_id)
        kept = self._kept.get(key)
        if kept is None or kept.version != version or version is None:
            await self._ask(key, version, scope, receive, send)
            return
        self._kept.move_to_end(key)
        scope["route"] = kept.route
        await _answer(kept, scope, send)

    async def _ask(
        self,
        key: tuple[str, str],
        version: tuple[int, int] | None,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        start: Message = {}
        body = b""

        async def take(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start" and message["status"] == 200:
                start = message
            elif not start:
                await send(message)
            else:
                body += message.get("body", b"")

        await self._app(scope, receive, take)
        if not start:
            return
        tag = b'"%s"' % hashlib.blake2s(body, digest_size=12).hexdigest().encode()
        headers = [*start["headers"], (b"etag", tag), _PRIVATE]
        kept = _Kept(version or (0, 0), scope.get("route"), headers, body, tag)
        if version is not None:
            self._kept[key] = kept
            self._kept.move_to_end(key)
            if len(self._kept) > _MOST:
                self._kept.popitem(last=False)
        await _answer(kept, scope, send)


async def _answer(kept: _Kept, scope: Scope, send: Send) -> None:
    start = {"type": "http.response.start", "status": 200, "headers": kept.headers}
    body = kept.body
    given = [one.strip() for one in header(scope, b"if-none-match").split(b",")]
    if b"*" in given or any(one.removeprefix(b"W/") == kept.tag for one in given):
        start |= {"status": 304, "headers": [(b"etag", kept.tag), _PRIVATE]}
        body = b""
    await send(start)
    await send({"type": "http.response.body", "body": body})
