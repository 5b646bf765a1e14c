"""A service from its start to its stop: the lock, the recovery, the parts, and what they share.

`Service` adds what routes call. All methods belong to one event loop.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

from mv2v_engine.serving.config import ServingConfig
from mv2v_engine.serving.errors import ApiError, client_words
from mv2v_engine.serving.sessions import Probe, Sessions, disk_errors, full_disk
from mv2v_engine.serving.store.audit import Audit
from mv2v_engine.serving.store.folders import Store
from mv2v_engine.serving.store.identity import admit
from mv2v_engine.serving.store.recovery import recover
from mv2v_engine.serving.store.retention import Retention
from mv2v_engine.serving.watch.events import EventLogs
from mv2v_engine.serving.watch.listener import Listener
from mv2v_engine.serving.work.backend import Backend
from mv2v_engine.serving.work.publishing import Publisher
from mv2v_engine.serving.work.scheduler import Scheduler

Result = TypeVar("Result")
# for Retry-After, where nothing says how long it takes
RETRY_SECONDS = 5
RETRY = {"Retry-After": str(RETRY_SECONDS)}


class Lifecycle:
    """One store, one backend, and the tasks that work on them.

    probe: decodes an upload within the limits. listeners: told of everything that happens.
    """

    def __init__(
        self,
        config: ServingConfig,
        backend: Backend,
        probe: Probe,
        listeners: Sequence[Listener] = (),
    ) -> None:
        self.config, self.backend, self.listeners = config, backend, tuple(listeners)
        self._probe = probe
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_stopping = self._is_stopped = False
        self._restarts = 0
        self._draining: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Lock the store, recover what a kill left behind, and begin to load the engine.

        Raises:
            StorageError: another service runs on the store, its parts do not belong together, or
                it cannot be written.
        """
        self.store = await asyncio.to_thread(Store, self.config.store)
        await asyncio.to_thread(self.store.lock)
        try:
            await asyncio.to_thread(self.store.make_ready)
            with full_disk(self.config.store):
                identity = await asyncio.to_thread(admit, self.store)
                self._database = await asyncio.to_thread(self.store.open_database)
        except BaseException:
            self.store.unlock()
            raise
        self._assemble(identity.generation)
        try:
            with full_disk(self.config.store):
                await recover(self.store, self._database, self._audit)
                await self._scheduler.recover()
        except BaseException:
            self._database.close()
            self.store.unlock()
            raise
        self.backend.watch(self._backend_changed)
        await self.backend.start()
        self._scheduler.start()
        self._publisher.start()
        self._retention.start()
        self._audit.go_on()

    def _assemble(self, generation: int) -> None:
        """The service's parts over its open store. generation: of the store."""
        config, store, database = self.config, self.store, self._database
        self._logs = EventLogs(generation)
        self._publisher = Publisher(store, database, self.backend)
        self._scheduler = Scheduler(
            config, store, database, self.backend, self._logs, self.listeners
        )
        self._scheduler.turns_to_publish = self._publisher.wake
        self._audit = Audit(store, database, release=self.backend.release)
        self._scheduler.compared = partial(self._audit.session, mends=True)
        self._sessions = Sessions(
            config, store, database, self._scheduler, self._publisher, self._audit, self._probe
        )
        self._retention = Retention(config, database, self._expire)

    async def drain(self) -> None:
        """Take no more turns, give the one under way its grace, then put it back in the queue.

        What there is can be read until `stop`.
        """
        if self._draining is None:
            self._is_stopping = True
            self._draining = asyncio.create_task(self._drain())
        await asyncio.shield(self._draining)

    async def stop(self) -> None:
        """Drain, then close the database and let go of the store."""
        await self.drain()
        if self._is_stopped:
            return
        self._is_stopped = True
        await asyncio.to_thread(self._database.close)
        self.store.unlock()

    async def _drain(self) -> None:
        await self._audit.stop()
        await self._retention.stop()
        await self._publisher.stop()
        await self._scheduler.stop()
        if self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def ready(self) -> bool:
        """Whether turns are made: the engine is warm and the service is not stopping."""
        return self.backend.ready and not self._is_stopping

    @property
    def reason(self) -> str:
        """Why it is not ready, in words."""
        return "the service is stopping" if self._is_stopping else client_words(self.backend.reason)

    @property
    def about(self) -> dict[str, Any] | None:
        """What the engine is, as `Backend.about`; None until it was ready once."""
        return self.backend.about

    @property
    def num_running(self) -> int:
        """Turns that are being made."""
        return self._scheduler.num_running

    def require_about(self) -> dict[str, Any]:
        """As `about`. Raises not_ready while it is stopping or lost, and before it was ready."""
        about = self.backend.about
        if self.backend.is_lost and not self._is_stopping:
            raise ApiError("not_ready", f"no work is taken: {self.reason}")
        if about is None or self._is_stopping:
            message = f"no work is taken now: {self.reason}; try again in {RETRY_SECONDS} s"
            raise ApiError("not_ready", message, headers=RETRY)
        return about

    async def _expire(self, owner: str, session_id: str) -> None:
        """Remove a session that nobody uses; raises busy if somebody does."""
        await self._whole(self._sessions.remove(owner, session_id, is_idle=True))

    async def _read(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        self._require_running()
        return await self._database.read(work)

    async def _write(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        self._require_running()
        with disk_errors():
            return await self._database.write(work)

    def _require_running(self) -> None:
        if self._is_stopped:
            raise ApiError("not_ready", "the service has stopped; ask when it is back")

    async def _whole(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Do work to its end, whether or not somebody still waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    def _backend_changed(self) -> None:
        restarts, reason = self.backend.restarts, self.backend.reason
        for _ in range(self._restarts, restarts):
            self._scheduler.tell(lambda listener: listener.worker_restarted(reason))
        self._restarts = restarts
        self._scheduler.wake()
        self._publisher.wake()
