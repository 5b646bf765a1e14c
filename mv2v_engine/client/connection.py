"""A connection to the service: requests that are sent, and sent again where that is harmless.

A wire carries them, blocking or in an event loop; both have the same coroutines.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

try:
    import httpx
except ImportError as error:
    raise ImportError("the client needs httpx; pip install 'mv2v_engine[client]'") from error

from mv2v_engine.client.answers import Event, ServiceError, UnreachableError

Video = Path | str | bytes | BinaryIO


def without_none(**fields: Any) -> dict[str, Any]:
    """The fields that have a value."""
    return {name: value for name, value in fields.items() if value is not None}


class Blocking:
    """A wire none of whose coroutines waits, so that each is taken in one go."""

    def __init__(self, **settings: Any) -> None:
        self._http = httpx.Client(**settings)
        self.build_request = self._http.build_request

    async def send(self, request: httpx.Request) -> httpx.Response:
        return self._http.send(request, stream=True)

    async def parts(self, response: httpx.Response) -> AsyncIterator[bytes]:
        for part in response.iter_bytes():
            yield part

    async def end(self, response: httpx.Response) -> None:
        response.close()

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def close(self) -> None:
        self._http.close()


class Waiting:
    """A wire in an event loop."""

    def __init__(self, **settings: Any) -> None:
        self._http = httpx.AsyncClient(**settings)
        self.build_request = self._http.build_request

    async def send(self, request: httpx.Request) -> httpx.Response:
        return await self._http.send(request, stream=True)

    def parts(self, response: httpx.Response) -> AsyncIterator[bytes]:
        return response.aiter_bytes()

    async def end(self, response: httpx.Response) -> None:
        await response.aclose()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        await self._http.aclose()


class Connection:
    """Requests to one service.

    pauses: seconds before a request that got no answer is sent again.
    """

    pauses: tuple[float, ...] = (0.2, 1.0, 3.0)

    def __init__(self, wire: Blocking | Waiting) -> None:
        self._wire = wire
        self.close, self.parts, self.sleep = wire.close, wire.parts, wire.sleep

    @asynccontextmanager
    async def answer(
        self,
        method: str,
        path: str,
        *,
        key: str | None = None,
        files: Sequence[tuple[str, Video]] = (),
        headers: Mapping[str, str] | None = None,
        **how: Any,
    ) -> AsyncIterator[httpx.Response]:
        """An answer of success, whose body is still to be read.

        key: of idempotency, under which a POST may be sent again. files: fields and their videos or
        images. how: what else httpx builds a request from.

        Raises:
            ServiceError: the service refused the request.
            UnreachableError: no answer came, or it broke off.
            OSError: a file's path cannot be opened.
        """
        headers = dict(headers or {})
        if key is not None:
            headers["Idempotency-Key"] = key
        is_repeatable = method != "POST" or key is not None or path.endswith("/cancel")
        streams = [given for _, given in files if _is_file(given)]
        starts = [(file, file.tell()) for file in streams if file.seekable()]
        can_rewind = len(starts) == len(streams)
        for pause in (*(self.pauses if is_repeatable else ()), None):
            opened: list[BinaryIO] = []
            try:
                for file, start in starts:
                    file.seek(start)
                if files:
                    how["files"] = []
                for field, given in files:
                    name, content = _content(given)
                    if content is not given and _is_file(content):
                        opened.append(content)
                    how["files"].append((field, (name, content)))
                request = self._wire.build_request(method, path, headers=headers, **how)
                response = await self._wire.send(request)
            except httpx.TransportError as error:
                if pause is None or not can_rewind:
                    raise _unreachable(error) from error
                await self._wire.sleep(pause)
                continue
            finally:
                for file in opened:
                    file.close()
            break
        try:
            if not response.is_success:
                raise _refusal(response, await self.body(response))
            yield response
        except httpx.TransportError as error:
            raise _unreachable(error) from error
        finally:
            await self._wire.end(response)

    async def body(self, response: httpx.Response) -> bytes:
        """An answer's bytes to their end."""
        return b"".join([part async for part in self._wire.parts(response)])

    async def json(self, method: str, path: str, **how: Any) -> Any:
        """What an answer of JSON holds, as `answer` gets it; None of one without a body."""
        async with self.answer(method, path, **how) as response:
            body = await self.body(response)
        return json.loads(body) if body else None

    async def pages(self, path: str, **params: Any) -> AsyncGenerator[Any, None]:
        """The items of a list, page after page."""
        while True:
            page = await self.json("GET", path, params=without_none(limit=100, **params))
            for item in page["data"]:
                yield item
            if not page["has_more"]:
                return
            params["after"] = page["last_id"]


def _is_file(video: object) -> TypeGuard[BinaryIO]:
    return hasattr(video, "read")


def _content(video: Video) -> tuple[str, bytes | BinaryIO]:
    """The name and the bytes, or the open file, of a video or an image.

    Raises:
        OSError: a path cannot be opened.
    """
    if isinstance(video, str | Path):
        return Path(video).name, open(video, "rb")
    return "file", video


def _unreachable(error: httpx.TransportError) -> UnreachableError:
    said = str(error) or type(error).__name__
    return UnreachableError(f"no answer from the service: {said}; is it started, and there?")


def _refusal(response: httpx.Response, body: bytes) -> ServiceError:
    """The error of an answer; of one that is not the service's, what can be told of it."""
    status, headers = response.status_code, response.headers
    try:
        error = json.loads(body)["error"]
        code, message, param = error["code"], error["message"], error.get("param")
    except (ValueError, KeyError, TypeError):
        code, param = "internal", None
        message = f"{response.url} answered with status {status}, and not as the service does"
    wait = headers.get("Retry-After", "")
    return ServiceError(
        code,
        message,
        status=status,
        param=param,
        retry_after=float(wait) if wait.isdigit() else None,
        request_id=headers.get("X-Request-ID"),
    )


async def events_of(parts: AsyncIterator[bytes]) -> AsyncIterator[Event]:
    """Server-sent events in the form that the service gives them."""
    rest = b""
    async for part in parts:
        *blocks, rest = (rest + part).split(b"\n\n")
        for block in blocks:
            lines = (line.split(": ", 1) for line in block.decode().splitlines())
            fields = {words[0]: words[-1] for words in lines if words[0]}
            if "data" in fields:
                yield Event(int(fields["id"]), fields["event"], json.loads(fields["data"]))
