"""The service's SQLite: one thread that writes, one that reads, each with its own connection.

Every write is one transaction on the writer's thread, so that what it read cannot have changed
before it wrote. WAL lets readers go on meanwhile; synchronous=FULL means that what was said to be
kept outlives a power cut.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeAlias, TypeVar

from mv2v_engine.errors import StorageError

Result = TypeVar("Result")
Given = ParamSpec("Given")
# a function of a connection, and of what it is called with besides
Work: TypeAlias = Callable[Concatenate[sqlite3.Connection, Given], Result]

VERSION = 6
_SCHEMA = """
CREATE TABLE store (
    id TEXT NOT NULL,
    generation INTEGER NOT NULL,
    clock REAL NOT NULL DEFAULT 0
);
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
    used REAL NOT NULL DEFAULT 0,
    files TEXT NOT NULL DEFAULT '{}',
    identity TEXT,
    damage TEXT,
    window TEXT,
    asked_fps REAL,
    alpha TEXT,
    fit TEXT,
    size TEXT,
    notes TEXT NOT NULL DEFAULT '',
    is_favourite INTEGER NOT NULL DEFAULT 0,
    edited REAL,
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
    files TEXT NOT NULL DEFAULT '{}',
    entry TEXT,
    damage TEXT,
    name TEXT NOT NULL DEFAULT '',
    notes TEXT NOT NULL DEFAULT '',
    is_favourite INTEGER NOT NULL DEFAULT 0,
    edited REAL,
    deleted REAL,
    forgotten TEXT NOT NULL DEFAULT '[]',
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
# what the next version that is read has more, by table; the columns come last in both
_SAID = {"notes": "TEXT NOT NULL DEFAULT ''", "is_favourite": "INTEGER NOT NULL DEFAULT 0"}
_SAID |= {"edited": "REAL"}
_ADDED = {
    3: {"sessions": {"asked_fps": "REAL", "alpha": "TEXT", "fit": "TEXT", "size": "TEXT"}},
    5: {
        "sessions": _SAID,
        "turns": {
            "name": "TEXT NOT NULL DEFAULT ''",
            **_SAID,
            "deleted": "REAL",
            "forgotten": "TEXT NOT NULL DEFAULT '[]'",
        },
    },
}
READABLE = (*_ADDED, VERSION)
# how SQLite says that the disk, or its shared memory on it, has no room
_FULL = ("full", "disk I/O error")


class Database:
    """Opened with the store; closed by `close`, after which nothing may be asked.

    make_room: called when the disk is full and a write must be done all the same; whether it has
        freed something.

    Raises:
        StorageError: the file cannot be opened, or is of another version.
    """

    def __init__(self, path: Path, make_room: Callable[[], bool] = lambda: False) -> None:
        self.path, self._make_room = path, make_room
        # transactions that were kept: as long as there is no other, what was read holds
        self.num_writes = 0
        self._writer = _Connection(path, "store-writer")
        try:
            self._writer.submit(lambda db: require_version(db, {VERSION}))
            self._reader = _Connection(path, "store-reader")
        except BaseException:
            self._writer.close()
            raise

    async def write(
        self, work: Work[Given, Result], *args: Given.args, **how: Given.kwargs
    ) -> Result:
        """Run `work` in a transaction, which is kept if it returns and undone if it raises.

        Whoever waits may be cancelled; the transaction then still ends one way or the other.
        """

        def kept(db: sqlite3.Connection) -> Result:
            result = in_transaction(db, work, *args, **how)
            self.num_writes += 1
            return result

        return await asyncio.wrap_future(self._writer.start(kept))

    async def must_write(
        self, work: Work[Given, Result], *args: Given.args, **how: Given.kwargs
    ) -> Result:
        """The same, on a full disk with the bytes that are kept for that."""
        try:
            return await self.write(work, *args, **how)
        except sqlite3.OperationalError as error:
            if not is_disk_full(error) or not await asyncio.to_thread(self._make_room):
                raise
        return await self.write(work, *args, **how)

    async def read(
        self, work: Work[Given, Result], *args: Given.args, **how: Given.kwargs
    ) -> Result:
        """Run `work`, which reads one state of the database and writes nothing."""
        found = self._reader.start(lambda db: _in_snapshot(db, work, *args, **how))
        return await asyncio.wrap_future(found)

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
            raise _unusable(path, error) from error

    def start(self, work: Callable[[sqlite3.Connection], Result]) -> Future[Result]:
        return self._thread.submit(work, self._db)

    def submit(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        return self.start(work).result()

    def close(self) -> None:
        self.submit(lambda db: db.close())
        self._thread.shutdown()


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection for this thread, before there is a service, or without one.

    Raises:
        StorageError: the file is no database, is damaged, or the disk fails.
    """
    try:
        with closing(_open(path)) as db:
            yield db
    except sqlite3.Error as error:
        raise _unusable(path, error) from error


def create(db: sqlite3.Connection) -> None:
    """Make an empty database's tables, within a transaction."""
    _run(db, _SCHEMA)


def upgrade(db: sqlite3.Connection) -> None:
    """Make an older version this one, within a transaction; a database of this version stays."""
    found = version_of(db)
    if found == VERSION:
        return
    _run(
        db,
        ";".join(
            f"ALTER TABLE {table} ADD COLUMN {name} {kind}"
            for version, tables in _ADDED.items()
            if version >= found
            for table, columns in tables.items()
            for name, kind in columns.items()
        ),
    )


def version_of(db: sqlite3.Connection) -> int:
    """0 of a database without tables."""
    ((version,),) = db.execute("PRAGMA user_version").fetchall()
    return int(version)


def is_disk_full(error: sqlite3.Error) -> bool:
    """Whether an error is one that a full disk gives."""
    return any(words in str(error) for words in _FULL)


def in_transaction(
    db: sqlite3.Connection, work: Work[Given, Result], *args: Given.args, **how: Given.kwargs
) -> Result:
    """Run `work` in a transaction, which is kept if it returns and undone if it raises."""
    db.execute("BEGIN IMMEDIATE")
    try:
        result = work(db, *args, **how)
        db.execute("COMMIT")
    except BaseException:
        # a full disk may have undone it already
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    return result


def _open(path: Path) -> sqlite3.Connection:
    # transactions are begun by hand: the module's own would begin them late and unlocked
    db = sqlite3.connect(path, isolation_level=None, timeout=30.0)
    db.row_factory = sqlite3.Row
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        with closing(db.execute(f"PRAGMA {pragma}")):
            pass
    return db


def _unusable(path: Path, error: sqlite3.Error) -> StorageError:
    if is_disk_full(error):
        return StorageError(f"cannot open {path}: the disk is full ({error}); make room")
    return StorageError(
        f"cannot open {path}: {error}; restore the file, or rebuild it with "
        f"`python -m mv2v_engine.run store repair {path.parent}`"
    )


def require_version(db: sqlite3.Connection, readable: Collection[int] = READABLE) -> None:
    """Refuse a database of a version that is not readable."""
    found = version_of(db)
    if found not in readable:
        raise StorageError(
            f"the store's database has version {found}, this engine reads "
            f"{', '.join(map(str, READABLE[:-1]))} and {VERSION}; "
            "serve it with the engine that wrote it, or choose another store"
        )


def _run(db: sqlite3.Connection, statements: str) -> None:
    for statement in statements.split(";"):
        db.execute(statement)
    db.execute(f"PRAGMA user_version = {VERSION}")


def _in_snapshot(
    db: sqlite3.Connection, work: Work[Given, Result], *args: Given.args, **how: Given.kwargs
) -> Result:
    db.execute("BEGIN")
    try:
        return work(db, *args, **how)
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")
