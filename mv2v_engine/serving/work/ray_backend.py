"""Replicas on Ray Serve as a backend: turns go to the replica that has their session, or to any.

A turn whose replica dies is made again by another, from the session's folder, which all machines
see. Who may write there is `claims`' business; it is how turns are cancelled, too.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from mv2v_engine.envs import keep_ray_quiet
from mv2v_engine.errors import StorageError
from mv2v_engine.serving.config import Cluster, ServingConfig
from mv2v_engine.serving.errors import failed, failure
from mv2v_engine.serving.store.claims import issue
from mv2v_engine.serving.store.records import JobRecord, SessionRecord
from mv2v_engine.serving.store.streams import StreamRecord
from mv2v_engine.serving.watch.logs import log_event
from mv2v_engine.serving.work.backend import LAST_OF_BACKEND
from mv2v_engine.serving.work.host import Json
from mv2v_engine.serving.work.protocol import run_message, session_fields, setup_message
from mv2v_engine.serving.work.ray_replica import APPLICATION, DEPLOYMENT, NeverError, application

log = logging.getLogger("mv2v_engine.serving")

# between two looks at the replicas, and between two tries to reach the cluster
_LOOK_SECONDS, _AGAIN_SECONDS = 1.0, 10.0
# how a replica that is gone, or a cluster, shows
_GONE = (RayError, RayServeException)
_UNREACHABLE = (*_GONE, RuntimeError, ValueError, OSError)
_STARTING = "the replicas are being started"
_CANCELLED: Json = {"type": "cancelled"}


class RayBackend:
    """`Backend` over the replicas of a cluster. A Ray that runs in this process already is used."""

    def __init__(self, config: ServingConfig, cluster: Cluster) -> None:
        self.config, self.cluster = config.in_cluster(), cluster
        self.about: Json | None = None
        self.ready, self.reason, self.is_lost = False, _STARTING, False
        self.refusal = ""
        self.restarts = self.capacity = 0
        # replicas that were last seen to run, and the most that ever ran at once
        self._running = self._most = 0
        self._handle: Any = None
        self._is_ours = self._is_stopping = False
        self._task: asyncio.Task[None] | None = None
        self._changed: Callable[[], None] = lambda: None
        # one thing at a time in a session, a lock for as long as somebody needs it
        self._sessions: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        # the folders of running jobs, once a replica may write there
        self._folders: dict[str, Path | None] = {}
        self._cancelling: set[str] = set()
        self._revoking: dict[str, asyncio.Task[None]] = {}

    @property
    def _is_deployer(self) -> bool:
        return self.cluster.replicas is not None

    def watch(self, changed: Callable[[], None]) -> None:
        """See `Backend`."""
        self._changed = changed

    async def start(self) -> None:
        """See `Backend`."""
        self._stopped: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._live(), name="replicas")
        self._task.add_done_callback(self._lost_sight)

    async def stop(self, grace: float) -> None:
        """See `Backend`. Replicas that this service started end with it; others go on."""
        self._is_stopping = True
        self.ready, self.reason = False, "the service is stopping"
        if self._task is None:
            return
        self._stopped.set_result(None)
        self._task.cancel()
        await asyncio.wait([self._task])
        await asyncio.to_thread(self._disconnect)

    async def run(
        self, job: JobRecord, session: SessionRecord, folder: Path
    ) -> AsyncIterator[Json]:
        """See `Backend`; a turn begins again, from `started` on, where its replica has died."""
        if self.is_lost:
            yield {"type": "failed", "code": "worker_crashed", "message": self.reason}
            return
        folder = folder.absolute()
        self._folders[job.id] = None
        async with self._alone(session.id):
            try:
                async for event in self._attempts(job, session, folder):
                    yield event
            except StorageError as error:
                yield failure(error)
            finally:
                del self._folders[job.id]
                self._cancelling.discard(job.id)
                revoking = self._revoking.pop(job.id, None)
                if revoking is not None:
                    # or it would take the right of whoever comes next
                    await asyncio.wait([revoking])

    def cancel(self, job_id: str) -> None:
        """See `Backend`: whichever replica makes the turn finds its right to write gone."""
        if job_id not in self._folders or job_id in self._cancelling:
            return
        self._cancelling.add(job_id)
        folder = self._folders[job_id]
        if folder is not None:
            self._revoking[job_id] = asyncio.create_task(self._revoke(folder))

    async def publish(self, session: SessionRecord, folder: Path, number: int) -> Json:
        """See `Backend`."""
        folder = folder.absolute()
        order = {"session": session_fields(session), "folder": str(folder), "number": number}
        order["stall_seconds"] = self.config.stall_seconds
        async with self._alone(session.id):
            try:
                order["claim"] = await asyncio.to_thread(issue, folder)
                handle = self._handle.options(multiplexed_model_id=session.id)
                answer: Json = await handle.publish.remote(order)
                return answer
            except StorageError as error:
                return failure(error)
            except _GONE as error:
                log_event("replica_lost", level=logging.ERROR, error=error)
                return _crashed(1)

    async def block(self, record: StreamRecord, folder: Path, number: int) -> Json:
        """See `Backend`: `serve` starts no replicas of a model that streams."""
        return failed("unprocessable_turn", "replicas make no streams; serve without --workers ray")

    async def check(self, prompt: str) -> Json:
        """See `block`."""
        return failed("unprocessable_turn", "replicas make no streams; serve without --workers ray")

    async def release(self, session_id: str) -> None:
        """See `Backend`: nobody writes between two turns, and memory goes when it is needed."""

    async def _attempts(
        self, job: JobRecord, session: SessionRecord, folder: Path
    ) -> AsyncIterator[Json]:
        order = run_message(job, session, folder) | {"stall_seconds": self.config.stall_seconds}
        for attempt in itertools.count(1):
            order["claim"] = await asyncio.to_thread(issue, folder)
            self._folders[job.id] = folder
            if job.id in self._cancelling:
                # no replica has been told
                yield _CANCELLED
                return
            is_ended = False
            try:
                async for event in self._turn(session.id, order):
                    yield event
                    is_ended = is_ended or event["type"] in LAST_OF_BACKEND
            except _GONE as error:
                lost = {"session": session.id, "job": job.id}
                log_event("replica_lost", level=logging.ERROR, error=error, **lost)
            if is_ended:
                return
            if self._is_stopping or attempt >= self.config.max_attempts:
                yield _crashed(attempt)
                return

    async def _turn(self, session_id: str, order: Json) -> AsyncIterator[Json]:
        """The events of one attempt.

        They may end without a last one, when the service stops, or in `_GONE`.
        """
        handle = self._handle.options(stream=True, multiplexed_model_id=session_id)
        stream = handle.turn.remote(order)
        while True:
            coming = asyncio.ensure_future(stream.__anext__())
            await asyncio.wait([coming, self._stopped], return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                # from a replica that does not let go
                coming.cancel()
                return
            try:
                event: Json = coming.result()
            except StopAsyncIteration:
                return
            if event["type"] == "started":
                place = {name: event[name] for name in ("replica", "host", "process")}
                log_event("turn_begun", session=session_id, job=order["job"]["id"], **place)
            yield event

    async def _revoke(self, folder: Path) -> None:
        try:
            await asyncio.to_thread(issue, folder)
        except StorageError as error:
            log.error("a turn cannot be cancelled: %s", error)

    def _alone(self, session_id: str) -> asyncio.Lock:
        return self._sessions.setdefault(session_id, asyncio.Lock())

    async def _live(self) -> None:
        """Reach the cluster, then keep looking at the replicas."""
        while not (self._is_stopping or self.is_lost):
            pause = _LOOK_SECONDS
            try:
                if self._handle is None:
                    self._handle = await asyncio.to_thread(self._connect)
                await self._look()
            except _UNREACHABLE as error:
                pause = _AGAIN_SECONDS
                self._set(0, f"the replicas cannot be reached: {_last_line(error)}")
            await asyncio.sleep(pause)

    def _lost_sight(self, task: asyncio.Task[None]) -> None:
        """Nobody looks at the replicas any more: an error that nobody expected."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("the replicas are out of sight", exc_info=error)
            self._give_up(
                f"the replicas are out of sight: {_last_line(error)}; start the service again"
            )

    def _connect(self) -> Any:
        """Start what is to be started; a handle of the replicas."""
        if not ray.is_initialized():
            keep_ray_quiet()
            quiet = {"log_to_driver": False, "configure_logging": False}
            if self.cluster.address is None:
                ray.init("local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
            else:
                ray.init(self.cluster.address, **quiet)
            self._is_ours = True
        if self._is_deployer:
            # no proxy: nobody but this service speaks to the replicas
            serve.start(proxy_location="Disabled")
            if APPLICATION in serve.status().applications:
                # left by a service that was killed, perhaps with other weights
                serve.delete(APPLICATION)
            app = application(self.config, self.cluster)
            target = serve.RunTarget(app, name=APPLICATION, route_prefix=None)
            serve.run_many(
                [target],
                wait_for_ingress_deployment_creation=True,
                wait_for_applications_running=False,
            )
        return serve.get_deployment_handle(DEPLOYMENT, APPLICATION)

    def _disconnect(self) -> None:
        outlives = self.cluster.address is not None or not self._is_ours
        if self._is_deployer and outlives and ray.is_initialized():
            with suppress(*_UNREACHABLE):
                serve.delete(APPLICATION)
        if self._is_ours:
            ray.shutdown()

    async def _look(self) -> None:
        status = await asyncio.to_thread(serve.status)
        app = status.applications.get(APPLICATION)
        found = app and app.deployments.get(DEPLOYMENT)
        if not found:
            self._set(0, f"the cluster runs no application {APPLICATION}; deploy it")
            return
        running = found.replica_states.get("RUNNING", 0)
        if running and self.about is None:
            described = await self._handle.describe.remote()
            wrong = _differences(described["setup"], setup_message(self.config))
            if wrong:
                self._set(0, f"the replicas serve something else: {wrong}; ask for the same")
                return
            self.about = described["about"]
        # those that come back after they were there
        self.restarts += max(0, min(running, self._most) - self._running)
        self._running, self._most = running, max(self._most, running)
        said = [text.strip() for text in (found.message, app.message) if text.strip()]
        reason = _last_line(said[0]) if said else _STARTING
        never = reason.partition(f"{NeverError.__name__}: ")[2]
        if never and self._is_deployer and self.about is None:
            # replicas that another deploys may become others
            self.refusal = never
            self._give_up(never)
        elif app.status == ApplicationStatus.DEPLOY_FAILED and not running and self._is_deployer:
            # Serve starts no more of them, and nobody else deploys
            self._give_up(f"no replica came up: {reason}; mend that and start the service again")
        else:
            self._set(running, reason)

    def _set(self, running: int, reason: str) -> None:
        """What is known of the replicas now. reason: why there are none, if there are none."""
        if self._is_stopping:
            return
        before = (self.capacity, self.reason)
        self.capacity, self.ready = running, running > 0
        self.reason = "" if self.ready else reason
        if self.reason and self.reason != before[1]:
            log.warning("%s", self.reason)
        if before != (self.capacity, self.reason):
            self._changed()

    def _give_up(self, reason: str) -> None:
        if self._is_stopping:
            return
        # what waits is taken, to fail one by one
        self.is_lost, self.ready, self.capacity, self.reason = True, False, 1, reason
        log.error("%s", reason)
        self._changed()


def _crashed(attempts: int) -> Json:
    message = (
        f"the replica that made the turn is gone, {attempts} times in a row; the session is as it "
        "was, ask for the turn again"
    )
    return {"type": "failed", "code": "worker_crashed", "message": message}


def _differences(found: Json, wanted: Json) -> str:
    """Where two setups differ, in words; "" if they do not."""
    wrong = []
    for name, value in wanted.items():
        if isinstance(value, dict):
            wrong += _differences(found[name], value).split("; ") if found[name] != value else []
        elif found[name] != value:
            wrong.append(f"{name} is {found[name]!r}, asked was {value!r}")
    return "; ".join(wrong)


def _last_line(words: object) -> str:
    """What an error that carries a trace comes to."""
    lines = [line for line in str(words).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(words).__name__
