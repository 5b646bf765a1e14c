"""A replica of the engine on Ray Serve, and the application of several of them.

Serve gives a replica one request at a time, and one that names a session to the replica that holds
it, if that one is free. What a replica holds it can lose: everything is in the session's folder.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

from ray import serve

from mv2v_engine.config import EngineConfig
from mv2v_engine.errors import CancelledError, MV2VError, RequestError
from mv2v_engine.serving.config import Cluster, ServingConfig
from mv2v_engine.serving.errors import failure
from mv2v_engine.serving.store.claims import Claim
from mv2v_engine.serving.store.folders import sweep_session
from mv2v_engine.serving.watch.logs import configure_logs
from mv2v_engine.serving.watch.tracing import OpenJob, open_traces
from mv2v_engine.serving.work.backend import LAST_OF_BACKEND
from mv2v_engine.serving.work.host import Host, Json, Tell
from mv2v_engine.serving.work.hosting import is_final, open_host, turn_made
from mv2v_engine.serving.work.protocol import setup_message

log = logging.getLogger("mv2v_engine.serving.replica")

APPLICATION, DEPLOYMENT = "mv2v", "Replica"
# how soon a dead replica is noticed; and what one has to end when it is told to
_HEALTH_SECONDS, _CLOSING_SECONDS = 2.0, 10.0
_CLUSTER = {"replicas": "replicas", "cpus_per_replica": "cpus", "gpus_per_replica": "gpus"}
_SERVED = ("checkpoint", "device", "dtype", "max_sessions_open")
_PATHS = ("store", "components", "rename")


class NeverError(RuntimeError):
    """What is asked of a replica can never be had (`is_final`); Serve tells errors as text."""


class Replica:
    """One engine. What nobody expected ends its process, and so does an engine that hangs; Serve
    starts another.

    setup: as `protocol.setup_message` makes it.

    Raises:
        NeverError: the checkpoint cannot be loaded here, whenever it is tried.
        MV2VError: it cannot be loaded now.
    """

    def __init__(self, setup: Json) -> None:
        configure_logs()
        self.id = str(serve.get_replica_context().replica_id.unique_id)
        self._place = {"replica": self.id, "host": socket.gethostname(), "process": os.getpid()}
        self._writer = f"replica {self.id} (process {os.getpid()} on {socket.gethostname()})"
        self._setup = setup
        # a host does one thing at a time, and what torch is told is told to a thread
        self._thread = ThreadPoolExecutor(1, "host")
        self._host, self._open_job = self._thread.submit(_opened, setup).result()

        async def hold(session_id: str) -> str:
            return session_id

        # tells Serve which sessions are here; the host's own bound, the same, is what lets them go
        self._hold = serve.multiplexed(hold, max_num_models_per_replica=setup["max_sessions_open"])

    async def describe(self) -> Json:
        """{"about": as `Backend.about`, "setup", "replica": its id}."""
        return {"about": self._host.about, "setup": self._setup, "replica": self.id}

    async def turn(self, order: Json) -> AsyncIterator[Json]:
        """Make the turn of an order: its events, of which `started` says where.

        order: as `protocol.run_message` makes it, with the "claim" that it runs under and
            "stall_seconds", as `ServingConfig`.
        """
        await self._hold(order["session"]["id"])
        claim = self._claim(order)
        events: asyncio.Queue[Json] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(event: Json) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        self._submit(lambda: self._make(order, claim, tell))
        try:
            while True:
                event = await _heard(events.get(), order["stall_seconds"])
                yield event
                if event["type"] in LAST_OF_BACKEND:
                    return
        finally:
            # whoever listened is gone, or all is said
            claim.cancel()

    async def publish(self, order: Json) -> Json:
        """Write a turn's files. order: "session", "folder", "number", "claim", "stall_seconds"."""
        await self._hold(order["session"]["id"])
        answer = asyncio.wrap_future(self._submit(lambda: self._published(order)))
        return await _heard(answer, order["stall_seconds"])

    def _submit(self, work: Callable[[], Any]) -> Future[Any]:
        future = self._thread.submit(work)
        future.add_done_callback(_end_on_fault)
        return future

    def _claim(self, order: Json) -> Claim:
        return Claim(Path(order["folder"]), order["claim"], self._writer)

    def _make(self, order: Json, claim: Claim, tell: Tell) -> None:
        """The last event is told when the folder is free again."""
        last: Json = {"type": "cancelled"}

        def hear(event: Json) -> None:
            nonlocal last
            if event["type"] in LAST_OF_BACKEND:
                last = event
            else:
                tell(event | self._place if event["type"] == "started" else event)

        try:
            with claim.held() as was_last:
                self._take_up(order, was_last=was_last)
                for _ in turn_made(order, self._host, claim, self._open_job, hear):
                    self._host.tick()
        except CancelledError:
            pass
        except MV2VError as error:
            last = failure(error)
        tell(last)

    def _published(self, order: Json) -> Json:
        claim = self._claim(order)
        try:
            with claim.held() as was_last:
                self._take_up(order, was_last=was_last)
                return self._host.publish(order["session"], claim.folder, order["number"])
        except CancelledError as error:
            return {"type": "failed", "code": "cancelled", "message": str(error)}
        except MV2VError as error:
            return failure(error)

    def _take_up(self, order: Json, *, was_last: bool) -> None:
        """Another may have gone on with the session, or have died while it wrote."""
        if not was_last:
            self._host.release(order["session"]["id"])
            sweep_session(Path(order["folder"]))


def _opened(setup: Json) -> tuple[Host, OpenJob]:
    open_job = open_traces()
    try:
        return open_host(setup, has_claims=True), open_job
    except MV2VError as error:
        if is_final(error):
            raise NeverError(str(error)) from None
        raise


async def _heard(coming: Awaitable[Json], patience: float | None) -> Json:
    """What the host says; without a word of it for so many seconds, the replica ends."""
    try:
        return await asyncio.wait_for(coming, patience)
    except asyncio.TimeoutError:
        _end(f"the engine said nothing for {patience:g} s")


def _end_on_fault(future: Future[Any]) -> None:
    error = None if future.cancelled() else future.exception()
    if error is not None:
        _end(f"{type(error).__name__}: {error}", error)


def _end(why: str, error: BaseException | None = None) -> NoReturn:
    log.error("the replica ends: %s", why, exc_info=error)
    logging.shutdown()
    os._exit(1)


def application(config: ServingConfig, cluster: Cluster) -> serve.Application:
    """Replicas of what a service serves, for Serve to run."""
    replica = serve.deployment(
        Replica,
        name=DEPLOYMENT,
        num_replicas=cluster.replicas or 1,
        max_ongoing_requests=1,
        ray_actor_options={"num_cpus": cluster.cpus, "num_gpus": cluster.num_gpus(config.device)},
        health_check_period_s=_HEALTH_SECONDS,
        graceful_shutdown_timeout_s=_CLOSING_SECONDS,
    )
    return replica.bind(setup_message(config.in_cluster()))


def build_app(args: Mapping[str, Any]) -> serve.Application:
    """The application of a Serve config file, whose `args` these are.

    args: "store"; of "checkpoint", "components", "rename", "device", "dtype", "max_sessions_open"
        and "engine" (`EngineConfig`'s fields, but for parallel and batch_tokens) what differs from
        the defaults; "replicas", "cpus_per_replica", "gpus_per_replica".

    Raises:
        RequestError: one is unknown or out of its range, or there is no store.
    """
    known = {*_CLUSTER, *_SERVED, *_PATHS, "engine"}
    unknown = sorted(set(args) - known)
    if unknown or "store" not in args:
        wrong = f"unknown: {', '.join(unknown)}" if unknown else "no store"
        words = ", ".join(sorted(known))
        raise RequestError(f"args of the application: {wrong}; known are {words}")
    fields = {name: args[name] for name in _SERVED if name in args}
    fields |= {name: Path(args[name]) for name in _PATHS if args.get(name) is not None}
    engine = dict(args.get("engine") or {})
    # a replica is one process, which makes one turn at a time
    names = {field.name for field in dataclasses.fields(EngineConfig)}
    names -= {"parallel", "batch_tokens"}
    if not set(engine) <= names:
        raise RequestError(
            f"engine of the application: unknown: {', '.join(sorted(set(engine) - names))}; known "
            f"are {', '.join(sorted(names))}"
        )
    cluster = Cluster(**{ours: args[name] for name, ours in _CLUSTER.items() if name in args})
    return application(ServingConfig(engine=EngineConfig(**engine), **fields), cluster)
