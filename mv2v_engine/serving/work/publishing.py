"""Videos and thumbnails of turns that a crash or a full disk left without: made again.

A turn is finished once the engine's store has it, and only then are its files written; so they
can lack, and the database says of which turns.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mv2v_engine.errors import StorageError
from mv2v_engine.serving.errors import ApiError
from mv2v_engine.serving.store import tables
from mv2v_engine.serving.store.claims import taken
from mv2v_engine.serving.store.database import Database
from mv2v_engine.serving.store.digests import promised
from mv2v_engine.serving.store.folders import RESULTS, Store, result_path, sweep_results
from mv2v_engine.serving.store.mirror import mirror
from mv2v_engine.serving.store.records import SessionRecord, TurnRecord
from mv2v_engine.serving.work.backend import WORKER_GONE, Backend

log = logging.getLogger("mv2v_engine.serving")

RETRY_SECONDS = 30.0
# what may be otherwise the next time
_PASSING = ("busy", "disk_full", "out_of_memory", "cancelled", *WORKER_GONE)


class Publisher:
    """One task that goes through the turns without files whenever there may be some.

    refused: why the files of a turn cannot be made, such as damaged latents.
    """

    def __init__(self, store: Store, database: Database, backend: Backend) -> None:
        self.store, self.database, self.backend = store, database, backend
        self.refused: dict[tuple[str, int], str] = {}
        self._gone: set[str] = set()
        self._current = ""
        self._woken, self._published = asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="publisher")
        self.wake()

    def wake(self) -> None:
        """There may be turns without files, or the backend has become ready."""
        self._woken.set()

    async def stop(self) -> None:
        """The turn under way is published at the next start."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def leave(self, session_id: str) -> None:
        """Write nothing more into a session's folder; returns when that is so."""
        self._gone.add(session_id)
        await self.idle(session_id)

    async def idle(self, session_id: str) -> None:
        """Wait until nothing is written into a session's folder."""
        while self._current == session_id:
            await self._published.wait()

    def forget(self, session_id: str) -> None:
        """A session is gone for good."""
        self._gone.discard(session_id)
        for session, number in list(self.refused):
            if session == session_id:
                del self.refused[session, number]

    async def _run(self) -> None:
        while True:
            await self._woken.wait()
            self._woken.clear()
            if not self.backend.ready:
                continue
            waiting = await self.database.read(tables.unpublished_turns)
            if not await self._publish_all(waiting):
                # until something happens, or it is worth another try
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._woken.wait(), RETRY_SECONDS)
                self.wake()

    async def _record(self, session: SessionRecord, folder: Path, number: int) -> dict[str, Any]:
        """Write down what was published; what there is to say if that is not possible."""
        try:
            turn = await self.database.read(tables.find_turn, session.id, number)
            files = await asyncio.to_thread(_files, folder, turn)
            await self.database.write(tables.set_published, session.id, number, files)
        except (ApiError, StorageError, sqlite3.OperationalError) as error:
            return {"type": "failed", "code": "disk_full", "message": str(error)}
        await mirror(self.database, folder, session.id, number=number)
        return {}

    async def _publish_all(self, turns: Iterable[tuple[str, int]]) -> bool:
        """Whether none is left that another try might make."""
        is_done = True
        for session_id, number in turns:
            if (session_id, number) in self.refused:
                continue
            session = await self.database.read(tables.session_by_id, session_id)
            if session is None or session_id in self._gone:
                continue
            self._current, folder = session_id, self.store.session(session_id)
            try:
                answer = await self.backend.publish(session, folder, number)
                if answer["type"] == "published":
                    answer |= await self._record(session, folder, number)
                if answer.get("code") in WORKER_GONE:
                    await asyncio.to_thread(_sweep, folder, number)
            finally:
                self._current = ""
                published, self._published = self._published, asyncio.Event()
                published.set()
            if answer["type"] == "published":
                continue
            log.error("turn %d of %s has no files: %s", number, session_id, answer["message"])
            if answer["code"] in _PASSING:
                is_done = False
            else:
                self.refused[session_id, number] = answer["message"]
        return is_done


def _files(folder: Path, turn: TurnRecord) -> dict[str, Any]:
    """What a turn's row promises with the video and thumbnail that it has now.

    Raises:
        StorageError: one of the two is not there, after all.
    """
    latents = {name: row for name, row in turn.files.items() if name.startswith("turns/")}
    paths = [result_path(folder, turn.number, which) for which in RESULTS]
    return latents | promised(folder, paths)


def _sweep(folder: Path, number: int) -> None:
    # whoever still writes there is swept up after the next time
    with suppress(StorageError), taken(folder):
        sweep_results(folder, number)
