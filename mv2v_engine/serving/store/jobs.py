"""The rows of jobs, which are the queue, and their SQL.

Owners take turns: the queue is a round of each owner's next job, then a round of the ones behind
these. In a round, whoever's last turn began the longest ago comes first.

A job goes queued -> running -> finished | failed | cancelled, or back to queued. Every change of
state is conditional on the state before it, so that of two that race one has no effect.
"""

from __future__ import annotations

import json
import sqlite3
from typing import Any

from mv2v_engine.serving.errors import ApiError, queue_full
from mv2v_engine.serving.store.records import JobRecord, JobState, Page, SessionRecord, TurnRecord
from mv2v_engine.serving.store.tables import (
    add_turn,
    columns,
    find_session,
    insert,
    listed,
    mark_deleting,
    record,
    scalar,
    session_by_id,
    set_identity,
    text,
    touch,
)

# the index of jobs that are alive serves whoever names its own condition
_IS_WAITING = "state IN ('queued', 'running') AND state = 'queued'"
_WAITING = f"""
    WITH owners AS MATERIALIZED (
        SELECT owner, (
            SELECT started FROM jobs s WHERE s.owner = o.owner AND s.started IS NOT NULL
            ORDER BY s.serial DESC LIMIT 1
        ) AS last_start FROM (SELECT DISTINCT owner FROM jobs WHERE {_IS_WAITING}) o
    ), rounds AS MATERIALIZED (
        SELECT id, serial, owner, row_number() OVER (PARTITION BY owner ORDER BY serial) AS round
        FROM jobs WHERE {_IS_WAITING}
    ), waiting AS MATERIALIZED (
        SELECT id AS job, row_number() OVER (ORDER BY round, last_start, serial) AS position
        FROM rounds JOIN owners USING (owner)
    )
"""
_JOB = f"""
    {_WAITING} SELECT j.*, CASE WHEN state = 'queued' THEN
        (SELECT position FROM waiting WHERE job = j.id)
    END AS position FROM jobs j
"""
# a session that is being deleted, and all that is its own, exists for nobody
_SEEN = "owner = ? AND NOT (SELECT is_deleting FROM sessions s WHERE s.id = j.session)"


def submit(
    db: sqlite3.Connection,
    job: JobRecord,
    *,
    key: str | None,
    digest: str,
    max_queue: int,
    max_share: int,
    turn_seconds: float,
) -> tuple[JobRecord, bool]:
    """Put a job into the queue; the job that the idempotency key has made already, if it has.

    digest: of the request. max_queue: jobs that may wait, but for the first of an owner. max_share:
    of one owner. turn_seconds: that one turn takes, for Retry-After.
    """
    find_session(db, job.owner, job.session)
    if key is not None:
        row = db.execute(f"{_JOB} WHERE owner = ? AND key = ?", (job.owner, key)).fetchone()
        if row is not None and row["digest"] != digest:
            raise ApiError(
                "idempotency_conflict",
                f"Idempotency-Key {key!r} came with another request before; use a new key",
            )
        if row is not None:
            return record(JobRecord, row), False
    own = f"SELECT count(*) FROM jobs WHERE {_IS_WAITING} AND owner = ?"
    waiting, num_own = queue_depth(db), scalar(db, own, job.owner)
    if num_own >= max_share:
        raise queue_full(turn_seconds, num_own, " of this token")
    if waiting >= max_queue and num_own:
        raise queue_full(turn_seconds, waiting)
    row = columns(job, without={"position"})
    insert(db, "jobs", row | {"key": key, "digest": digest})
    touch(db, job.session, job.created)
    return job_by_id(db, job.id), True


def queue_depth(db: sqlite3.Connection) -> int:
    """Jobs that wait."""
    count: int = scalar(db, f"SELECT count(*) FROM jobs WHERE {_IS_WAITING}")
    return count


def queued_ids(db: sqlite3.Connection) -> list[str]:
    """Jobs that wait, the next one first."""
    rows = db.execute(f"{_WAITING} SELECT job FROM waiting ORDER BY position")
    return [row["job"] for row in rows]


def start_next(db: sqlite3.Connection, now: float) -> tuple[JobRecord, SessionRecord] | None:
    """Take the next job whose session has none running; of views it gets its turn's number."""
    row = db.execute(
        f"{_WAITING} SELECT j.id, j.session, s.kind FROM waiting JOIN jobs j ON j.id = job "
        "JOIN sessions s ON s.id = j.session WHERE NOT s.is_deleting AND NOT EXISTS "
        "(SELECT 1 FROM jobs r WHERE r.session = j.session AND r.state = 'running') "
        "ORDER BY position LIMIT 1"
    ).fetchone()
    if row is None:
        return None
    number = None
    if row["kind"] == "views":
        number = scalar(
            db, "SELECT coalesce(max(number), 0) + 1 FROM turns WHERE session = ?", row["session"]
        )
    db.execute(
        "UPDATE jobs SET state = 'running', number = ?, started = ?, attempts = attempts + 1 "
        "WHERE id = ?",
        (number, now, row["id"]),
    )
    session = session_by_id(db, row["session"])
    assert session is not None
    return job_by_id(db, row["id"]), session


def set_number(db: sqlite3.Connection, job_id: str, number: int) -> None:
    """An edit's number, which its folder knows."""
    db.execute("UPDATE jobs SET number = ? WHERE id = ? AND state = 'running'", (number, job_id))


def finish(
    db: sqlite3.Connection,
    job: JobRecord,
    turn: TurnRecord,
    *,
    is_repeatable: bool,
    identity: dict[str, Any],
) -> JobRecord:
    """A running job's turn is made: the turn and the job's end, in one transaction.

    identity: what the engine's manifest says of the session.
    """
    add_turn(db, turn, is_repeatable=is_repeatable)
    set_identity(db, turn.session, identity)
    touch(db, turn.session, turn.created)
    ended = end(db, job.id, "finished", turn.created, number=turn.number)
    assert ended is not None, f"{job.id} ended before its turn was recorded"
    return ended


def end(
    db: sqlite3.Connection,
    job_id: str,
    state: JobState,
    now: float,
    *,
    number: int | None = None,
    error: dict[str, str] | None = None,
) -> JobRecord | None:
    """End a job that waits or runs; None if it had ended."""
    progress: dict[str, Any] = {"type": state}
    if state == "finished":
        progress["turn"] = number
    elif error is not None:
        progress["error"] = error
    changed = db.execute(
        "UPDATE jobs SET state = ?, ended = ?, number = ?, error = ?, progress = ? "
        "WHERE id = ? AND state IN ('queued', 'running')",
        (state, now, number, text(error), json.dumps(progress), job_id),
    )
    return job_by_id(db, job_id) if changed.rowcount else None


def requeue(db: sqlite3.Connection, job_id: str, *, is_counted: bool) -> JobRecord:
    """Put a running job back where it was in the queue. is_counted: as an attempt."""
    db.execute(
        "UPDATE jobs SET state = 'queued', number = NULL, started = NULL, progress = NULL, "
        "attempts = attempts - ? WHERE id = ? AND state = 'running'",
        (0 if is_counted else 1, job_id),
    )
    return job_by_id(db, job_id)


def cancel(db: sqlite3.Connection, owner: str, job_id: str, now: float) -> tuple[JobRecord, bool]:
    """Cancel a job that waits, mark one that runs; whether this call ended it.

    Raises not_found.
    """
    job = find_job(db, owner, job_id)
    if job.state == "queued":
        ended = end(db, job_id, "cancelled", now, error=CANCELLED)
        assert ended is not None
        return ended, True
    if job.state == "running":
        db.execute("UPDATE jobs SET is_cancelling = 1 WHERE id = ?", (job_id,))
    return find_job(db, owner, job_id), False


def delete_session(
    db: sqlite3.Connection, owner: str, session_id: str, now: float, *, is_idle: bool
) -> tuple[list[JobRecord], list[JobRecord]]:
    """Begin to delete a session; its jobs are cancelled.

    is_idle: whether it must have none that wait or run.

    Returns:
        the jobs that waited and have ended, and those that run and will.

    Raises not_found, busy.
    """
    mark_deleting(db, owner, session_id)
    rows = db.execute(
        "SELECT id, state FROM jobs WHERE session = ? AND state IN ('queued', 'running') "
        "ORDER BY serial",
        (session_id,),
    ).fetchall()
    if rows and is_idle:
        raise ApiError("busy", f"session {session_id} has turns that wait or run")
    ended, running = [], []
    for row in rows:
        if row["state"] == "running":
            db.execute("UPDATE jobs SET is_cancelling = 1 WHERE id = ?", (row["id"],))
            running.append(job_by_id(db, row["id"]))
        else:
            job = end(db, row["id"], "cancelled", now, error=CANCELLED)
            assert job is not None
            ended.append(job)
    return ended, running


def find_job(db: sqlite3.Connection, owner: str, job_id: str) -> JobRecord:
    """Raises not_found."""
    row = db.execute(f"{_JOB} WHERE id = ? AND {_SEEN}", (job_id, owner)).fetchone()
    if row is None:
        raise ApiError("not_found", f"no job {job_id[:100]}; its session may have been deleted")
    return record(JobRecord, row)


def job_by_id(db: sqlite3.Connection, job_id: str) -> JobRecord:
    """Anybody's."""
    return record(JobRecord, db.execute(f"{_JOB} WHERE id = ?", (job_id,)).fetchone())


def any_job(db: sqlite3.Connection, job_id: str) -> JobRecord | None:
    """Anybody's, if there is one."""
    row = db.execute(f"{_JOB} WHERE id = ?", (job_id,)).fetchone()
    return None if row is None else record(JobRecord, row)


def list_jobs(
    db: sqlite3.Connection,
    owner: str,
    *,
    session: str | None,
    limit: int,
    after: str | None,
    is_newest_first: bool,
) -> Page[JobRecord]:
    """Raises not_found: no such session or `after`."""
    where, values = f"WHERE {_SEEN}", [owner]
    if session is not None:
        find_session(db, owner, session)
        where, values = f"{where} AND session = ?", [owner, session]
    if after is not None:
        find_job(db, owner, after)
    return listed(db, JobRecord, f"{_JOB} {where}", "jobs", values, after, limit, is_newest_first)


def jobs_in_state(db: sqlite3.Connection, state: JobState) -> list[JobRecord]:
    """Anybody's, the oldest first."""
    rows = db.execute(f"{_JOB} WHERE state = ? ORDER BY serial", (state,))
    return [record(JobRecord, row) for row in rows]


def num_running(db: sqlite3.Connection, session_id: str) -> int:
    """Jobs of a session that run: one or none."""
    count: int = scalar(
        db, "SELECT count(*) FROM jobs WHERE session = ? AND state = 'running'", session_id
    )
    return count


CANCELLED = {"code": "cancelled", "message": "the turn was cancelled; the session is as before"}
