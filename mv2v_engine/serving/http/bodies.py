"""Request bodies: bounded in bytes, in the time between them, and in how many one token sends."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections import Counter

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mv2v_engine.serving.config import Limits
from mv2v_engine.serving.errors import ApiError
from mv2v_engine.serving.http.headers import refusal

JSON_BYTES = 2 << 20
# what a form has around its file: boundaries, headers, other fields
FORM_BYTES = 1 << 20
UPLOADS = frozenset({"/v1/sessions", "/v1/videos"})
# frames for a stream, which come as long as it lasts and are slowed to its pace
_ENDLESS = re.compile("/v1/streams/[^/]+/source")
# a client that is refused still sends; it reads the answer only if it is let finish a little
_DRAINED_BYTES, _DRAINED_SECONDS = 16 << 20, 5.0


# levels to which JSON may be nested: a trajectory needs five
_DEPTH = 100
# texts, in which brackets mean nothing, and brackets; a text that is not closed goes to the end
_BRACKETS = re.compile(r'"(?:[^"\\]+|\\.)*"?|[\[{\]}]', re.DOTALL)


def no_json(error: BaseException | None, body: bytes | str) -> str:
    """Why a body is not taken as JSON, and where, in words that go behind the body's name.

    error: what `json.loads` said of it.
    """
    if isinstance(error, UnicodeDecodeError):
        return f"is no JSON: it is no {error.encoding.upper()} at byte {error.start}"
    if isinstance(error, json.JSONDecodeError):
        said = error.msg[:1].lower() + error.msg[1:].removesuffix(" at")
        return f"is no JSON: {said} at character {error.pos}"
    if isinstance(body, bytes):
        body = body.decode(json.detect_encoding(body), "surrogatepass")
    if isinstance(error, RecursionError):
        depth = 0
        for found in _BRACKETS.finditer(body):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
            if depth > _DEPTH:
                return (
                    f"is no JSON that is taken: it is nested more than {_DEPTH} deep at character "
                    f"{found.start()}; send a flatter one"
                )
    most = sys.get_int_max_str_digits()
    long = re.search(f"[0-9]{{{most + 1}}}", body) if most else None
    if isinstance(error, ValueError) and long is not None:
        return (
            f"is no JSON that is taken: the number at character {long.start()} has more than "
            f"{most} digits; send a shorter one"
        )
    return "is no JSON that can be read"


class BodyLimit:
    """Refuses bodies that are too large, that stop coming for `idle_seconds`, or too many uploads.

    What is no upload must be whole by then, and is a little JSON. Routes that take uploads may have
    `limits.upload_bytes` and a form around them. An upload is under way from its header to its
    answer.
    """

    def __init__(self, app: ASGIApp, limits: Limits, idle_seconds: float = 30.0) -> None:
        self._app = app
        self._limits, self._idle_seconds = limits, idle_seconds
        self._uploads: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if _ENDLESS.fullmatch(scope["path"]):
            await self._bounded(scope, receive, send, sys.maxsize)
            return
        headers = Headers(scope=scope)
        is_upload = scope["method"] == "POST" and scope["path"] in UPLOADS
        if not is_upload or headers.get("content-type", "").lower().startswith("application/json"):
            await self._bounded(scope, receive, send, JSON_BYTES)
            return
        owner = scope["state"]["owner"]
        if self._uploads[owner] >= self._limits.uploads:
            await _drain(receive)
            most = self._limits.uploads
            wait = max(1, round(self._limits.probe_seconds / most))
            error = ApiError(
                "too_many_uploads",
                f"{most} uploads of this token are under way, and no more may be; try again in "
                f"{wait} s",
                headers={"Retry-After": str(wait)},
            )
            await refusal(error)(scope, receive, send)
            return
        self._uploads[owner] += 1
        try:
            await self._bounded(scope, receive, send, self._limits.upload_bytes + FORM_BYTES)
        finally:
            self._uploads[owner] -= 1
            # owners that are gone are not kept: they would only take room
            self._uploads += Counter()

    async def _bounded(self, scope: Scope, receive: Receive, send: Send, most: int) -> None:
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length[:20]) > most:
            await _drain(receive)
            await refusal(ApiError("too_large", _too_large(most)))(scope, receive, send)
            return
        seen, is_whole = 0, False
        is_upload, ends = most != JSON_BYTES, asyncio.get_running_loop().time() + self._idle_seconds

        async def bounded() -> Message:
            nonlocal seen, is_whole
            if is_whole:
                # whoever asks now waits for the client to leave, for as long as that takes
                return await receive()
            try:
                left = ends - asyncio.get_running_loop().time()
                message = await asyncio.wait_for(
                    receive(), self._idle_seconds if is_upload else left
                )
            except asyncio.TimeoutError:
                raise HTTPException(
                    408,
                    f"no byte of the body came for {self._idle_seconds:g} s; send it again",
                ) from None
            is_whole = not message.get("more_body", False)
            seen += len(message.get("body", b""))
            if seen > most:
                if not is_whole:
                    await _drain(receive)
                raise HTTPException(413, _too_large(most))
            return message

        await self._app(scope, bounded, send)


def _too_large(most: int) -> str:
    return f"the body has more than {most} bytes, which is all that this route takes; send less"


async def _drain(receive: Receive) -> None:
    """Let the client send on for a little."""
    seen, loop = 0, asyncio.get_running_loop()
    ends = loop.time() + _DRAINED_SECONDS
    while seen < _DRAINED_BYTES:
        try:
            message = await asyncio.wait_for(receive(), ends - loop.time())
        except asyncio.TimeoutError:
            return
        seen += len(message.get("body", b""))
        if not message.get("more_body", False):
            return
