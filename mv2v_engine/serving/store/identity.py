"""Which store a folder is: told by `store.json`, by the database, and in every session's folder.

The generation is one higher at every start, written to the database first. So what does not belong
together is told apart: a database of another store, one that is older than its folders, as from a
backup, or newer, an empty one. Such a store is refused before anything in it has changed.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mv2v_engine.errors import StorageError
from mv2v_engine.files import save_json
from mv2v_engine.serving.store import database
from mv2v_engine.serving.store.folders import Store
from mv2v_engine.serving.store.mirror import had_rows_in
from mv2v_engine.serving.store.tables import session_ids

NAME = "store.json"
_FORMAT, _VERSION = "mv2v-store", 1
_MAGIC = b"SQLite format 3\x00"


@dataclass(frozen=True, slots=True)
class Identity:
    """id: of the store. generation: how often it was started."""

    id: str
    generation: int


def admit(store: Store) -> Identity:
    """Begin the next generation of a locked store whose parts belong together.

    A new store gets an identity.

    Raises:
        StorageError: they do not belong together; nothing has changed. Or the disk is full.
    """
    named = read_identity(store.root)
    if not has_database(store):
        return _begin(store, named)
    with database.opened(store.database) as db:
        require_admissible(db, store, named)
        database.in_transaction(db, database.upgrade)
        row = identity_of(db)
        identity = Identity(row.id, row.generation + 1)
        database.in_transaction(db, set_identity, identity)
    write_identity(store.root, identity)
    return identity


def refusal(store: Store) -> str | None:
    """Why a start would refuse a store; None if it would not."""
    try:
        named = read_identity(store.root)
        if not has_database(store):
            _require_new(store, named)
            return None
        with database.opened(store.database) as db:
            require_admissible(db, store, named)
    except StorageError as error:
        return str(error)
    return None


def require_admissible(db: sqlite3.Connection, store: Store, named: Identity | None) -> None:
    """Refuse a database that is damaged, of another version, or does not belong to its store.

    named: what `store.json` says.
    """
    require_whole(db, store)
    database.require_version(db)
    require_same(store.root, named, identity_of(db))
    require_rows(db, store)


def has_database(store: Store) -> bool:
    """Whether there is a database with something in it.

    Raises:
        StorageError: the file is none.
    """
    try:
        with store.database.open("rb") as file:
            head = file.read(len(_MAGIC))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _refused(store.root, f"its database cannot be read ({error.strerror})") from error
    if head and head != _MAGIC:
        raise _refused(store.root, f"{store.database.name} is not a database")
    if not head:
        return False
    with database.opened(store.database) as db:
        return bool(db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall())


def require_whole(db: sqlite3.Connection, store: Store) -> None:
    """Refuse a database whose pages are damaged."""
    ((said,),) = db.execute("PRAGMA integrity_check(1)").fetchall()
    if said != "ok":
        raise _refused(store.root, f"its database is damaged ({' '.join(said.split())})")


def require_rows(db: sqlite3.Connection, store: Store) -> None:
    """Refuse a database that has lost a session's row.

    The copy in a folder is written behind the row, and a deletion takes the folder away before it.
    """
    identity = identity_of(db)
    for folder in store.stray_sessions(session_ids(db)):
        if had_rows_in(folder) == identity.id:
            raise _refused(
                store.root,
                f"its database is older than its folders: no row tells of {folder.name}, which it "
                "had",
            )


def require_same(root: Path, named: Identity | None, row: Identity) -> None:
    """Refuse a database and a store that have parted."""
    if named is None:
        raise _refused(root, f"it has no {NAME}")
    if row.id != named.id:
        raise _refused(root, f"it is store {named.id}, and its database is that of {row.id}")
    # a kill between the two leaves the database one ahead
    if not 0 <= row.generation - named.generation <= 1:
        how = "older than its folders, as from a backup"
        if row.generation > named.generation:
            how = "newer than its folders"
        raise _refused(
            root,
            f"its database, of start {row.generation}, is {how}, of start {named.generation}",
        )


def read_identity(root: Path) -> Identity | None:
    """What `store.json` says; None if there is none.

    Raises:
        StorageError: it is damaged.
    """
    path = root / NAME
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
        if (value["format"], value["version"]) != (_FORMAT, _VERSION):
            raise ValueError(f"format {value['format']!r}, version {value['version']!r}")
        return Identity(str(value["id"]), int(value["generation"]))
    except FileNotFoundError:
        return None
    except (OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise _refused(root, f"{NAME} cannot be read ({error})") from error


def write_identity(root: Path, identity: Identity) -> None:
    value = {"id": identity.id, "generation": identity.generation}
    save_json(root / NAME, {"format": _FORMAT, "version": _VERSION, **value})


def identity_of(db: sqlite3.Connection) -> Identity:
    """What the database says."""
    row = db.execute("SELECT id, generation FROM store").fetchone()
    return Identity(*row) if row is not None else Identity("", 0)


def set_identity(db: sqlite3.Connection, identity: Identity) -> None:
    """Write an identity into the database, within a transaction."""
    db.execute("DELETE FROM store WHERE id != ?", (identity.id,))
    values = (identity.generation, identity.id)
    if not db.execute("UPDATE store SET generation = ? WHERE id = ?", values).rowcount:
        db.execute("INSERT INTO store (generation, id) VALUES (?, ?)", values)


def new_identity(generation: int = 0) -> Identity:
    return Identity(f"store_{secrets.token_hex(12)}", generation)


def _begin(store: Store, named: Identity | None) -> Identity:
    """A new store, or one whose beginning was cut off."""
    _require_new(store, named)
    named = named or new_identity()
    write_identity(store.root, named)
    identity = Identity(named.id, 1)
    with database.opened(store.database) as db:
        database.in_transaction(db, create, identity)
    write_identity(store.root, identity)
    return identity


def create(db: sqlite3.Connection, identity: Identity) -> None:
    """Make the tables of an empty database, within a transaction."""
    database.create(db)
    set_identity(db, identity)


def _require_new(store: Store, named: Identity | None) -> None:
    """Refuse a store that has lost its database."""
    has_sessions = any(store.sessions.iterdir())
    if has_sessions or (named is not None and named.generation > 0):
        what = "an empty" if store.database.exists() else "no"
        seen = "has sessions" if has_sessions else "was started before"
        raise _refused(store.root, f"it {seen} and {what} {store.database.name}")


def _refused(root: Path, why: str) -> StorageError:
    return StorageError(
        f"the store {root} is not started: {why}; put back what belongs together, or rebuild the "
        f"rows from the folders with `python -m mv2v_engine.run store repair {root}`"
    )
