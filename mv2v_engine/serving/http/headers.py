"""What every answer carries, and which hosts and origins a service without tokens listens to."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mv2v_engine.serving.config import ServingConfig
from mv2v_engine.serving.errors import ApiError

# blob: because the page fetches videos with its token and plays what it got; data: because the
# previews of a turn under way come as such within its events
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' blob: data:",
        "media-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
SECURITY: Mapping[str, str] = MappingProxyType(
    {
        "Content-Security-Policy": CONTENT_SECURITY_POLICY,
        "Cross-Origin-Opener-Policy": "same-origin",
        "Permissions-Policy": "camera=(self), geolocation=(), microphone=()",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }
)
_RAW = {name.lower().encode(): value.encode() for name, value in SECURITY.items()}
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Refusal(JSONResponse):
    """An error as an answer, which tells the request's id; of a WebSocket that is not open yet,
    too."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.to_dict(), error.status, error.headers)
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = scope.get("state", {}).get("request_id")
        self.body = self.render(self._error.to_dict(request_id))
        self.headers["content-length"] = str(len(self.body))
        await super().__call__(scope, receive, send)


def refusal(error: ApiError) -> Refusal:
    """The answer that an error stands for."""
    return Refusal(error)


class SecurityHeaders:
    """Adds `SECURITY` to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                added = [one for one in _RAW.items() if one[0] not in given]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)


class SiteGuard:
    """Keeps other sites' pages from using a service that asks for no token.

    A page can name this machine by a host of its own (DNS rebinding), which the Host header shows,
    and can send simple requests across sites, which the Origin header shows. A token is sent by
    neither, so a service with tokens needs no guard and may stand behind any proxy.
    """

    def __init__(self, app: ASGIApp, config: ServingConfig) -> None:
        self._app = app
        self._is_open = not config.tokens
        self._hosts = _LOOPBACK | {config.host} if config.is_loopback else None
        self._origins = frozenset(config.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._is_open and scope["type"] in ("http", "websocket"):
            # a page of any site may open a WebSocket, so its method is one that changes something
            error = self._problem(scope.get("method", "WEBSOCKET"), Headers(scope=scope))
            if error is not None:
                await refusal(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _problem(self, method: str, headers: Headers) -> ApiError | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._hosts is not None and host_name(host) not in self._hosts:
            return ApiError(
                "wrong_host",
                f"this service answers as {' or '.join(sorted(self._hosts))} alone, not as "
                f"{host[:100]!r}; use one of these names, or configure tokens",
            )
        if origin is None or method in _SAFE or origin in self._origins:
            return None
        # a page of no site of its own says "null"
        if urlsplit(origin).netloc.lower() == host.lower() and host:
            return None
        return ApiError(
            "wrong_origin",
            f"a page of {origin[:100]!r} may not change anything here; name its origin with "
            "--cors-origin if it should, or configure tokens",
        )


def header(scope: Scope, name: bytes) -> bytes:
    """The value of a request's header, in lower case; empty if it has none."""
    return next((value for given, value in scope["headers"] if given == name), b"")


@functools.lru_cache(256)
def host_name(netloc: str) -> str | None:
    """The host of a Host header, lower-case and without port; None if it is none."""
    try:
        return urlsplit(f"//{netloc}").hostname
    except ValueError:
        return None


def cors_options(origins: Sequence[str]) -> dict[str, Any]:
    """What Starlette's CORS middleware is given for these origins."""
    return {
        "allow_origins": list(origins),
        "allow_methods": ["GET", "POST", "PUT", "PATCH", "DELETE"],
        "allow_headers": [
            "Authorization",
            "Content-Type",
            "Idempotency-Key",
            "Last-Event-ID",
            "X-Request-ID",
        ],
        "expose_headers": ["Content-Range", "Location", "Retry-After", "X-Request-ID"],
    }
