"""`run store check | repair`: what rows and folders of a store tell, and rows made of folders."""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from mv2v_engine.errors import RequestError, StorageError
from mv2v_engine.serving.store import database as sqlite
from mv2v_engine.serving.store import tables
from mv2v_engine.serving.store.audit import Audit, manifest_problem, turn_state, upload_lost
from mv2v_engine.serving.store.database import Database
from mv2v_engine.serving.store.digests import Verifier
from mv2v_engine.serving.store.folders import Store, finished_numbers
from mv2v_engine.serving.store.identity import (
    NAME,
    Identity,
    create,
    has_database,
    identity_of,
    new_identity,
    read_identity,
    refusal,
    require_whole,
    set_identity,
    write_identity,
)
from mv2v_engine.serving.store.mirror import insert_session, read_rows
from mv2v_engine.serving.store.records import SessionRecord
from mv2v_engine.serving.store.recovery import reconcile

DAMAGED = 1


def add_store(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, work, words in (
        ("check", check, "what rows and folders tell, and what is damaged; changes nothing"),
        ("repair", repair, "make what rows lack of the folders, mend what can be; deletes nothing"),
    ):
        command = commands.add_parser(name, help=words)
        command.add_argument("store", type=Path, metavar="DIR", help="the --store of a service")
        command.set_defaults(command=partial(_run, work=work))


def _run(args: argparse.Namespace, work: object) -> int:
    """0 if the store is whole, 1 if something is damaged or lost."""
    assert callable(work)
    with _locked(args.store) as store:
        findings = list(work(store))
    for line in findings:
        print(line)
    print(f"{args.store}: " + (f"findings: {len(findings)}" if findings else "whole"))
    return DAMAGED if findings else 0


@contextmanager
def _locked(root: Path) -> Iterator[Store]:
    """A store that no service runs on.

    Raises:
        RequestError: there is no store.
        StorageError: a service runs on it.
    """
    if not (root / "sessions").is_dir():
        raise RequestError(f"{root} is no store of a service; give the folder of its --store")
    store = Store(root)
    store.lock(patience=0.0)
    try:
        yield store
    finally:
        store.unlock()


def check(store: Store) -> Iterator[str]:
    """What is wrong, a line each; prints what there is."""
    why = refusal(store)
    if why is not None:
        yield why
    sessions: list[SessionRecord] = []
    known: set[str] = set()
    verifier = Verifier()
    try:
        if has_database(store):
            with sqlite.opened(store.database) as db:
                known = tables.session_ids(db)
                version = sqlite.version_of(db)
                if version != sqlite.VERSION:
                    print(f"version {version}: the next start makes version {sqlite.VERSION} of it")
                else:
                    sessions = tables.kept_sessions(db)
                for session in sessions:
                    yield from _session_findings(db, store, session, verifier)
    except (StorageError, sqlite3.Error) as error:
        if why is None:
            yield str(error)
    for folder in store.stray_sessions(known):
        numbers = _numbers(finished_numbers(folder))
        yield f"{folder.name}: no row tells of it; its folder has turns {numbers}"
    for path in sorted(store.aside.iterdir()) if store.aside.is_dir() else ():
        print(f"set aside: {path.name}")


def _session_findings(
    db: sqlite3.Connection, store: Store, session: SessionRecord, verifier: Verifier
) -> Iterator[str]:
    folder, turns = store.session(session.id), tables.list_turns(db, session.id)
    listed = finished_numbers(folder)
    told = _numbers({turn.number for turn in turns})
    print(f"{session.id}: rows tell of turns {told}, session.json of {_numbers(listed)}")
    for name in session.uploads:
        problem = verifier.problem(folder, name, session.files)
        if problem is not None:
            yield f"{session.id}: {upload_lost(name, problem)}"
    problem = manifest_problem(folder, session, turns)
    if problem is not None:
        yield f"{session.id}: session.json: {problem}"
    for turn in turns:
        state = turn_state(verifier, folder, turn)
        if state.damage is not None:
            yield f"{session.id}: turn {turn.number} is damaged: {state.damage}"
        if turn.is_published and not state.is_published:
            can = "lost" if state.damage else "can be made again"
            yield f"{session.id}: turn {turn.number}: {'; '.join(state.wrong)}: {can}"
    for number in sorted(listed - {turn.number for turn in turns}):
        yield f"{session.id}: no row tells of turn {number}"


def repair(store: Store) -> Iterator[str]:
    """Make rows of folders and mend what can be; what is left, a line each."""
    identity = _mend_database(store)
    known: set[str]
    with sqlite.opened(store.database) as db:
        known = tables.session_ids(db)
        for folder in sorted(store.stray_sessions(known)):
            yield from _take_up(db, folder, identity)
    asyncio.run(_reconciled(store))
    with sqlite.opened(store.database) as db:
        verifier = Verifier()
        for session in tables.kept_sessions(db):
            for turn in tables.list_turns(db, session.id):
                damage = turn_state(verifier, store.session(session.id), turn).damage
                if damage is not None:
                    yield f"{session.id}: turn {turn.number} is lost: {damage}"
            if session.damage is not None:
                yield f"{session.id}: {session.damage}"


async def _reconciled(store: Store) -> None:
    database = Database(store.database, store.spare.give_up)
    try:
        audit = Audit(store, database, lambda path: store.set_aside(path, _flat(store, path)))
        await reconcile(store, database, audit)
    finally:
        database.close()


def _take_up(db: sqlite3.Connection, folder: Path, identity: Identity) -> Iterator[str]:
    """Make the rows of a folder that has none."""
    try:
        rows = read_rows(folder)
        if rows.store != identity.id:
            yield f"{folder.name} is a session of {rows.store}, not of this store; it is left alone"
        elif rows.session["id"] != folder.name:
            yield f"{folder.name} is a copy of {rows.session['id']}; it is left alone"
        else:
            sqlite.in_transaction(db, insert_session, rows)
            print(f"{folder.name}: taken up, turns {_numbers(set(rows.turns))}")
    except (StorageError, sqlite3.IntegrityError) as error:
        yield f"{folder.name} cannot be taken up: {error}"


def _mend_database(store: Store) -> Identity:
    """A database that belongs to the folders; what was there and does not is set aside."""
    try:
        named = read_identity(store.root)
    except StorageError:
        place = store.set_aside(store.root / NAME, NAME)
        print(f"store.json was damaged, and set aside: {place}")
        named = None
    row = _usable(store, named)
    if row is None:
        for path in sorted(store.root.glob(f"{store.database.name}*")):
            print(f"{path.name} does not belong here, and was set aside")
            store.set_aside(path, path.name)
        named = named or _of_folders(store) or new_identity()
        row = Identity(named.id, 0)
        with sqlite.opened(store.database) as db:
            sqlite.in_transaction(db, create, row)
        print("a new database was made")
    generation = max(row.generation, 0 if named is None else named.generation) + 1
    identity = Identity(row.id, generation)
    with sqlite.opened(store.database) as db:
        sqlite.in_transaction(db, set_identity, identity)
    write_identity(store.root, identity)
    return identity


def _usable(store: Store, named: Identity | None) -> Identity | None:
    """What the database says it is, if it is whole and this store's; else None.

    Raises:
        StorageError: another version of the engine wrote it.
    """
    try:
        if not has_database(store):
            return None
        with sqlite.opened(store.database) as db:
            require_whole(db, store)
    except StorageError as error:
        # a disk that fails says nothing of the database
        if isinstance(error.__cause__, sqlite3.OperationalError | OSError):
            raise
        return None
    with sqlite.opened(store.database) as db:
        sqlite.require_version(db)
        sqlite.in_transaction(db, sqlite.upgrade)
        row = identity_of(db)
    return row if named is None or row.id == named.id else None


def _of_folders(store: Store) -> Identity | None:
    """The store that most of the folders say they belong to."""
    found: Counter[str] = Counter()
    for folder in store.sessions.iterdir():
        try:
            found[read_rows(folder).store] += 1
        except StorageError:
            continue
    return Identity(found.most_common(1)[0][0], 0) if found else None


def _flat(store: Store, path: Path) -> str:
    """A name for a file that was somewhere in a session."""
    return ".".join(path.relative_to(store.sessions).parts)


def _numbers(numbers: set[int]) -> str:
    return ", ".join(map(str, sorted(numbers))) or "none"
