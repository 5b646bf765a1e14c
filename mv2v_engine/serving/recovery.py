"""What a start finds of the process before it, which may have been killed at any moment.

killed                                      found at the start, and what becomes of it
while a video was uploaded                  a file in uploads: removed
between a session's folder and its row      a folder without a row: removed
while a session was deleted                 a row marked so: the deletion is done
before a turn's first step                  a running job, no turn: back to the queue
while the turn was made                     the same, and half-written files: removed
between the engine's store and the row      a running job, its turn in the folder: finished
between a job's turn and its video          a turn without files: they are made again
after the turn's transaction                nothing
after a running job was cancelled           a running job, marked so: cancelled
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from mv2v_engine.serving import jobs, tables
from mv2v_engine.serving.database import Database
from mv2v_engine.serving.folders import Store, remove_content, sweep_results
from mv2v_engine.serving.records import JobRecord
from mv2v_engine.serving.scheduler import Scheduler

log = logging.getLogger("mv2v_engine.serving")


async def recover(
    store: Store, database: Database, scheduler: Scheduler, *, max_attempts: int
) -> None:
    """Bring a locked store, on which no worker works, to where it would be without the kill.

    Doing it twice, or being killed while at it, changes nothing.
    """
    await asyncio.to_thread(remove_content, store.uploads)
    for session_id in await database.read(tables.deleting_sessions):
        await asyncio.to_thread(store.discard, store.session(session_id))
        await database.write(partial(tables.remove_session, session_id=session_id))
    known = await database.read(tables.session_ids)
    for stray in await asyncio.to_thread(store.stray_sessions, known):
        await asyncio.to_thread(store.discard, stray)
    await asyncio.to_thread(store.empty_trash)
    for session_id, number in await database.read(tables.unpublished_turns):
        await asyncio.to_thread(sweep_results, store.session(session_id), number)
    for job in await database.read(partial(jobs.jobs_in_state, state="running")):
        await _recover(job, database, scheduler, max_attempts)
    for job in await database.read(partial(jobs.jobs_in_state, state="queued")):
        scheduler.queued(job, is_new=False)


async def _recover(
    job: JobRecord, database: Database, scheduler: Scheduler, max_attempts: int
) -> None:
    """End or queue again a job that ran when the process was killed."""
    session = await database.read(partial(tables.session_by_id, session_id=job.session))
    assert session is not None
    scheduler.logs.open(job.id, is_new=False)
    found = await scheduler.left_behind(job.id, session)
    if isinstance(found, dict):
        log.info("job %s was finished before the service ended", job.id)
        await scheduler.finish(job, session, found)
    elif found is not None:
        await scheduler.end(job.id, "failed", {"code": "internal", "message": found})
    elif job.is_cancelling:
        await scheduler.end(job.id, "cancelled", jobs.CANCELLED)
    elif job.attempts >= max_attempts:
        message = (
            f"the service ended {job.attempts} times while it made this turn, which may be why; "
            "ask for it again, or for a smaller one"
        )
        await scheduler.end(job.id, "failed", {"code": "worker_crashed", "message": message})
    else:
        log.info("job %s is begun again", job.id)
        await database.write(partial(jobs.requeue, job_id=job.id, is_counted=True))
