"""What the server and its worker say to each other: JSON, a line each.

    server, to the worker's stdin          worker, to its private pipe
    {"type": "setup", ...}  first          {"type": "ready", "about", "capacity"}
    {"type": "run", "job", "session",      {"type": "broken", "message"}    it cannot load
     "folder"}                               nor ever could, if it "is_final"
    {"type": "cancel", "job"}              {"type": "event", "job", "event"}, or a stream's id
    {"type": "publish", "call", "session", {"type": "answer", "call", "answer"}
     "folder", "number"}
    {"type": "block", "call", "stream",    {"type": "answer", ...}
     "folder"}
    {"type": "check", "call", "prompt"}    {"type": "answer", ...}
    {"type": "release", "session"}

The worker ends when its stdin does.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from mv2v_engine.config import EngineConfig, LoadConfig, ParallelConfig
from mv2v_engine.options import DTYPES
from mv2v_engine.serving.config import ServingConfig
from mv2v_engine.serving.store.records import MASK, JobRecord, SessionRecord
from mv2v_engine.serving.store.streams import StreamRecord

# bytes of one line at most: reports of long edits have a row for every window
MAX_LINE = 256 << 20


def encode(message: dict[str, Any]) -> bytes:
    """A message as its line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(line)
    return message


def setup_message(config: ServingConfig) -> dict[str, Any]:
    """What a worker needs to know of a service; no tokens."""
    # what was taken as an upload is not refused by a turn
    engine = dataclasses.replace(config.engine, max_source_pixels=config.limits.pixels)
    names = [*(field.name for field in dataclasses.fields(LoadConfig)), "causal", "store"]
    setup = {name: getattr(config, name) for name in (*names, "max_sessions_open")}
    setup |= {"type": "setup", "engine": dataclasses.asdict(engine)}
    setup |= {"max_streams_open": config.max_streams}
    plain: dict[str, Any] = json.loads(json.dumps(setup, default=str))  # paths are text
    return plain


def engine_arguments(setup: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `Engine.from_pretrained` in a setup."""
    engine = setup["engine"]
    return {
        "path_or_name": setup["checkpoint"],
        "device": setup["device"],
        "dtype": None if setup["dtype"] is None else DTYPES[setup["dtype"]],
        "components": setup["components"],
        "rename": setup["rename"],
        "causal": setup["causal"],
        "config": EngineConfig(**engine | {"parallel": ParallelConfig(**engine["parallel"])}),
    }


def run_message(job: JobRecord, session: SessionRecord, folder: Path) -> dict[str, Any]:
    return {
        "type": "run",
        "job": {"id": job.id, "number": job.number, "request": job.request},
        "session": session_fields(session),
        "folder": str(folder),
    }


def stream_fields(record: StreamRecord, number: int) -> dict[str, Any]:
    """What a host needs to know of a stream to make its block of a number."""
    return {
        "id": record.id,
        "number": number,
        "prompt": record.prompt,
        "seed": record.seed,
        "policy": record.policy,
        "source": dataclasses.asdict(record) if record.has_source else None,
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
        "references": session.references,
        "mask": MASK if session.has_mask else None,
    }
