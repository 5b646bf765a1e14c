"""What the server and its worker say to each other: JSON, a line each.

    server, to the worker's stdin          worker, to its private pipe
    {"type": "setup", ...}  first          {"type": "ready", "about", "capacity"}
    {"type": "run", "job", "session",      {"type": "broken", "message"}    it cannot load
     "folder"}                             {"type": "event", "job", "event"}
    {"type": "cancel", "job"}
    {"type": "publish", "call", "session", {"type": "answer", "call", "answer"}
     "folder", "number"}
    {"type": "release", "session"}

The worker ends when its stdin does.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from mv2v_engine.config import EngineConfig, ParallelConfig
from mv2v_engine.options import DTYPES
from mv2v_engine.serving.config import ServingConfig
from mv2v_engine.serving.store.records import JobRecord, SessionRecord

# of one line: reports of long edits have a row for every window
MAX_LINE = 256 << 20


def encode(message: dict[str, Any]) -> bytes:
    """A message as its line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(line)
    return message


def setup_message(config: ServingConfig) -> dict[str, Any]:
    """What a worker needs to know of a service; no tokens."""
    engine = dataclasses.asdict(config.engine)
    # what was taken as an upload is not refused by a turn
    engine["max_source_pixels"] = config.limits.pixels
    for name in ("descriptor", "decoder"):
        if engine[name] is not None:
            engine[name] = str(engine[name])
    engine["lora"] = [(str(name), strength) for name, strength in config.engine.lora]
    return {
        "type": "setup",
        "store": str(config.store),
        "checkpoint": config.checkpoint,
        "device": config.device,
        "dtype": config.dtype,
        "components": None if config.components is None else str(config.components),
        "rename": None if config.rename is None else str(config.rename),
        "engine": engine,
        "max_sessions_open": config.max_sessions_open,
    }


def engine_arguments(setup: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `Engine.from_pretrained` in a setup."""
    engine = setup["engine"]
    return {
        "path_or_name": setup["checkpoint"],
        "device": setup["device"],
        "dtype": None if setup["dtype"] is None else DTYPES[setup["dtype"]],
        "components": setup["components"],
        "rename": setup["rename"],
        "config": EngineConfig(**engine | {"parallel": ParallelConfig(**engine["parallel"])}),
    }


def run_message(job: JobRecord, session: SessionRecord, folder: Path) -> dict[str, Any]:
    return {
        "type": "run",
        "job": {"id": job.id, "number": job.number, "request": job.request},
        "session": session_fields(session),
        "folder": str(folder),
    }


def session_fields(session: SessionRecord) -> dict[str, Any]:
    """What a host needs to know of a session."""
    return {
        "id": session.id,
        "frames": session.frames,
        "window": session.window,
        "fps": session.asked_fps,
        "alpha": session.alpha,
        "fit": session.fit,
        "size": session.size,
    }
