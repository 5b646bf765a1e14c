"""What a start finds of the process before it, which may have been killed at any moment.

killed                                      found at the start, and what becomes of it
while a video was uploaded                  a file in uploads: removed
between a session's folder and its row      a folder without a row: removed; set aside if it has
                                            turns, as a branch has
after a running job was cancelled           a running job, marked so: cancelled
while a session was deleted                 a row marked so: the deletion is done
while a turn was deleted                    a row marked so: its files are removed
before a turn's first step                  a running job, no turn: back to the queue
while the turn was made                     the same, and half-written files: removed
between the engine's store and the row      a running job, its turn in the folder: finished
between a job's turn and its video          a turn without files: they are made again
after the turn's transaction                nothing

Whatever else folders and rows do not agree in is told by `audit`; nothing that was finished is ever
removed.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from pathlib import Path

from mv2v_engine.serving.store import history, jobs, tables
from mv2v_engine.serving.store.audit import Audit
from mv2v_engine.serving.store.database import Database
from mv2v_engine.serving.store.folders import (
    Store,
    finished_numbers,
    remove_content,
    stored_identity,
    sweep_results,
)
from mv2v_engine.serving.store.mirror import copied_turn, insert_turn, mend_rows, mirror
from mv2v_engine.serving.store.records import MASK, REFERENCES, SOURCE, SessionRecord, is_id

log = logging.getLogger("mv2v_engine.serving")


async def recover(store: Store, database: Database, audit: Audit) -> None:
    """Bring a locked store, on which no worker works, to where it would be without the kill.

    The jobs are left as they are: `Scheduler.recover` ends them or queues them again. Doing it
    twice, or being killed while at it, changes nothing.
    """
    await asyncio.to_thread(remove_content, store.uploads)
    for session_id in await database.read(tables.deleting_sessions):
        await asyncio.to_thread(store.discard, store.session(session_id))
        await database.must_write(tables.remove_session, session_id)
    known = await database.read(tables.session_ids)
    for stray in await asyncio.to_thread(store.stray_sessions, known):
        await asyncio.to_thread(_put_away, store, stray)
    for session_id, number in await database.read(history.deleted_turns):
        await asyncio.to_thread(history.discard_files, store, session_id, number)
    await asyncio.to_thread(store.empty_trash)
    await reconcile(store, database, audit)
    for session_id, number in await database.read(tables.unpublished_turns):
        await asyncio.to_thread(sweep_results, store.session(session_id), number)


async def reconcile(store: Store, database: Database, audit: Audit) -> None:
    """Make rows and folders of the sessions that have rows agree, and find out what is damaged."""
    for session_id in sorted(await database.read(tables.session_ids)):
        await mend_rows(database, store.session(session_id), session_id)
    sessions = await database.read(tables.kept_sessions)
    for session in sessions:
        await _take_up(session, store, database)
    await audit.start()
    for session in sessions:
        await mirror(database, store.session(session.id), session.id)


def _put_away(store: Store, stray: Path) -> None:
    """Take a folder that no row tells of out of the way; remove it only if it promises nothing."""
    is_session = is_id("session", stray.name) and stray.is_dir()
    if is_session and {path.name for path in stray.iterdir()} <= {SOURCE, REFERENCES, MASK}:
        # an upload that was never answered for
        store.discard(stray)
        return
    place = store.set_aside(stray, stray.name)
    log.warning(
        "no row tells of the session in %s: it was set aside, to %s; to take it up again, move it "
        "back and run store repair",
        stray,
        place,
    )


async def _take_up(session: SessionRecord, store: Store, database: Database) -> None:
    """Give the finished turns of a session's folder that no row tells of their rows.

    Those of jobs that run are left to these.
    """
    folder = store.session(session.id)
    numbers = await asyncio.to_thread(finished_numbers, folder)
    lacking = numbers - await database.read(_told, session.id)
    for number in sorted(lacking):
        row = await asyncio.to_thread(copied_turn, folder, number)
        if row is not None:
            await database.must_write(insert_turn, session.id, row)
            log.warning("turn %d of %s had no row, and was taken up", number, session.id)
    if lacking and session.identity is None:
        identity = await asyncio.to_thread(stored_identity, folder)
        if identity is not None:
            await database.must_write(tables.set_identity, session.id, identity)


def _told(db: sqlite3.Connection, session_id: str) -> set[int]:
    """Numbers of the turns that a session's rows tell of, or will once its jobs are recovered."""
    running = [job.number for job in jobs.jobs_in_state(db, "running") if job.session == session_id]
    turns = tables.list_turns(db, session_id, with_deleted=True)
    return {turn.number for turn in turns} | {number for number in running if number is not None}
