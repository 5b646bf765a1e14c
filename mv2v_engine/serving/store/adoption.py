"""A store of version 1, without identity and digests, becomes one of this version.

Its files are taken as they are where what is known of them agrees: the bytes that a row counts,
and the digest of its latents that the engine's manifest has. What does not agree gets no digest,
so that it is found out as damaged, or made again.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mv2v_engine.engine.folder import SessionFolder
from mv2v_engine.errors import StorageError
from mv2v_engine.serving.store import database
from mv2v_engine.serving.store.digests import promised
from mv2v_engine.serving.store.folders import (
    RESULTS,
    Store,
    latents_paths,
    manifest_row,
    reading,
    result_paths,
    source_path,
    stored_identity,
)
from mv2v_engine.serving.store.tables import text


def disagreement(db: sqlite3.Connection, store: Store) -> str | None:
    """In what the rows and the folders of a store do not tell of the same sessions, in words."""
    known = {}
    for row in db.execute("SELECT id, kind FROM sessions WHERE NOT is_deleting"):
        known[row["id"]] = row["kind"]
        if not store.session(row["id"]).is_dir():
            return f"{row['id']} has no folder"
    deleting = {row["id"] for row in db.execute("SELECT id FROM sessions WHERE is_deleting")}
    for folder in sorted(store.sessions.iterdir()):
        if folder.name in deleting:
            continue
        finished = finished_numbers(folder)
        if folder.name not in known:
            if finished:
                return f"no row tells of {folder.name}, which has {len(finished)} finished turns"
            continue
        rows = db.execute(
            "SELECT number FROM turns WHERE session = ? UNION SELECT number FROM jobs "
            "WHERE session = ? AND state = 'running'",
            (folder.name, folder.name),
        )
        lacking = sorted(finished - {row["number"] for row in rows})
        if lacking:
            return f"no row tells of turn {lacking[0]} of {folder.name}"
    return None


def finished_numbers(folder: Path) -> set[int]:
    """Numbers of the finished turns in a folder, as far as its manifest can be read."""
    try:
        with reading(folder):
            manifest: Any = json.loads((folder / "session.json").read_text(encoding="utf-8"))
            rows = manifest["turns"]
            return {int(row["number"]) for row in rows if row.get("report") is not None}
    except (StorageError, OSError):
        return set()


def adopt(
    db: sqlite3.Connection, store: Store, identify: Callable[[sqlite3.Connection], None]
) -> None:
    """Upgrade the database, with digests of all files, in one transaction.

    identify: called in the transaction. A kill leaves version 1 or this one.
    """
    sessions = db.execute("SELECT * FROM sessions WHERE NOT is_deleting").fetchall()
    turns = db.execute("SELECT * FROM turns").fetchall()
    known = {row["id"] for row in sessions}
    sources = [
        (
            _source(store, row),
            text(stored_identity(store.session(row["id"]))),
            row["id"],
        )
        for row in sessions
    ]
    updates = [
        (*_turn(store, row), row["session"], row["number"])
        for row in turns
        if row["session"] in known
    ]

    def work(db: sqlite3.Connection) -> None:
        database.upgrade(db)
        identify(db)
        db.executemany("UPDATE sessions SET files = ?, identity = ? WHERE id = ?", sources)
        db.executemany(
            "UPDATE turns SET files = ?, entry = ?, is_published = ? "
            "WHERE session = ? AND number = ?",
            updates,
        )

    database.in_transaction(db, work)


def _source(store: Store, row: sqlite3.Row) -> str:
    folder = store.session(row["id"])
    try:
        files = promised(folder, [source_path(folder)])
    except StorageError:
        files = {"source": {"bytes": row["source_bytes"], "sha256": None}}
    if files["source"]["bytes"] != row["source_bytes"]:
        files["source"]["sha256"] = None
    return json.dumps(files)


def _turn(store: Store, row: sqlite3.Row) -> tuple[str, str | None, bool]:
    """A turn's promises, its row of the manifest without the report, whether it is published."""
    folder, number = store.session(row["session"]), row["number"]
    latents, results = latents_paths(folder, number), result_paths(folder, number)
    total = sum(path.stat().st_size for path in (*latents, *results))
    is_whole = total == row["bytes"]
    entry, files = None, {}
    try:
        files = promised(folder, latents)
        manifest_row(folder, number)
    except StorageError:
        pass  # of a damaged manifest nothing more is known than the bytes
    else:
        try:
            entry = checked_entry(folder, number)
        except StorageError:
            is_whole = False
    if not files or (entry is None and not is_whole):
        names = files or [f"turns/turn_{number:02d}.safetensors"]
        files = {name: {"bytes": 0, "sha256": None} for name in names}
    is_published = bool(row["is_published"]) and len(results) == len(RESULTS) and is_whole
    if is_published:
        files |= promised(folder, results)
    return json.dumps(files), text(entry), is_published


def checked_entry(folder: Path, number: int) -> dict[str, Any]:
    """A finished turn's row of the manifest without its report; its latents are what it says.

    Raises:
        StorageError: they are not, or there is no such row.
    """
    row = manifest_row(folder, number)
    if row is None:
        raise StorageError(f"{folder.name} holds no finished turn {number}")
    with reading(folder):
        SessionFolder(folder).check_windows(row)
    return {name: value for name, value in row.items() if name != "report"}
