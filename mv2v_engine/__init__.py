"""Memory-augmented video-to-video diffusion: edits of one video that agree with each other."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mv2v_engine.camera.trajectories import CameraTrajectory
    from mv2v_engine.config import EngineConfig
    from mv2v_engine.engine.engine import Engine
    from mv2v_engine.engine.session import Session
    from mv2v_engine.engine.turn import Turn
    from mv2v_engine.progress import CancelToken

__version__ = "0.1.0"

__all__ = [
    "CameraTrajectory",
    "CancelToken",
    "Engine",
    "EngineConfig",
    "Session",
    "Turn",
    "__version__",
]
# where the names are, loaded when they are asked for: a client of the service needs no torch
_PLACES = {
    "CameraTrajectory": "camera.trajectories",
    "CancelToken": "progress",
    "Engine": "engine.engine",
    "EngineConfig": "config",
    "Session": "engine.session",
    "Turn": "engine.turn",
}


def __getattr__(name: str) -> Any:
    place = _PLACES.get(name)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{place}"), name)
    globals()[name] = found
    return found
