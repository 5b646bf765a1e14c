"""What the service is and how it does: models, health, metrics."""

from __future__ import annotations

import functools
from typing import Any

import torch
from fastapi import APIRouter, Depends, Request, Response

from mv2v_engine import __version__
from mv2v_engine.camera.trajectories import named_poses
from mv2v_engine.ops.native import ABI_VERSION
from mv2v_engine.serving.errors import ApiError
from mv2v_engine.serving.http.routes.parameters import ANY, BEARER, ModelId, Owner, Serving
from mv2v_engine.serving.http.schemas import (
    Answers,
    Guides,
    Health,
    Model,
    Models,
    Sampling,
    UploadLimits,
    Version,
    refusals,
)
from mv2v_engine.serving.service import Service

router = APIRouter()
# what a route without a token may answer
OPEN = ("wrong_host", "invalid_request")
# enough to draw a preset's path
_SAMPLES = 9
_NOT_READY: Answers = {503: {"model": Health, "description": "why not yet, or why no longer"}}
_TEXT: Answers = {
    200: {
        "description": "everything that is counted and timed, for Prometheus",
        "content": {"text/plain": {"schema": {"type": "string"}}},
    }
}


@router.get(
    "/v1/models",
    response_model=Models,
    tags=["system"],
    dependencies=[Depends(BEARER)],
    responses=refusals(*ANY),
)
async def list_models(service: Serving, owner: Owner) -> Models:
    """The one model that this service runs, what it makes, by default how, and from what."""
    return Models(data=[_model(service)])


@router.get(
    "/v1/models/{model_id}",
    response_model=Model,
    tags=["system"],
    dependencies=[Depends(BEARER)],
    responses=refusals(*ANY, "not_found"),
)
async def get_model(service: Serving, owner: Owner, model_id: ModelId) -> Model:
    """The same by its name, as OpenAI's clients ask."""
    model = _model(service)
    if model_id != model.id:
        message = f"there is no model {model_id[:100]!r} here, only {model.id!r}"
        raise ApiError("not_found", message)
    return model


def _model(service: Service) -> Model:
    about = service.require_about()
    return Model(
        id=about["engine"]["checkpoint"],
        # its weights have no date; OpenAI's clients want one
        created=0,
        owned_by="mv2v_engine",
        kind=about["kind"],
        stream=about.get("stream"),
        has_text=about["has_text"],
        guides=Guides(**about["guides"]),
        memory=about["memory"],
        presets=list(about["presets"]),
        preset_poses={name: _sampled_path(name) for name in about["presets"]},
        sampling=Sampling(**about["sampling"]),
        limits=UploadLimits.model_validate(service.config.limits),
        engine=about["engine"],
    )


@functools.cache
def _sampled_path(preset: str) -> list[Any]:
    return named_poses(preset, _SAMPLES).tolist()


@router.get("/healthz", response_model=Health, tags=["system"], responses=refusals(*OPEN))
async def health() -> Health:
    """Whether the service answers at all."""
    return Health(status="ok")


@router.get("/version", response_model=Version, tags=["system"], responses=refusals(*OPEN))
async def version(service: Serving) -> Version:
    """What runs here: the engine, torch, the native libraries' ABI, and the model with its digest.

    The model is null until it has been loaded once.
    """
    about = service.about
    return Version(
        version=__version__,
        torch=torch.__version__,
        abi=ABI_VERSION,
        model=None if about is None else about["engine"]["checkpoint"],
        model_digest=None if about is None else about.get("digest"),
    )


@router.get(
    "/readyz",
    response_model=Health,
    tags=["system"],
    responses=_NOT_READY | refusals(*OPEN),
)
async def readiness(service: Serving, response: Response) -> Health:
    """Whether turns are made: the engine is loaded and warm, the service is not stopping."""
    if service.ready:
        return Health(status="ok")
    response.status_code = 503
    return Health(status="not_ready", reason=service.reason)


@router.get(
    "/metrics",
    response_class=Response,
    tags=["system"],
    responses=_TEXT | refusals(*OPEN),
)
async def metrics(request: Request) -> Response:
    """Queue, stages and steps, tokens, cache, requests."""
    found = request.app.state.metrics
    return Response(found.render(), media_type=found.content_type)
