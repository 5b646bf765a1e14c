"""The HTTP application: the routes, what stands before them, and how errors leave."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import Callable, Coroutine
from operator import attrgetter
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mv2v_engine import __version__
from mv2v_engine.serving.config import ServingConfig
from mv2v_engine.serving.errors import ApiError
from mv2v_engine.serving.http.auth import Authentication
from mv2v_engine.serving.http.bodies import BodyLimit, no_json
from mv2v_engine.serving.http.fields import field_error
from mv2v_engine.serving.http.headers import (
    SECURITY,
    SecurityHeaders,
    SiteGuard,
    cors_options,
    header,
    refusal,
)
from mv2v_engine.serving.http.page_files import PageFiles
from mv2v_engine.serving.http.routes import (
    jobs,
    openrouter,
    sessions,
    streams,
    system,
    turns,
    videos,
)
from mv2v_engine.serving.http.routes.parameters import BEARER, known_parameters
from mv2v_engine.serving.http.statuses import JobStatuses
from mv2v_engine.serving.service import Service
from mv2v_engine.serving.watch.logs import log_ids
from mv2v_engine.serving.watch.metrics import Metrics
from mv2v_engine.serving.watch.percent import Percentages

REQUEST_ID = "X-Request-ID"
_RAW_ID = REQUEST_ID.lower().encode()
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
OWNED = (
    sessions.router,
    turns.router,
    jobs.router,
    streams.router,
    videos.router,
    openrouter.router,
)
ROUTERS = (*OWNED, system.router)
# codes of what the framework itself refuses
_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "too_large",
    415: "unsupported_media",
}
# what FastAPI says of brackets without an end, and of other JSON that cannot be read
_NO_JSON = "There was an error parsing the body"


class Application(FastAPI):
    """Whose schema knows the service's errors alone."""

    def openapi(self) -> dict[str, Any]:
        """The schema, without the framework's own shape of validation errors."""
        if self.openapi_schema is None:
            schema = super().openapi()
            for operations in schema["paths"].values():
                for operation in operations.values():
                    # it promises 422 wherever a path has a parameter, also where any text will do
                    if "HTTPValidationError" in json.dumps(operation["responses"].get("422", {})):
                        del operation["responses"]["422"]
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
        assert self.openapi_schema is not None
        return self.openapi_schema


def create_app(
    service: Service, config: ServingConfig, metrics: Metrics, percentages: Percentages
) -> Application:
    """The application over a service that somebody else starts and stops.

    metrics, percentages: listeners of the service. state.stopping ends all streams of events.
    """
    before = [
        Middleware(Observed, metrics=metrics),
        Middleware(SecurityHeaders),
        Middleware(SiteGuard, config=config),
        Middleware(Authentication, tokens=config.tokens),
        Middleware(BodyLimit, limits=config.limits),
        Middleware(HeadsOnly),
        Middleware(JobStatuses, service=service),
    ]
    if config.cors_origins:
        before.insert(2, Middleware(CORSMiddleware, **cors_options(config.cors_origins)))
    app = Application(
        title="mv2v_engine",
        summary="Multi-turn video-to-video generation that remembers its own earlier turns",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        middleware=before,
        redirect_slashes=False,
        dependencies=[Depends(known_parameters)],
        generate_unique_id_function=attrgetter("name"),
        exception_handlers={
            ApiError: _refused,
            RequestValidationError: _invalid,
            HTTPException: _of_framework,
            Exception: _broken,
        },
    )
    app.state.service, app.state.config = service, config
    app.state.metrics, app.state.percentages = metrics, percentages
    app.state.stopping = asyncio.Event()
    for router in OWNED:
        app.include_router(router, dependencies=[Depends(BEARER)])
    app.include_router(system.router)
    app.router.routes.append(streams.SOURCE_SOCKET)
    files = PageFiles()
    app.mount("/page", files)
    for path, name in (("/", "index.html"), ("/docs", "docs.html")):
        app.get(path, include_in_schema=False)(_page_of(files, name))
    metrics.watch_routes(route.path for route in app.routes if isinstance(route, Route))
    return app


def _page_of(files: PageFiles, name: str) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    async def page(request: Request) -> Response:
        return files.response(name, request)

    return page


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return refusal(error)


async def _invalid(request: Request, error: Exception) -> Response:
    """The first field that is wrong, in one line; what was sent is not sent back."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return refusal(await _no_json(request, error))
    if isinstance(first.get("input"), bytes):
        # the framework reads no JSON of it, and shows it to the model as it came
        kind = request.headers.get("content-type", "")
        got = repr(kind[:100]) if kind else "no Content-Type"
        message = f"an application/json body is expected, got {got}"
        return refusal(ApiError("unsupported_media", message))
    return refusal(field_error(error.errors(), _fields(request), 1))


async def _no_json(request: Request, error: Exception) -> ApiError:
    """error: of the framework, raised from what reading the body has raised."""
    why = no_json(error.__cause__, await request.body())
    return ApiError("malformed_request", f"the body {why}")


def _fields(request: Request) -> list[str]:
    """The fields of the body that a request's route takes."""
    body = getattr(request.scope.get("route"), "body_field", None)
    model = None if body is None else body.field_info.annotation
    return list(getattr(model, "model_fields", ()))


async def _of_framework(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.detail == _NO_JSON:
        return refusal(await _no_json(request, error))
    code, message = _CODES.get(error.status_code, "malformed_request"), error.detail
    if code == "not_found":
        message = f"there is nothing at {request.url.path[:200]!r}; /docs lists the routes"
    elif code == "method_not_allowed":
        allowed = ", ".join(_methods(request))
        message = f"{request.url.path[:200]!r} takes {allowed}, not {request.method[:20]!r}"
        return refusal(ApiError(code, message, headers={"Allow": allowed}))
    return refusal(ApiError(code, message, headers=error.headers))


def _methods(request: Request) -> list[str]:
    """What an address can be asked; the framework's own answer names its first route's alone."""
    path = request.url.path
    methods: set[str] = set()
    for router in ROUTERS:
        for route in router.routes:
            if isinstance(route, Route) and route.path_regex.match(path):
                methods |= route.methods or set()
    methods |= {"HEAD"} if "GET" in methods else set()
    return sorted(methods or {"GET"})


async def _broken(request: Request, error: Exception) -> Response:
    """A fault of ours. The framework raises it once more, for the log; the client learns none."""
    answer = refusal(ApiError("internal", "a fault of the service; its log says more"))
    # sent from outside of all that adds headers
    answer.headers.update(SECURITY)
    answer.headers[REQUEST_ID] = request.state.request_id
    return answer


class HeadsOnly:
    """Answers HEAD as GET would be answered, without the body; a stream ends at its head."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        is_answered = False

        async def head_alone(message: Message) -> None:
            nonlocal is_answered
            if is_answered:
                return
            is_answered = message["type"] == "http.response.start"
            await send(message)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        async def gone() -> Message:
            """What a client's leaving looks like, to whoever goes on with a body."""
            return {"type": "http.disconnect"} if is_answered else await receive()

        await self._app({**scope, "method": "GET"}, gone, head_alone)


class Observed:
    """Counts and times requests by route, never by address, and gives each an id.

    The id is the client's, if it is one that a log can hold; every answer tells it, and every line
    of the log that is written on the way.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # what it stays if the application fails before it answers
        status = 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                named = (_RAW_ID, request_id.encode())
                message = {**message, "headers": [*message["headers"], named]}
            await send(message)

        began = time.perf_counter()
        given = header(scope, _RAW_ID).decode("latin-1")
        request_id = given if _SANE_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        try:
            with log_ids(request=request_id):
                await self._app(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.observe_request(route, status, time.perf_counter() - began)
