"""Which sessions go by themselves: those untouched for too long, then the oldest beyond a budget.

A session with a turn that waits or runs stays. Age is counted in time that a service ran on the
store, by a clock that nobody can set: neither a jump of the machine's clock nor a week in which
the service was off makes a session older.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterable

from mv2v_engine.serving.config import ServingConfig
from mv2v_engine.serving.errors import ApiError
from mv2v_engine.serving.store import tables
from mv2v_engine.serving.store.database import Database
from mv2v_engine.serving.store.streams import StreamRecord

log = logging.getLogger("mv2v_engine.serving")

SWEEP_SECONDS = 600.0
_DAY = 86_400.0


def expired(
    db: sqlite3.Connection, config: ServingConfig, streams: Iterable[StreamRecord] = ()
) -> list[tuple[str, str]]:
    """(owner, id) of the sessions and streams to remove, in this order. streams: ended ones."""
    now, surplus = tables.clock(db), 0
    found = [(age, one.owner, one.id, one.bytes) for one, age in tables.idle_sessions(db)]
    ended = [(now - one.used, one.owner, one.id, one.bytes) for one in streams]
    if config.keep_bytes is not None:
        surplus = tables.total_bytes(db) + sum(one[-1] for one in ended) - config.keep_bytes
    due = []
    # equally old ones keep their order
    for age, owner, id, num_bytes in sorted(found + ended, key=lambda one: -one[0]):
        is_old = config.keep_days is not None and age > config.keep_days * _DAY
        if is_old or surplus > 0:
            due.append((owner, id))
            surplus -= num_bytes
    return due


class Retention:
    """A task that removes expired sessions, at the start and every ten minutes.

    delete: as `Service.delete_session`, of a session that has no turn that waits or runs, or of a
        stream. streams: those that have ended.
    """

    def __init__(
        self,
        config: ServingConfig,
        database: Database,
        delete: Callable[[str, str], Awaitable[None]],
        streams: Callable[[], Iterable[StreamRecord]] = tuple,
    ) -> None:
        self._streams = streams
        self.config, self.database, self._delete = config, database, delete
        self._task: asyncio.Task[None] | None = None
        self._told = time.monotonic()

    def start(self) -> None:
        self._told = time.monotonic()
        self._task = asyncio.create_task(self._run(), name="retention")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            await self.tell_clock()

    async def tell_clock(self) -> None:
        """Tell the store how long this service has run since it was told last."""
        now = time.monotonic()
        try:
            await self.database.write(tables.advance_clock, now - self._told)
            self._told = now
        except sqlite3.OperationalError as error:
            log.warning("the store's clock stands still: %s", error)

    async def sweep(self) -> list[str]:
        """Remove what has expired; the ids."""
        await self.tell_clock()
        due = await self.database.read(expired, self.config, self._streams())
        removed = []
        for owner, session_id in due:
            try:
                await self._delete(owner, session_id)
            except ApiError:
                continue  # it was deleted or used meanwhile
            except OSError as error:
                log.error("%s cannot be removed: %s", session_id, error)
                continue
            removed.append(session_id)
            log.info("%s was removed: it was not used for long", session_id)
        return removed

    async def _run(self) -> None:
        while True:
            await self.sweep()
            await asyncio.sleep(SWEEP_SECONDS)
