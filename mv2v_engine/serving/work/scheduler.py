"""From the queue to the backend and back into the database.

A job's row is `running`, with its turn's number, before the backend is told; its turn and its end
are one transaction after the backend has written everything. What the backend had finished before
a crash is found in the session's folder, never made a second time.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

from mv2v_engine.errors import StorageError
from mv2v_engine.serving.config import ServingConfig
from mv2v_engine.serving.errors import client_words, disk_errors, failed, failure
from mv2v_engine.serving.store import jobs, tables
from mv2v_engine.serving.store.claims import taken
from mv2v_engine.serving.store.database import Database, Given, Result, Work
from mv2v_engine.serving.store.digests import num_bytes, promised
from mv2v_engine.serving.store.folders import (
    RESULTS,
    Store,
    latents_paths,
    manifest_entry,
    manifest_row,
    result_paths,
    sweep_session,
)
from mv2v_engine.serving.store.mirror import write_turn
from mv2v_engine.serving.store.records import JobRecord, SessionRecord, TurnRecord
from mv2v_engine.serving.watch.events import EventLogs
from mv2v_engine.serving.watch.listener import Caught, Listener
from mv2v_engine.serving.work.backend import LAST_OF_BACKEND, WORKER_GONE, Backend

log = logging.getLogger("mv2v_engine.serving")

# a turn's seconds before any was made, for Retry-After; then the mean, the newest weighing most
_FIRST_GUESS, _NEWEST = 30.0, 0.3
# pauses between tries to write what a full disk did not take
_PAUSES = (1.0, 2.0, 5.0, 10.0, 30.0)
# what a turn may fail with because a file that it needs was lost while it was made
_MAY_BE_DAMAGE = ("internal", "unprocessable_turn")
# seconds that a cancelled turn has to reach its next step when the service stops
_LAST_STEP_SECONDS = 15.0


class Scheduler:
    """Runs the queue's jobs, as many at once as the backend takes, never two of one session."""

    def __init__(
        self,
        config: ServingConfig,
        store: Store,
        database: Database,
        backend: Backend,
        logs: EventLogs,
        listeners: Sequence[Listener],
    ) -> None:
        self.config, self.store, self.database = config, store, database
        self.backend, self.logs, self.listeners = backend, logs, listeners
        self.turn_seconds = _FIRST_GUESS
        # the sessions that the worker has in memory, the last used one last
        self.memory: OrderedDict[str, dict[str, Any]] = OrderedDict()
        # a job is queued and announced before it begins
        self.queueing = asyncio.Lock()
        self._turns: dict[str, asyncio.Task[None]] = {}
        self._positions: dict[str, int] = {}
        self._cancelling: set[str] = set()
        self._is_stopping = False
        self._woken, self._turn_ended = asyncio.Event(), asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self.turns_to_publish: Callable[[], None] = lambda: None
        # a session as its files are now
        self.compared: Callable[[SessionRecord], Awaitable[SessionRecord]]

    @property
    def num_running(self) -> int:
        return len(self._turns)

    async def recover(self) -> None:
        """End the jobs of a process that was killed, or queue them again; before `start`."""
        for job in await self.database.read(jobs.jobs_in_state, "running"):
            await self._recover(job)
        for job in await self.database.read(jobs.jobs_in_state, "queued"):
            self.queued(job, is_new=False)

    async def _recover(self, job: JobRecord) -> None:
        """End or queue again a job that ran when the process was killed."""
        session = await self.database.read(tables.session_by_id, job.session)
        assert session is not None
        self.logs.open(job.id, is_new=False)
        found = await self._left_behind(job.id, session)
        if found is not None and found["type"] == "done":
            log.info("job %s was finished before the service ended", job.id)
            await self._finish(job, session, found)
        elif found is not None:
            await self._fail(job.id, found)
        elif job.is_cancelling:
            await self._end(job.id, "cancelled", jobs.CANCELLED)
        elif job.attempts >= self.config.max_attempts:
            message = (
                f"the service ended {job.attempts} times while it made this turn, which may be "
                "why; ask for it again, or for a smaller one"
            )
            await self._fail(job.id, failed("worker_crashed", message))
        else:
            log.info("job %s is begun again", job.id)
            await self.database.must_write(jobs.requeue, job.id, is_counted=True)

    def start(self) -> None:
        self._loop = asyncio.create_task(self._run(), name="scheduler")

    def wake(self) -> None:
        """Something was queued, or the backend has changed."""
        self._woken.set()

    async def stop(self) -> None:
        """Begin no more turns; those under way get their grace, then go back to the queue."""
        self._is_stopping = True
        self.wake()
        if self._loop is not None:
            await self._loop
        for seconds in (self.config.grace, _LAST_STEP_SECONDS):
            if self._turns:
                await asyncio.wait(self._turns.values(), timeout=seconds)
            for job_id in self._turns:
                self.backend.cancel(job_id)
        await self.backend.stop(0.0 if self._turns else self.config.grace)
        if self._turns:
            await asyncio.wait(self._turns.values())

    async def submit(self, job: JobRecord, key: str | None) -> tuple[JobRecord, bool]:
        """Queue a job; the one that the idempotency key has made already, if it has.

        Returns the job and whether it is new. Raises queue_full, idempotency_conflict.
        """
        text = json.dumps([job.session, job.request], sort_keys=True)
        async with self.queueing:
            with disk_errors():
                kept, is_new = await self.database.write(
                    jobs.submit,
                    job,
                    key=key,
                    digest=hashlib.sha256(text.encode()).hexdigest(),
                    max_queue=self.config.max_queue,
                    max_share=self.config.queue_share,
                    turn_seconds=self.turn_seconds,
                )
            if is_new:
                self.queued(kept, is_new=True)
                # it may have come before some that waited already
                await self.announce_positions()
        return self.logs.with_progress(kept), is_new

    async def cancel(self, owner: str, job_id: str) -> JobRecord:
        """End a job that waits now, one that runs at its next step. Raises not_found."""
        with disk_errors():
            job, is_ended_now = await self.database.write(jobs.cancel, owner, job_id, time.time())
        if is_ended_now:
            self.ended(job)
            await self.announce_positions()
        elif job.state == "running":
            self.end_at_next_step(job_id)
        return self.logs.with_progress(job)

    def end_at_next_step(self, job_id: str) -> None:
        """Cancel a job that runs."""
        self._cancelling.add(job_id)
        self.backend.cancel(job_id)

    async def session_idle(self, session_id: str) -> None:
        """Wait until no job of a session runs."""
        while True:
            ended = self._turn_ended
            if not await self.database.read(jobs.num_running, session_id):
                return
            await ended.wait()

    def tell(self, call: Callable[[Listener], None]) -> None:
        """Tell every listener; one that fails harms neither the turn nor the others."""
        for listener in self.listeners:
            caught = Caught()
            with caught:
                call(listener)
            if caught.error is not None:
                who = type(listener).__name__
                log.error("%s failed at what it was told", who, exc_info=caught.error)

    def ended(self, job: JobRecord, report: dict[str, Any] | None = None) -> None:
        """A job has ended in the database: end its stream, and say so."""
        self._positions.pop(job.id, None)
        self.logs.end(job)
        self.tell(lambda listener: listener.job_ended(job, report))

    def queued(self, job: JobRecord, *, is_new: bool) -> None:
        """A job waits in the database: open its stream, and say so."""
        self.logs.open(job.id, is_new=is_new)
        self._announce(job.id, job.position or 1)
        self.tell(lambda listener: listener.job_queued(job))
        self.wake()

    async def announce_positions(self) -> None:
        """Tell those who wait where they are in the queue."""
        for position, job_id in enumerate(await self.database.read(jobs.queued_ids), 1):
            self._announce(job_id, position)

    def _announce(self, job_id: str, position: int) -> None:
        found = self.logs.find(job_id)
        if found is not None and self._positions.get(job_id) != position:
            self._positions[job_id] = position
            found.add({"type": "queued", "position": position})

    async def _run(self) -> None:
        while not self._is_stopping:
            self._woken.clear()
            while not self._is_stopping and self._has_room() and await self._start_next():
                await self.announce_positions()
            await self._woken.wait()

    async def _start_next(self) -> bool:
        """Begin the next job, if one can begin."""
        async with self.queueing:
            found = await self.written(jobs.start_next, time.time())
            if found is not None:
                job, session = found
                self._turns[job.id] = asyncio.create_task(self._turn(job, session), name=job.id)
        return found is not None

    def _has_room(self) -> bool:
        # a backend that is lost fails what waits, so that nobody waits for ever
        can_run = self.backend.ready or self.backend.is_lost
        return can_run and len(self._turns) < self.backend.capacity

    async def _turn(self, job: JobRecord, session: SessionRecord) -> None:
        """One running job to its end in the database."""
        self._positions.pop(job.id, None)
        self.logs.open(job.id, is_new=False).add({"type": "started"})
        self.tell(lambda listener: listener.job_started(job))
        # whatever goes wrong is one failed job
        began = time.monotonic()
        driven = self._drive(job, session)
        result = (await asyncio.gather(driven, return_exceptions=True))[0]
        if isinstance(result, BaseException):
            log.error("job %s failed", job.id, exc_info=result)
            name = type(result).__name__
            result = failed("internal", f"{name}: {result}" if str(result) else name)
        try:
            await self._settle(job, session, result)
            if result["type"] == "done":
                self.turn_seconds += _NEWEST * (time.monotonic() - began - self.turn_seconds)
        finally:
            del self._turns[job.id]
            self._cancelling.discard(job.id)
            changed, self._turn_ended = self._turn_ended, asyncio.Event()
            changed.set()
            self.wake()

    async def _drive(self, job: JobRecord, session: SessionRecord) -> dict[str, Any]:
        """Let the backend make the turn, if what it needs is as recorded; its last event."""
        session = await self.compared(session)
        if session.damage is not None:
            return failed("damaged", session.damage)
        outcome = await self._driven(job, session)
        if outcome["type"] == "failed" and outcome["code"] in _MAY_BE_DAMAGE:
            session = await self.compared(session)
            if session.damage is not None:
                return failed("damaged", session.damage)
        return outcome

    async def _driven(self, job: JobRecord, session: SessionRecord) -> dict[str, Any]:
        stream, folder = self.logs.open(job.id, is_new=False), self.store.session(session.id)
        outcome = None
        async for event in self.backend.run(job, session, folder):
            if job.id in self._cancelling:
                # asked for before the backend knew the job
                self.backend.cancel(job.id)
            kind = event["type"]
            if kind in LAST_OF_BACKEND:
                outcome = event
            elif kind == "started" and job.number is None:
                await self.written(jobs.set_number, job.id, event["number"])
            elif kind != "started":
                stream.add(event)
                self.tell(methodcaller("job_event", job, event))
        if outcome is None:
            raise RuntimeError("the backend's events ended without a last one")
        return outcome

    async def _settle(
        self, job: JobRecord, session: SessionRecord, outcome: dict[str, Any]
    ) -> None:
        """Write down what a job came to."""
        if outcome["type"] == "done":
            self._remember(session.id, outcome.get("memory"))
            await self._finish(job, session, outcome)
            return
        is_crash = outcome["type"] == "failed" and outcome["code"] in WORKER_GONE
        if is_crash:
            self.memory.clear()
            found = await self._left_behind(job.id, session)
            if found is not None and found["type"] == "done":
                await self._finish(job, session, found)
                return
            if found is not None:
                outcome, is_crash = found, False
        is_cancelled = outcome["type"] == "cancelled" or is_crash
        if job.id in self._cancelling and is_cancelled:
            await self._end(job.id, "cancelled", jobs.CANCELLED)
        elif self._is_stopping and is_cancelled:
            again = await self.written(jobs.requeue, job.id, is_counted=False)
            self.queued(again, is_new=False)
        elif outcome["type"] == "cancelled":
            await self._end(job.id, "cancelled", jobs.CANCELLED)
        else:
            await self._fail(job.id, outcome)

    def _remember(self, session_id: str, memory: dict[str, Any] | None) -> None:
        self.memory.pop(session_id, None)
        if memory is not None:
            self.memory[session_id] = memory
        while len(self.memory) > self.config.max_sessions_open:
            self.memory.popitem(last=False)

    async def _fail(self, job_id: str, outcome: dict[str, Any]) -> None:
        """End a job as its last event says, which was a `failed` one."""
        error = {"code": outcome["code"], "message": client_words(outcome["message"])}
        await self._end(job_id, "failed", error)

    async def _end(self, job_id: str, state: Any, error: dict[str, str]) -> None:
        """End a job without a turn."""
        ended = await self.written(jobs.end, job_id, state, time.time(), error=error)
        if ended is not None:
            self.ended(ended)

    async def _left_behind(self, job_id: str, session: SessionRecord) -> dict[str, Any] | None:
        """What a job whose worker is gone has left: its turn whole, or nothing.

        Returns:
            the turn as a `done` event, None if it is not there, or, as a `failed` one, what is
            wrong with the folder.
        """
        job = await self.database.read(jobs.job_by_id, job_id)
        folder = self.store.session(session.id)
        try:
            return await asyncio.to_thread(_left_behind, folder, session, job.number)
        except StorageError as error:
            return failure(error)
        except OSError as error:
            return failed("internal", str(error))

    async def _finish(self, job: JobRecord, session: SessionRecord, done: dict[str, Any]) -> None:
        """Record a turn that is in its session's folder. done: as the backend's event."""
        folder = self.store.session(session.id)
        try:
            turn, identity = await asyncio.to_thread(_recorded, folder, session, job, done)
            await asyncio.to_thread(write_turn, folder, turn)
        except (StorageError, OSError) as error:
            # the folder has no such turn, whatever the worker says
            await self._fail(job.id, failed("internal", str(error)))
            return
        is_repeatable = session.kind == "edits"
        ended = await self.written(
            jobs.finish, job, turn, is_repeatable=is_repeatable, identity=identity
        )
        await asyncio.to_thread(self.store.spare.keep)
        if not turn.is_published:
            self.turns_to_publish()
        self.ended(ended, turn.report)

    async def written(
        self, work: Work[Given, Result], *args: Given.args, **how: Given.kwargs
    ) -> Result:
        """Write what must be written; recovery takes the bytes that are kept for a full disk."""
        write = self.database.must_write if self._loop is None else self.database.write
        return await self.until_written(partial(write, work, *args, **how))

    async def until_written(self, write: Callable[[], Awaitable[Result]]) -> Result:
        """While the disk is full, try again and again."""
        attempt = 0
        while True:
            try:
                return await write()
            except sqlite3.OperationalError as error:
                # before it runs, whoever starts it tells why it cannot
                if self._is_stopping or self._loop is None:
                    raise
                log.error("the database does not take a write (%s); trying again", error)
            await asyncio.sleep(_PAUSES[min(attempt, len(_PAUSES) - 1)])
            attempt += 1


def _recorded(
    folder: Path, session: SessionRecord, job: JobRecord, done: dict[str, Any]
) -> tuple[TurnRecord, dict[str, Any]]:
    """A finished turn as its row will have it, and what the engine's manifest says of its session.

    Raises:
        StorageError: its files are not there.
    """
    number = done["number"]
    latents = latents_paths(folder, number)
    if not latents:
        raise StorageError(f"turn {number} is said to be finished, and has no latents")
    results = result_paths(folder, number) if done["published"] else []
    files = promised(folder, [*latents, *results])
    entry, identity = manifest_entry(folder, number)
    turn = TurnRecord(
        session=session.id,
        number=number,
        job=job.id,
        request=job.request,
        report=done["report"],
        created=time.time(),
        bytes=num_bytes(files),
        is_published=len(results) == len(RESULTS),
        files=files,
        entry=entry,
    )
    return turn, identity


def _left_behind(folder: Path, session: SessionRecord, number: int | None) -> dict[str, Any] | None:
    with taken(folder):
        sweep_session(folder)
        row = manifest_row(folder, number)
    if row is None or number is None:
        return None
    # its video may be half of an edit's or missing: written again, it is the same
    for path in result_paths(folder, number):
        path.unlink(missing_ok=True)
    return {"type": "done", "number": number, "report": row["report"], "published": False}
