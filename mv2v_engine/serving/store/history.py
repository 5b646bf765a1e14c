"""What people change of finished work: names, notes and favourites; turns that they delete.

A deleted turn keeps its row and its number; its files go, and no later turn remembers it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mv2v_engine.serving.errors import ApiError
from mv2v_engine.serving.store import tables
from mv2v_engine.serving.store.folders import Store, latents_paths, result_paths
from mv2v_engine.serving.store.records import SessionRecord, TurnRecord


@dataclass(frozen=True, slots=True)
class Deleted:
    """A turn that is gone. dependents: numbers of the turns that remembered it.

    waiting: ids of the jobs that wait in its session, and will not remember it.
    """

    session: str
    number: int
    dependents: tuple[int, ...]
    waiting: tuple[str, ...]


def edit_session(
    db: sqlite3.Connection, owner: str, session_id: str, changes: Mapping[str, Any], now: float
) -> SessionRecord:
    """Change what is said of a session; see `_changed`. Raises not_found, edit_conflict."""
    found = tables.find_session(db, owner, session_id)
    values = _changed(found, f"session {session_id}", changes, now)
    _update(db, "sessions", "id = ?", (session_id,), values)
    return tables.find_session(db, owner, session_id)


def edit_turn(
    db: sqlite3.Connection,
    owner: str,
    session_id: str,
    number: int,
    changes: Mapping[str, Any],
    now: float,
) -> TurnRecord:
    """Change what is said of a turn; see `_changed`. Raises not_found, edit_conflict."""
    tables.find_session(db, owner, session_id)
    found = tables.find_turn(db, session_id, number)
    values = _changed(found, f"turn {number}", changes, now)
    _update(db, "turns", "session = ? AND number = ?", (session_id, number), values)
    return tables.find_turn(db, session_id, number)


def _changed(
    found: SessionRecord | TurnRecord, what: str, changes: Mapping[str, Any], now: float
) -> dict[str, Any]:
    """The columns that become others; none if all are so already.

    changes: columns, and `edited` as it was where the change was begun, if that is to be checked.

    Raises edit_conflict: it has been changed since.
    """
    asked = {name: value for name, value in changes.items() if name != "edited"}
    new = {name: value for name, value in asked.items() if getattr(found, name) != value}
    if new and "edited" in changes and changes["edited"] != found.edited:
        raise ApiError(
            "edit_conflict",
            f"{what} was changed elsewhere since you read it; read it again, then change it",
            param="edited",
        )
    return new | {"edited": now} if new else {}


def _update(
    db: sqlite3.Connection, table: str, where: str, key: tuple[Any, ...], values: dict[str, Any]
) -> None:
    if values:
        columns = ", ".join(f"{name} = ?" for name in values)
        db.execute(f"UPDATE {table} SET {columns} WHERE {where}", (*values.values(), *key))


def delete_turn(
    db: sqlite3.Connection, owner: str, session_id: str, number: int, now: float
) -> Deleted:
    """Mark a turn as deleted; once more, it is the same.

    Raises not_found; busy: a turn of the session is being made, which may remember this one.
    """
    tables.find_session(db, owner, session_id)
    turns = {turn.number: turn for turn in tables.list_turns(db, session_id, with_deleted=True)}
    if number not in turns:
        raise ApiError("not_found", f"session {session_id} has no turn {number}")
    jobs = db.execute(
        "SELECT id, state FROM jobs WHERE session = ? AND state IN ('queued', 'running') "
        "ORDER BY serial",
        (session_id,),
    ).fetchall()
    if turns[number].deleted is None:
        _mark(db, turns, number, now, is_busy=any(job["state"] == "running" for job in jobs))
    dependents = tuple(other for other, turn in turns.items() if number in remembered(turn.report))
    waiting = tuple(job["id"] for job in jobs if job["state"] == "queued")
    return Deleted(session_id, number, dependents, waiting)


def _mark(
    db: sqlite3.Connection, turns: Mapping[int, TurnRecord], number: int, now: float, is_busy: bool
) -> None:
    turn = turns[number]
    if is_busy:
        raise ApiError(
            "busy",
            f"a turn of this session is being made and may remember turn {number}; delete it when "
            "that one has ended, or cancel that one first",
        )
    camera = (turn.entry or {}).get("camera")
    if camera is not None and "poses" not in camera:
        raise ApiError(
            "busy",
            f"the camera of turn {number} is known from its file alone, which later turns need; "
            "delete the session, or branch from the turn before",
        )
    key = (turn.session, number)
    gone = {"deleted": now, "bytes": 0, "name": "", "notes": "", "is_favourite": 0}
    _update(db, "turns", "session = ? AND number = ?", key, gone)
    for other in turns.values():
        if number in remembered(other.report):
            words = json.dumps(sorted({*other.forgotten, number}))
            key = (turn.session, other.number)
            _update(db, "turns", "session = ? AND number = ?", key, {"forgotten": words})


def remembered(report: Mapping[str, Any]) -> set[int]:
    """Numbers of the turns that a turn remembered; an edit remembers windows of its own alone."""
    memory = report.get("memory")
    if "windows" in report or not isinstance(memory, dict):
        return set()
    return {row["turn"] for row in memory.get("retrieved", ())}


def deleted_turns(db: sqlite3.Connection) -> list[tuple[str, int]]:
    """Session and number of every turn that was deleted."""
    rows = db.execute("SELECT session, number FROM turns WHERE deleted IS NOT NULL")
    return [(row["session"], row["number"]) for row in rows]


def discard_files(store: Store, session_id: str, number: int) -> None:
    """Take a deleted turn's files out of their place, those that are still there."""
    folder = store.session(session_id)
    for path in (*latents_paths(folder, number), *result_paths(folder, number)):
        store.discard(path)
