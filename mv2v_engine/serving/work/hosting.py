"""What every process that owns an engine does, whoever drives it: open a host, make a turn."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextvars import copy_context
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mv2v_engine import Engine
from mv2v_engine.envs import num_threads
from mv2v_engine.errors import CheckpointError, KernelUnavailableError, MV2VError, RequestError
from mv2v_engine.progress import CancelToken
from mv2v_engine.serving.watch.logs import log_ids
from mv2v_engine.serving.watch.tracing import OpenJob
from mv2v_engine.serving.work.host import Host, Tell
from mv2v_engine.serving.work.protocol import engine_arguments

# below the server, whose answers should not wait for a turn
_NICENESS = 5
_END = object()


def is_final(error: MV2VError) -> bool:
    """Whether what was asked for cannot be had here: no later try would find it otherwise.

    A checkpoint that a disk or a hub did not give may be given later.
    """
    if isinstance(error, RequestError | KernelUnavailableError):
        return True
    cause = error.__cause__
    is_read = cause is None or isinstance(cause, MV2VError | SafetensorError)
    return isinstance(error, CheckpointError) and is_read


def open_host(setup: dict[str, Any], *, has_claims: bool = False) -> Host:
    """Load the engine of a setup, as `protocol.setup_message` makes it, and warm it up.

    has_claims: as `Host`.

    Raises:
        MV2VError: the checkpoint cannot be loaded, or not on this device.
    """
    threads = num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    engine = Engine.from_pretrained(**engine_arguments(setup))
    if engine.device.type == "cpu":
        os.nice(_NICENESS)
    host = Host(
        engine,
        max_open=setup["max_sessions_open"],
        has_claims=has_claims,
        max_streams=setup["max_streams_open"],
    )
    host.warm_up()
    return host


def turn_made(
    order: dict[str, Any], host: Host, token: CancelToken, open_job: OpenJob, tell: Tell
) -> Iterator[None]:
    """Make the turn of an order, as `protocol.run_message` makes it: see `Host.run`.

    Its logs and spans are its own, whatever runs while it waits.
    """
    job, session = order["job"], order["session"]

    def make() -> Generator[None, None, None]:
        with log_ids(session=session["id"], job=job["id"]), open_job(session["id"], job["id"]):
            yield from host.run(job, session, Path(order["folder"]), token, tell)

    yield from apart(make())


def apart(steps: Generator[None, None, None]) -> Iterator[None]:
    """The steps in a context of their own, which nothing else sees that runs between them."""
    context = copy_context()
    try:
        while context.run(next, steps, _END) is not _END:
            yield
    finally:
        context.run(steps.close)
