"""What routes take from a request, declared once."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Depends, Header, Path, Query, Request
from fastapi.security import HTTPBearer

from mv2v_engine.serving.config import ServingConfig
from mv2v_engine.serving.errors import ApiError
from mv2v_engine.serving.http.fields import unknown_name
from mv2v_engine.serving.http.schemas import JOB_ID, SESSION_ID
from mv2v_engine.serving.service import Service

# used by the schema alone: `auth` has decided before a route is reached
BEARER = HTTPBearer(auto_error=False, description="needed where the service has tokens")
# what any route under /v1 may answer, and any that reads a body
ANY = (
    "wrong_host",
    "authentication_required",
    "invalid_request",
    "internal",
    "not_ready",
    "too_many_connections",
)
BODY = (
    "malformed_request",
    "wrong_origin",
    "request_timeout",
    "too_large",
    "unsupported_media",
)


async def _owner(request: Request) -> str:
    owner: str = request.state.owner
    return owner


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _config(request: Request) -> ServingConfig:
    config: ServingConfig = request.app.state.config
    return config


async def known_parameters(request: Request) -> None:
    """Refuse a query parameter that the route does not have, or that is given twice.

    The pages, which have no place in the schema, are opened from links that may carry anything.

    Raises invalid_request.
    """
    route = request.scope["route"]
    if not route.include_in_schema:
        return
    known = [field.alias for field in route.dependant.query_params]
    seen = set()
    for name, _ in request.query_params.multi_items():
        if name not in known:
            has_body = request.method in ("POST", "PATCH")
            none = "this route has none" + (": send fields in the body" if has_body else "")
            raise unknown_name("query parameter", name, known, none)
        if name in seen:
            message = f"the query parameter {name!r} is given twice; give it once"
            raise ApiError("invalid_request", message, param=name)
        seen.add(name)


Owner = Annotated[str, Depends(_owner)]
Serving = Annotated[Service, Depends(_service)]
Configured = Annotated[ServingConfig, Depends(_config)]

# a name of another form is simply not found, so the patterns are for the schema alone
A_SESSION: dict[str, Any] = {"pattern": "^session_[0-9a-f]{24}$"}
_A_JOB: dict[str, Any] = {"pattern": "^job_[0-9a-f]{24}$"}
SessionId = Annotated[str, Path(examples=[SESSION_ID], json_schema_extra=A_SESSION)]
JobId = Annotated[str, Path(examples=[JOB_ID], json_schema_extra=_A_JOB)]
ModelId = Annotated[str, Path(examples=["tiny-nvs"])]
TurnNumber = Annotated[int, Path(ge=1, le=2**31 - 1, examples=[1])]

Limit = Annotated[int, Query(ge=1, le=100, description="how many at most")]
Order = Annotated[Literal["asc", "desc"], Query(description="by creation; desc is newest first")]
AfterSession = Annotated[
    str | None,
    Query(description="those that follow this one", json_schema_extra=A_SESSION),
]
AfterJob = Annotated[
    str | None, Query(description="those that follow this one", json_schema_extra=_A_JOB)
]
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=200,
        pattern="^[!-~]+$",
        description="the same key and request are done once, however often they are sent",
    ),
]
