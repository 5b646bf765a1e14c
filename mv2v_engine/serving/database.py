"""The service's SQLite: one thread that writes, one that reads, each with its own connection.

Every write is one transaction on the writer's thread, so that what it read cannot have changed
before it wrote. WAL lets readers go on meanwhile; synchronous=FULL means that what was said to be
kept outlives a power cut.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from mv2v_engine.errors import StorageError

Result = TypeVar("Result")

VERSION = 1
_SCHEMA = """
CREATE TABLE sessions (
    serial INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    checkpoint TEXT NOT NULL,
    frames INTEGER NOT NULL,
    width INTEGER NOT NULL,
    height INTEGER NOT NULL,
    fps REAL NOT NULL,
    created REAL NOT NULL,
    touched REAL NOT NULL,
    source_bytes INTEGER NOT NULL,
    parent TEXT,
    parent_turn INTEGER,
    warnings TEXT NOT NULL,
    is_deleting INTEGER NOT NULL DEFAULT 0,
    key TEXT,
    digest TEXT,
    UNIQUE (owner, key)
);
CREATE INDEX sessions_of_owner ON sessions (owner, serial);
CREATE TABLE turns (
    session TEXT NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    job TEXT UNIQUE,
    request TEXT NOT NULL,
    report TEXT NOT NULL,
    created REAL NOT NULL,
    bytes INTEGER NOT NULL,
    is_published INTEGER NOT NULL,
    PRIMARY KEY (session, number)
);
CREATE INDEX turns_to_publish ON turns (session) WHERE is_published = 0;
CREATE TABLE jobs (
    serial INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    session TEXT NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    owner TEXT NOT NULL,
    state TEXT NOT NULL,
    request TEXT NOT NULL,
    number INTEGER,
    created REAL NOT NULL,
    started REAL,
    ended REAL,
    attempts INTEGER NOT NULL DEFAULT 0,
    error TEXT,
    progress TEXT,
    is_cancelling INTEGER NOT NULL DEFAULT 0,
    key TEXT,
    digest TEXT NOT NULL,
    UNIQUE (owner, key)
);
CREATE INDEX jobs_of_owner ON jobs (owner, serial);
CREATE INDEX jobs_of_session ON jobs (session, serial);
CREATE INDEX jobs_alive ON jobs (state, serial) WHERE state IN ('queued', 'running');
"""


class Database:
    """Opened with the store; closed by `close`, after which nothing may be asked.

    Raises:
        StorageError: the file cannot be opened, or a newer version of the service wrote it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer = _Connection(path, "store-writer")
        try:
            self._writer.submit(_migrate)
            self._reader = _Connection(path, "store-reader")
        except BaseException:
            self._writer.close()
            raise

    async def write(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run `work` in a transaction, which is kept if it returns and undone if it raises.

        Whoever waits may be cancelled; the transaction then still ends one way or the other.
        """
        return await asyncio.wrap_future(self._writer.start(lambda db: _in_transaction(db, work)))

    async def read(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run `work`, which reads one state of the database and writes nothing."""
        return await asyncio.wrap_future(self._reader.start(lambda db: _in_snapshot(db, work)))

    def close(self) -> None:
        """Finish what was asked, then close; the log is folded into the database."""
        self._reader.close()
        self._writer.close()


class _Connection:
    """A connection and the only thread that uses it."""

    def __init__(self, path: Path, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        try:
            self._db = self._thread.submit(_open, path).result()
        except sqlite3.Error as error:
            self._thread.shutdown()
            raise StorageError(
                f"cannot open {path}: {error}; choose another store, or restore the file"
            ) from error

    def start(self, work: Callable[[sqlite3.Connection], Result]) -> Future[Result]:
        return self._thread.submit(work, self._db)

    def submit(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        return self.start(work).result()

    def close(self) -> None:
        self.submit(lambda db: db.close())
        self._thread.shutdown()


def _open(path: Path) -> sqlite3.Connection:
    # transactions are begun by hand: the module's own would begin them late and unlocked
    db = sqlite3.connect(path, isolation_level=None, timeout=30.0)
    db.row_factory = sqlite3.Row
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        with closing(db.execute(f"PRAGMA {pragma}")):
            pass
    return db


def _migrate(db: sqlite3.Connection) -> None:
    ((found,),) = db.execute("PRAGMA user_version").fetchall()
    if found == VERSION:
        return
    if found != 0:
        raise StorageError(
            f"the store's database has version {found}, this engine reads {VERSION}; serve it "
            "with the engine that wrote it, or choose another store"
        )
    _in_transaction(db, _create)


def _create(db: sqlite3.Connection) -> None:
    for statement in _SCHEMA.split(";"):
        db.execute(statement)
    db.execute(f"PRAGMA user_version = {VERSION}")


def _in_transaction(db: sqlite3.Connection, work: Callable[[sqlite3.Connection], Result]) -> Result:
    db.execute("BEGIN IMMEDIATE")
    try:
        result = work(db)
        db.execute("COMMIT")
    except BaseException:
        # a full disk may have undone it already
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    return result


def _in_snapshot(db: sqlite3.Connection, work: Callable[[sqlite3.Connection], Result]) -> Result:
    db.execute("BEGIN")
    try:
        return work(db)
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")
