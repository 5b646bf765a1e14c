"""Bearer tokens: each is an owner with sessions of its own."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mv2v_engine.serving.errors import ApiError
from mv2v_engine.serving.http.headers import refusal

# what belongs to somebody; health, metrics, the page and the schema do not
PROTECTED = ("/v1/", "/api/v1/")


def owner_of(token: str) -> str:
    """What the database calls a token's owner; the token itself is kept nowhere."""
    return hashlib.sha256(token.encode()).hexdigest()


class Authentication:
    """Puts the owner into `scope["state"]`, "" without tokens; refuses before a body is read."""

    def __init__(self, app: ASGIApp, tokens: Iterable[str]) -> None:
        self._app = app
        self._owners = [owner_of(token) for token in tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and scope["path"].startswith(PROTECTED):
            # a browser asks without a token whether it may ask
            is_preflight = scope.get("method") == "OPTIONS"
            owner = "" if is_preflight or not self._owners else self._owner(_token_of(scope))
            if owner is None:
                error = ApiError(
                    "authentication_required",
                    "this service needs a token: send the header 'Authorization: Bearer TOKEN' "
                    "with one of those that it was started with",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await refusal(error)(scope, receive, send)
                return
            scope.setdefault("state", {})["owner"] = owner
        await self._app(scope, receive, send)

    def _owner(self, token: str | None) -> str | None:
        if token is None:
            return None
        given, found = owner_of(token), None
        # all of them are compared, so that time tells nothing of which one it was
        for owner in self._owners:
            if hmac.compare_digest(given, owner):
                found = owner
        return found


def _token_of(scope: Scope) -> str | None:
    """The token of a request; a browser's WebSocket, which has no such header, names it in hex
    among its protocols."""
    scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    for protocol in scope.get("subprotocols", ()):
        kind, _, digits = protocol.partition(".")
        if kind == "token":
            with suppress(ValueError):
                return bytes.fromhex(digits).decode()
    return None
