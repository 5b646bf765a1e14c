"""Which sessions go by themselves: those untouched for too long, then the oldest beyond a budget.

A session with a turn that waits or runs stays.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable

from mv2v_engine.serving import tables
from mv2v_engine.serving.config import ServingConfig
from mv2v_engine.serving.database import Database
from mv2v_engine.serving.errors import ApiError

log = logging.getLogger("mv2v_engine.serving")

SWEEP_SECONDS = 600.0
_DAY = 86_400.0


def expired(db: sqlite3.Connection, config: ServingConfig, now: float) -> list[tuple[str, str]]:
    """(owner, id) of the sessions to remove, in this order."""
    surplus = 0
    if config.keep_bytes is not None:
        surplus = tables.total_bytes(db) - config.keep_bytes
    found = []
    for session in tables.idle_sessions(db):
        is_old = config.keep_days is not None and session.touched < now - config.keep_days * _DAY
        if is_old or surplus > 0:
            found.append((session.owner, session.id))
            surplus -= session.bytes
    return found


class Retention:
    """A task that removes expired sessions, at the start and every ten minutes.

    delete: as `Service.delete_session`, of a session that has no turn that waits or runs.
    """

    def __init__(
        self,
        config: ServingConfig,
        database: Database,
        delete: Callable[[str, str], Awaitable[None]],
    ) -> None:
        self.config, self.database, self._delete = config, database, delete
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self.config.keep_days is not None or self.config.keep_bytes is not None:
            self._task = asyncio.create_task(self._run(), name="retention")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def sweep(self) -> list[str]:
        """Remove what has expired; the ids."""
        now = time.time()
        due = await self.database.read(lambda db: expired(db, self.config, now))
        removed = []
        for owner, session_id in due:
            try:
                await self._delete(owner, session_id)
            except ApiError:
                continue  # it was deleted or used meanwhile
            removed.append(session_id)
            log.info("session %s was removed: it was not used for long", session_id)
        return removed

    async def _run(self) -> None:
        while True:
            await self.sweep()
            await asyncio.sleep(SWEEP_SECONDS)
