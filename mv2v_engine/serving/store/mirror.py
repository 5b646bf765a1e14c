"""A copy of a session's rows in its folder, from which a lost database is made again.

    rows/session.json    rows/turn_0001.json

A turn's is written before its row, a session's behind it and before anybody is told of it; a start
writes what lacks. What no file tells of a finished turn is read from the engine's manifest.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from mv2v_engine.arguments import shown
from mv2v_engine.errors import StorageError
from mv2v_engine.files import save_json
from mv2v_engine.serving.store.database import Database, create
from mv2v_engine.serving.store.digests import is_promise, num_bytes, promised
from mv2v_engine.serving.store.folders import (
    finished_numbers,
    latents_paths,
    manifest_row,
    reading,
    stored_identity,
)
from mv2v_engine.serving.store.records import Kind, TurnRecord
from mv2v_engine.serving.store.tables import JSON, columns, insert, scalar, text

log = logging.getLogger("mv2v_engine.serving")

FOLDER = "rows"
_FORMAT, _VERSION = "mv2v-rows", 1
# each table's columns that change often, are found out at every start, or belong to one
# database
_NOT_COPIED = {
    "sessions": {"serial", "touched", "used", "is_deleting", "damage", "identity"},
    "turns": {"session", "is_published", "damage"},
}
# what older copies lack, from before there was a choice or anything to say
_SAID: dict[str, Any] = {"notes": "", "is_favourite": 0, "edited": None}
_EARLIER: dict[str, dict[str, Any]] = {
    "sessions": dict.fromkeys(("window", "asked_fps", "alpha", "fit", "size")) | _SAID,
    "turns": {"name": "", "deleted": None, "forgotten": "[]", **_SAID},
}
_KINDS = {"TEXT": (str,), "INTEGER": (int,), "REAL": (int, float)}


@functools.cache
def _columns(table: str) -> dict[str, tuple[type, ...]]:
    """The columns that are copied, and what each may hold, as the schema has them."""
    with closing(sqlite3.connect(":memory:")) as db:
        create(db)
        rows = db.execute(f"PRAGMA table_info({table})").fetchall()
    return {
        name: _KINDS[kind] + (() if is_needed else (type(None),))
        for _, name, kind, is_needed, *_ in rows
        if name not in _NOT_COPIED[table]
    }


@dataclass(frozen=True)
class Rows:
    """A session's rows as they are copied. store: the id of the store that they belong to."""

    store: str
    session: dict[str, Any]
    turns: dict[int, dict[str, Any]] = field(default_factory=dict)


async def mend_rows(database: Database, folder: Path, session_id: str) -> None:
    """Give rows of a session that are damaged what their copy has; the rest of them stays."""
    rows = await database.read(rows_of, session_id)
    if rows is None:
        return
    changes = await asyncio.to_thread(_mended, folder, rows)
    if changes:
        await database.must_write(_update, session_id, changes)


def _mended(folder: Path, rows: Rows) -> list[tuple[int | None, dict[str, Any]]]:
    """Damaged rows as their copies have them, by the turn's number, None for the session."""
    found: list[tuple[int | None, dict[str, Any]]] = []
    for number, row in [(None, rows.session), *rows.turns.items()]:
        try:
            _checked(row, "sessions" if number is None else "turns")
            continue
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            what = "the session" if number is None else f"turn {number}"
            log.error("the row of %s of %s is damaged: %s", what, folder.name, error)
        good = copied_turn(folder, number) if number else _copied_session(folder)
        if good is not None:
            found.append((number, good))
            log.warning("it is written again from its copy")
    return found


def _copied_session(folder: Path) -> dict[str, Any] | None:
    try:
        return read_rows(folder).session
    except StorageError as error:
        log.error("%s", error)
        return None


def _update(
    db: sqlite3.Connection, session_id: str, changes: list[tuple[int | None, dict[str, Any]]]
) -> None:
    for number, row in changes:
        columns = ", ".join(f"{name} = ?" for name in row)
        table, where = ("sessions", "id = ?") if number is None else ("turns", "session = ?")
        more = "" if number is None else f" AND number = {int(number)}"
        db.execute(f"UPDATE {table} SET {columns} WHERE {where}{more}", (*row.values(), session_id))


async def mirror(
    database: Database, folder: Path, session_id: str, *, number: int | None = None
) -> None:
    """Bring the copy of a session's rows up to date. number: of the one turn that has changed.

    A folder that does not take it is said; the next start tries again.
    """
    rows = await database.read(rows_of, session_id, number=number)
    if rows is not None:
        texts: dict[str, dict[str, Any]] = {
            _turn_name(each): {"row": row} for each, row in rows.turns.items()
        }
        texts["session.json"] = {"store": rows.store, "row": rows.session}
        await asyncio.to_thread(_write, folder, texts)


def rows_of(db: sqlite3.Connection, session_id: str, *, number: int | None = None) -> Rows | None:
    """The rows of a session, of all its turns or of one; None if there is no such session."""
    found = db.execute("SELECT * FROM sessions WHERE id = ?", (session_id,)).fetchone()
    if found is None:
        return None
    session = _without(dict(found), _NOT_COPIED["sessions"])
    where = "session = ?" if number is None else f"session = ? AND number = {int(number)}"
    turns = {}
    for row in db.execute(f"SELECT * FROM turns WHERE {where}", (session_id,)):
        turns[row["number"]] = _without(dict(row), _NOT_COPIED["turns"])
    return Rows(scalar(db, "SELECT max(id) FROM store"), session, turns)


def write_turn(folder: Path, turn: TurnRecord) -> None:
    """Copy a row that is about to be written."""
    row = columns(turn, without=_NOT_COPIED["turns"])
    _write(folder, {_turn_name(turn.number): {"row": row}})


def _write(folder: Path, texts: dict[str, dict[str, Any]]) -> None:
    """Write what differs of the copy in a session's folder."""
    place = folder / FOLDER
    if not folder.is_dir():
        return
    for name, value in texts.items():
        value = {"format": _FORMAT, "version": _VERSION, **value}
        try:
            if _read_json(place / name) == value:
                continue
        except StorageError:
            log.warning("%s of %s was damaged, and is written again", name, folder.name)
        try:
            save_json(place / name, value)
        except StorageError as error:
            log.error("%s has no copy of its rows: %s", folder.name, error)
            return


def read_rows(folder: Path) -> Rows:
    """A session's rows as its folder has them, its turns' from the engine's manifest if need be.

    Raises:
        StorageError: the folder does not say whose session it is.
    """
    value = _read_json(folder / FOLDER / "session.json")
    if value is None:
        raise StorageError(f"{folder.name} has no copy of its rows")
    with reading(folder):
        row = _EARLIER["sessions"] | value["row"]
        session = _checked(row, "sessions")
        identity = text(stored_identity(folder))
        rows = Rows(str(value["store"]), session | {"identity": identity})
    copied = {
        int(path.stem.removeprefix("turn_"))
        for path in (folder / FOLDER).glob("turn_[0-9][0-9][0-9][0-9].json")
    }
    for number in sorted(copied | finished_numbers(folder)):
        found = copied_turn(folder, number)
        if found is not None:
            rows.turns[number] = found
    return rows


def had_rows_in(folder: Path) -> str | None:
    """The id of the store whose database had this folder's session; None if that is not known."""
    try:
        with reading(folder):
            value = _read_json(folder / FOLDER / "session.json") or {}
            return str(value["store"]) if value["row"]["id"] == folder.name else None
    except StorageError:
        return None


def copied_turn(folder: Path, number: int) -> dict[str, Any] | None:
    """A turn's row as its copy has it, or, without one, the engine's manifest; else None."""
    try:
        value = _read_json(folder / FOLDER / _turn_name(number))
        if value is not None:
            with reading(folder):
                row = _checked(_EARLIER["turns"] | value["row"], "turns")
                if row["number"] == number:
                    return row
    except StorageError as error:
        log.warning("%s", error)
    return turn_row(folder, number)


def turn_row(folder: Path, number: int) -> dict[str, Any] | None:
    """The row of a finished turn as the engine's manifest and files have it.

    None if they are damaged, which is said.
    """
    try:
        found = manifest_row(folder, number)
        if found is None:
            return None
        with reading(folder):
            report = found["report"]
            request = found["request"] if found["camera"] is None else _request(report)
            files = promised(folder, latents_paths(folder, number))
            entry = {name: value for name, value in found.items() if name != "report"}
            return {
                "number": number,
                "job": None,
                "request": json.dumps(request),
                "report": json.dumps(report),
                "created": (folder / "session.json").stat().st_mtime,
                "bytes": num_bytes(files),
                "files": json.dumps(files),
                "entry": text(entry),
            }
    except (StorageError, OSError) as error:
        log.warning("turn %d of %s cannot be taken up: %s", number, folder.name, error)
        return None


def insert_turn(db: sqlite3.Connection, session_id: str, row: dict[str, Any]) -> None:
    """Add a turn that the folder has and the database has not; its video is made if it lacks."""
    files = json.loads(row["files"])
    is_published = sum(name.startswith("results/") for name in files) == 2
    values = {**row, "session": session_id, "is_published": is_published}
    insert(db, "turns", values, "ON CONFLICT DO NOTHING")


def insert_session(db: sqlite3.Connection, rows: Rows) -> None:
    """Add a session, its turns, and the jobs that made them, as its folder has them."""
    session = {**rows.session, "touched": rows.session["created"]}
    session["used"] = scalar(db, "SELECT coalesce(max(clock), 0) FROM store")
    taken = db.execute(
        "SELECT 1 FROM sessions WHERE owner = ? AND key = ?", (session["owner"], session["key"])
    )
    if taken.fetchone() is not None:
        session |= {"key": None, "digest": None}
    insert(db, "sessions", session)
    for number, row in sorted(rows.turns.items()):
        insert_turn(db, session["id"], row)
        if row["job"] is not None:
            job = {
                "id": row["job"],
                "session": session["id"],
                "owner": session["owner"],
                "state": "finished",
                "request": row["request"],
                "number": number,
                "created": row["created"],
                "ended": row["created"],
                "attempts": 1,
                "progress": json.dumps({"type": "finished", "turn": number}),
                "digest": "",
            }
            insert(db, "jobs", job, "ON CONFLICT DO NOTHING")


def _turn_name(number: int) -> str:
    return f"turn_{number:04d}.json"


def _without(row: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def _request(report: dict[str, Any]) -> dict[str, Any]:
    """What a report says was asked for."""
    names = ("camera", "prompt", "seed", "num_inference_steps", "guidance_scale")
    request = {name: report[name] for name in names if report.get(name) not in (None, "")}
    memory = report.get("memory")
    return request | ({"memory": memory["mode"]} if memory else {})


def _checked(row: Any, table: str) -> dict[str, Any]:
    """A row whose columns are those there should be."""
    kinds = _columns(table)
    if set(row) != set(kinds):
        raise ValueError(f"columns {sorted(row)}, expected {sorted(kinds)}")
    for name, kind in kinds.items():
        if not isinstance(row[name], kind):
            raise TypeError(f"{name} is {shown(row[name])}")
    for name in JSON.keys() & set(row):
        value: Any = None if row[name] is None else json.loads(row[name])
        if row[name] is not None and not isinstance(value, JSON[name]):
            raise TypeError(f"{name} is {shown(row[name])}")
        if name == "files" and not all(map(is_promise, value.values())):
            raise TypeError(f"files are {shown(row[name])}")
    if row.get("kind", "views") not in get_args(Kind):
        raise ValueError(f"kind is {shown(row['kind'])}")
    return dict(row)


def _read_json(path: Path) -> Any:
    """What a file of the copy holds; None if there is none. Raises StorageError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"{path} cannot be read ({error})") from error
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        raise StorageError(f"{path} is no copy of rows")
    return value
