"""The rows of sessions and turns, and their SQL; `jobs` has the jobs'.

Functions of a connection, to be run by `Database.read` and `Database.write`. A session that is
being deleted is none.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import fields
from types import MappingProxyType
from typing import Any, TypeVar

from mv2v_engine.serving.errors import ApiError
from mv2v_engine.serving.store.digests import num_bytes
from mv2v_engine.serving.store.records import Page, SessionRecord, TurnRecord

Record = TypeVar("Record")
log = logging.getLogger("mv2v_engine.serving")

_SESSION = """
    SELECT s.*,
        (SELECT count(*) FROM turns t WHERE t.session = s.id AND t.deleted IS NULL) AS num_turns,
        source_bytes
            + (SELECT coalesce(sum(t.bytes), 0) FROM turns t WHERE t.session = s.id) AS bytes
    FROM sessions s
"""
# the columns of a turn that a branch takes over
_COPIED = (
    "number, request, report, created, bytes, is_published, files, entry, damage, name, notes, "
    "is_favourite, edited, deleted, forgotten"
)
# columns that hold JSON, and of what
JSON: Mapping[str, type[list[Any]] | type[dict[str, Any]]] = MappingProxyType(
    {"warnings": list, "forgotten": list}
    | dict.fromkeys(("request", "report", "files", "identity", "entry", "error", "progress"), dict)
)
# those of them that may hold nothing
_OPTIONAL = frozenset({"identity", "entry", "error", "progress"})


def no_session(session_id: str) -> ApiError:
    return ApiError("not_found", f"no session {session_id[:100]}; it may have been deleted")


def add_session(
    db: sqlite3.Connection,
    session: SessionRecord,
    *,
    key: str | None = None,
    digest: str | None = None,
    most: int,
) -> None:
    """Add a session whose folder is in place. most: sessions that an owner may have."""
    require_room(db, session.owner, most)
    row = columns(session, without={"num_turns", "bytes", "damage"})
    row |= {"source_bytes": session.bytes, "key": key, "digest": digest, "used": clock(db)}
    insert(db, "sessions", row)


def require_room(db: sqlite3.Connection, owner: str, most: int) -> None:
    """Refuse one more session than an owner may have."""
    count = scalar(db, "SELECT count(*) FROM sessions WHERE owner = ? AND NOT is_deleting", owner)
    if count >= most:
        raise ApiError(
            "too_many_sessions", f"there are {count} sessions, {most} may be; delete one first"
        )


def session_of_key(
    db: sqlite3.Connection, owner: str, key: str, digest: str
) -> SessionRecord | None:
    """The session that an idempotency key has made already."""
    row = db.execute(f"{_SESSION} WHERE owner = ? AND key = ?", (owner, key)).fetchone()
    if row is None:
        return None
    if row["digest"] != digest or row["is_deleting"]:
        raise ApiError(
            "idempotency_conflict",
            f"Idempotency-Key {key!r} came with another video or name before; use a new key",
        )
    return record(SessionRecord, row)


def find_session(db: sqlite3.Connection, owner: str, session_id: str) -> SessionRecord:
    """Raises not_found."""
    row = db.execute(
        f"{_SESSION} WHERE id = ? AND owner = ? AND NOT is_deleting", (session_id, owner)
    ).fetchone()
    if row is None:
        raise no_session(session_id)
    return record(SessionRecord, row)


def session_by_id(db: sqlite3.Connection, session_id: str) -> SessionRecord | None:
    """Anybody's, and one that is being deleted too."""
    row = db.execute(f"{_SESSION} WHERE id = ?", (session_id,)).fetchone()
    return None if row is None else record(SessionRecord, row)


def list_sessions(
    db: sqlite3.Connection, owner: str, *, limit: int, after: str | None, is_newest_first: bool
) -> Page[SessionRecord]:
    """Raises not_found: no such `after`."""
    if after is not None:
        find_session(db, owner, after)
    where = "WHERE owner = ? AND NOT is_deleting"
    order = (after, limit, is_newest_first)
    return listed(db, SessionRecord, f"{_SESSION} {where}", "sessions", [owner], *order)


def listed(
    db: sqlite3.Connection,
    kind: type[Record],
    select: str,
    table: str,
    values: Sequence[Any],
    after: str | None,
    limit: int,
    is_newest_first: bool,
) -> Page[Record]:
    """Records of a table in order, those behind the one of the id `after`."""
    direction, compare = ("DESC", "<") if is_newest_first else ("ASC", ">")
    behind = ""
    if after is not None:
        behind = f"AND serial {compare} (SELECT serial FROM {table} WHERE id = ?)"
        values = [*values, after]
    order = f"ORDER BY serial {direction} LIMIT {int(limit) + 1}"
    rows = db.execute(f"{select} {behind} {order}", values).fetchall()
    return Page(tuple(record(kind, row) for row in rows[:limit]), len(rows) > limit)


def touch(db: sqlite3.Connection, session_id: str, now: float) -> None:
    """Somebody has used a session."""
    db.execute(
        "UPDATE sessions SET touched = ?, used = ? WHERE id = ?", (now, clock(db), session_id)
    )


def clock(db: sqlite3.Connection) -> float:
    """Seconds that services have run on this store, as far as they have told it."""
    seconds: float = scalar(db, "SELECT coalesce(max(clock), 0) FROM store")
    return seconds


def advance_clock(db: sqlite3.Connection, seconds: float) -> None:
    """A service has run for so many seconds more."""
    db.execute("UPDATE store SET clock = clock + ?", (seconds,))


def mark_deleting(db: sqlite3.Connection, owner: str, session_id: str) -> None:
    """Mark a session as being deleted: it exists for nobody from now on. Raises not_found."""
    find_session(db, owner, session_id)
    db.execute("UPDATE sessions SET is_deleting = 1 WHERE id = ?", (session_id,))


def remove_session(db: sqlite3.Connection, session_id: str) -> None:
    """Remove a session's rows, its turns' and jobs' too."""
    db.execute("DELETE FROM sessions WHERE id = ?", (session_id,))


def deleting_sessions(db: sqlite3.Connection) -> list[str]:
    """Those whose deletion was cut off."""
    return [row["id"] for row in db.execute("SELECT id FROM sessions WHERE is_deleting")]


def session_ids(db: sqlite3.Connection) -> set[str]:
    return {row["id"] for row in db.execute("SELECT id FROM sessions")}


def kept_sessions(db: sqlite3.Connection) -> list[SessionRecord]:
    """Anybody's, without those that are being deleted."""
    rows = db.execute(f"{_SESSION} WHERE NOT is_deleting ORDER BY serial")
    return [record(SessionRecord, row) for row in rows]


def set_identity(db: sqlite3.Connection, session_id: str, identity: dict[str, Any]) -> None:
    """What the engine's manifest says of a session, once it has a turn."""
    db.execute(
        "UPDATE sessions SET identity = ? WHERE id = ? AND identity IS NULL",
        (json.dumps(identity), session_id),
    )


def set_session_damage(db: sqlite3.Connection, session_id: str, damage: str | None) -> None:
    """Why a session takes no more turns, or that it does again."""
    db.execute("UPDATE sessions SET damage = ? WHERE id = ?", (damage, session_id))


def set_turn_state(
    db: sqlite3.Connection, session_id: str, number: int, *, damage: str | None, is_published: bool
) -> None:
    """What was found of a turn's files."""
    db.execute(
        "UPDATE turns SET damage = ?, is_published = ? WHERE session = ? AND number = ?",
        (damage, is_published, session_id, number),
    )


def idle_sessions(db: sqlite3.Connection) -> list[tuple[SessionRecord, float]]:
    """Sessions without a turn that waits or runs, the least recently touched first.

    With each, for how many seconds of the store's clock nobody has touched it.
    """
    now = clock(db)
    rows = db.execute(
        f"{_SESSION} WHERE NOT is_deleting AND NOT EXISTS (SELECT 1 FROM jobs j "
        "WHERE j.session = s.id AND j.state IN ('queued', 'running')) "
        "ORDER BY used, touched, serial"
    )
    return [(record(SessionRecord, row), now - row["used"]) for row in rows]


def total_bytes(db: sqlite3.Connection) -> int:
    """The bytes of all sessions that are not being deleted."""
    total: int = scalar(
        db,
        "SELECT coalesce((SELECT sum(source_bytes) FROM sessions WHERE NOT is_deleting), 0) + "
        "coalesce((SELECT sum(t.bytes) FROM turns t JOIN sessions s ON s.id = t.session "
        "WHERE NOT s.is_deleting), 0)",
    )
    return total


def add_turn(db: sqlite3.Connection, turn: TurnRecord, *, is_repeatable: bool) -> None:
    """Add a finished turn.

    is_repeatable: asked for again, it is the same turn (an edit is), whole again if it was damaged
        or deleted.
    """
    row = columns(turn, without={"damage"})
    # what people have written of it stays
    own = {"job", "name", "notes", "is_favourite", "edited"}
    again = ", ".join(f"{name} = excluded.{name}" for name in row if name not in own)
    rest = (
        f"ON CONFLICT (session, number) DO UPDATE SET {again}, damage = NULL "
        "WHERE turns.damage IS NOT NULL OR turns.deleted IS NOT NULL"
    )
    insert(db, "turns", row, rest if is_repeatable else "")


def list_turns(
    db: sqlite3.Connection, session_id: str, *, with_deleted: bool = False
) -> tuple[TurnRecord, ...]:
    """A session's turns in order. with_deleted: also those of which nothing but the row is left."""
    which = "" if with_deleted else "AND deleted IS NULL"
    rows = db.execute(
        f"SELECT * FROM turns WHERE session = ? {which} ORDER BY number", (session_id,)
    )
    return tuple(record(TurnRecord, row) for row in rows)


def find_turn(db: sqlite3.Connection, session_id: str, number: int) -> TurnRecord:
    """Raises not_found."""
    row = db.execute(
        "SELECT * FROM turns WHERE session = ? AND number = ?", (session_id, number)
    ).fetchone()
    if row is None:
        raise ApiError("not_found", f"session {session_id} has no turn {number}")
    if row["deleted"] is not None:
        raise ApiError("not_found", f"turn {number} of session {session_id} was deleted")
    return record(TurnRecord, row)


def copy_turns(db: sqlite3.Connection, parent: str, session_id: str, number: int) -> None:
    """Give a branch the first turns of its parent."""
    db.execute(
        f"INSERT INTO turns (session, {_COPIED}) SELECT ?, {_COPIED} FROM turns "
        "WHERE session = ? AND number <= ?",
        (session_id, parent, number),
    )


def set_published(
    db: sqlite3.Connection, session_id: str, number: int, files: dict[str, Any]
) -> None:
    """A turn's mp4 and thumbnail are there again. files: what is promised of all its files."""
    db.execute(
        "UPDATE turns SET is_published = 1, bytes = ?, files = ? WHERE session = ? AND number = ?",
        (num_bytes(files), json.dumps(files), session_id, number),
    )


def unpublished_turns(db: sqlite3.Connection) -> list[tuple[str, int]]:
    """Session and number of turns whose mp4 or thumbnail is to be made again, and can be."""
    rows = db.execute(
        "SELECT t.session, t.number FROM turns t JOIN sessions s ON s.id = t.session "
        "WHERE t.is_published = 0 AND t.damage IS NULL AND t.deleted IS NULL AND s.damage IS NULL "
        "AND NOT s.is_deleting "
        "ORDER BY t.session, t.number"
    )
    return [(row["session"], row["number"]) for row in rows]


def insert(db: sqlite3.Connection, table: str, row: dict[str, Any], rest: str = "") -> None:
    names, places = ", ".join(row), ", ".join("?" * len(row))
    db.execute(f"INSERT INTO {table} ({names}) VALUES ({places}) {rest}", tuple(row.values()))


def scalar(db: sqlite3.Connection, query: str, *values: Any) -> Any:
    ((value,),) = db.execute(query, values).fetchall()
    return value


def text(value: Any | None) -> str | None:
    return None if value is None else json.dumps(value)


def columns(kept: Any, *, without: Set[str] = frozenset()) -> dict[str, Any]:
    """A record's fields as a row has them, and as they are read from it: SQLite has no booleans."""
    row = {field.name: getattr(kept, field.name) for field in fields(kept)}
    return {
        name: text(value) if name in JSON else int(value) if isinstance(value, bool) else value
        for name, value in row.items()
        if name not in without
    }


def record(kind: type[Record], row: sqlite3.Row) -> Record:
    """The record of a row; where a column of JSON is damaged, which a start mends, with nothing."""
    values: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        value = row[field.name]
        if field.name in JSON:
            value = _parsed(row, field.name)
        elif field.name.startswith("is_"):
            value = bool(value)
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def _parsed(row: sqlite3.Row, column: str) -> Any:
    """What a column of JSON holds."""
    kind, value = JSON[column], None
    if row[column] is not None:
        with suppress(TypeError, ValueError, RecursionError):
            value = json.loads(row[column])
        if isinstance(value, kind):
            return value
        log.error("%s of a row is damaged: no JSON of a %s", column, kind.__name__)
    return None if column in _OPTIONAL else kind()
