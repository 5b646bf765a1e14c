"""The files of a store; what may lie where, and what a kill can leave behind.

    store.json                      which store this is (identity)
    service.sqlite3 (-wal, -shm)    lock  worker.lock
    spare                           bytes that are given up where a full disk must take a write
    sessions/<id>/  source                          the upload, under no name of its user's
                    references/01  mask             what its edits are given beside it
                    session.json  turns/            the engine's own (engine.folder)
                    results/turn_0001.mp4, .jpg     written by rename, after the engine's
                    rows/                           a copy of the session's rows (mirror)
    streams/<id>/                   a stream (streams)
    webhooks/<job id>.json          whom to tell of a job's end (work.webhooks)
    set-aside/                      what a start found and no row promises; nothing removes it
    uploads/<random>   trash/<random>               emptied at every start

A session's folder is in place before its row is, and gone from its place only after its row is
marked: so a row has its folder, and a folder without a row is what a kill left, or what another
database knows.
"""

from __future__ import annotations

import itertools
import json
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mv2v_engine.engine.folder import SessionFolder
from mv2v_engine.errors import StorageError
from mv2v_engine.files import flush, make_folder, move, remove_matching
from mv2v_engine.locks import Lock
from mv2v_engine.serving.errors import FULL, ApiError
from mv2v_engine.serving.store.database import Database
from mv2v_engine.serving.store.records import SOURCE, TurnFile, is_id

# what reading a manifest of other names and types than it should have ends in
_GARBLED = (LookupError, TypeError, ValueError, AttributeError, RecursionError, StopIteration)
_SUFFIXES: dict[TurnFile, str] = {"video": "mp4", "thumbnail": "jpg"}
RESULTS: tuple[TurnFile, ...] = tuple(_SUFFIXES)
# what files.replacing leaves behind when the process is killed while it writes
_UNFINISHED = re.compile(r"\.[A-Za-z0-9_]+-\w{8}\.(json|safetensors|mp4|jpg)")


class Store:
    """One store's folders.

    Raises:
        StorageError: the place cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.database = root / "service.sqlite3"
        self.sessions, self.uploads = root / "sessions", root / "uploads"
        self.trash, self.aside = root / "trash", root / "set-aside"
        self.streams = root / "streams"
        self.spare = Spare(root / "spare")
        self._lock: Lock | None = None
        try:
            for folder in (self.sessions, self.streams, self.uploads, self.trash):
                make_folder(folder)
        except OSError as error:
            raise StorageError(
                f"cannot make the store {root}: {error.strerror}; choose another --store"
            ) from error

    def lock(self, *, patience: float = 60.0) -> None:
        """Keep other services out, and wait for a worker that outlives a killed one to end.

        Raises:
            StorageError: another service runs on this store, or that worker does not end.
        """
        lock = Lock(self.root / "lock")
        if not lock.acquire():
            raise StorageError(
                f"the store {self.root} is served by process {lock.holder()} already; stop that "
                "service, or choose another --store"
            )
        self._lock = lock
        worker = Lock(worker_lock(self.root))
        if not worker.acquire(patience):
            self.unlock()
            raise StorageError(
                f"process {worker.holder()}, the worker of a service that is gone, still works in "
                f"{self.root}; end it and start again"
            )
        worker.release()

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def make_ready(self) -> None:
        """Keep the spare, or give it up where the disk is so full that a start needs it."""
        if shutil.disk_usage(self.root).free < self.spare.size:
            self.spare.give_up()
        else:
            self.spare.keep()

    def open_database(self) -> Database:
        """The database of a store that was admitted.

        Raises:
            StorageError: it cannot be opened.
        """
        return Database(self.database, self.spare.give_up)

    def session(self, session_id: str) -> Path:
        """A session's folder; the id must be one."""
        assert is_id("session", session_id), session_id
        return self.sessions / session_id

    def new_upload(self) -> Path:
        """A new place for bytes that are not yet anybody's."""
        return self.uploads / secrets.token_hex(12)

    def stray_sessions(self, known: Iterable[str]) -> list[Path]:
        """Folders of no known session."""
        names = set(known)
        return [path for path in self.sessions.iterdir() if path.name not in names]

    def discard(self, path: Path) -> None:
        """Take a file or folder out of its place at once; `empty_trash` removes it."""
        with suppress(FileNotFoundError):
            self._move(path, self.trash / secrets.token_hex(12))

    def set_aside(self, path: Path, name: str) -> Path:
        """Move a file or folder to where nothing looks and nothing is removed; where it is now."""
        target = self.aside / name
        for count in itertools.count(2):
            if not target.exists():
                break
            target = self.aside / f"{name}.{count}"
        make_folder(self.aside)
        self._move(path, target)
        return target

    def empty_trash(self) -> None:
        """Remove what was discarded."""
        remove_content(self.trash)

    def remove(self, path: Path) -> None:
        """Take a file or folder out of its place at once, then from the disk."""
        self.discard(path)
        self.empty_trash()

    def _move(self, path: Path, target: Path) -> None:
        try:
            move(path, target)
        except OSError as error:
            # a name can need room, too
            if error.errno not in FULL or not self.spare.give_up():
                raise
            move(path, target)
        flush(path.parent)

    def require_free(self, num_bytes: int) -> None:
        """Raises disk_full."""
        free = shutil.disk_usage(self.root).free
        if free < num_bytes:
            raise ApiError(
                "disk_full",
                f"the store's disk has {free:,} bytes free, {num_bytes:,} are needed; delete "
                "sessions, or make room",
            )


class Spare:
    """Bytes that lie in the store for nothing, given up where a full disk must take a write."""

    size = 4 << 20

    def __init__(self, path: Path) -> None:
        self.path = path

    def keep(self) -> None:
        """Take them, if the disk has room for them and as much again."""
        with suppress(OSError):
            if shutil.disk_usage(self.path.parent).free < 2 * self.size:
                return
            if not self.path.exists() or self.path.stat().st_size < self.size:
                self.path.write_bytes(bytes(self.size))

    def give_up(self) -> bool:
        """Whether there were any."""
        try:
            self.path.unlink()
        except OSError:
            return False
        return True


def worker_lock(root: Path) -> Path:
    """What a store's worker holds for as long as it can write there."""
    return root / "worker.lock"


def source_path(folder: Path) -> Path:
    """A session's uploaded video."""
    return folder / SOURCE


def result_name(number: int, which: TurnFile) -> str:
    """A turn's mp4 or thumbnail, by its path in the session's folder."""
    return f"results/turn_{number:04d}.{_SUFFIXES[which]}"


def result_path(folder: Path, number: int, which: TurnFile) -> Path:
    """A turn's mp4 or thumbnail."""
    return folder / result_name(number, which)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Whatever a session's damaged manifest does to those who read it, as one error.

    Raises:
        StorageError: it lacks something, or has it under another name or type.
    """
    try:
        yield
    except _GARBLED as error:
        words = f"{type(error).__name__}: {error}"
        raise StorageError(
            f"the manifest of session {folder.name} is damaged ({words}); restore session.json, or "
            "make a session of the same video"
        ) from error


def manifest_row(folder: Path, number: int | None) -> dict[str, Any] | None:
    """A finished turn as the manifest has it, its report whole; None if it has not.

    Raises:
        StorageError: the folder's manifest is damaged, or a window of an edit.
    """
    store = SessionFolder(folder)
    if number is None or not store.exists():
        return None
    with reading(folder):
        for row in store.read()["turns"]:
            if row.get("number") == number and row.get("report") is not None:
                report = dict(row["report"])
                if row["camera"] is None:
                    report["windows"] = store.window_reports(number)
                return {**row, "report": report}
    return None


def manifest_entry(folder: Path, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A finished turn's row of the manifest without the report, and the session's identity.

    Raises:
        StorageError: the folder's manifest is damaged, or has no such turn.
    """
    with reading(folder):
        manifest = SessionFolder(folder).read()
        row = next(row for row in manifest["turns"] if row["number"] == number)
        entry = {name: value for name, value in row.items() if name != "report"}
        return entry, manifest["identity"]


def finished_numbers(folder: Path) -> set[int]:
    """Numbers of the finished turns in a folder, as far as its manifest can be read."""
    try:
        with reading(folder):
            manifest: Any = json.loads((folder / "session.json").read_text(encoding="utf-8"))
            rows = manifest["turns"]
            return {int(row["number"]) for row in rows if row.get("report") is not None}
    except (StorageError, OSError):
        return set()


def stored_identity(folder: Path) -> dict[str, Any] | None:
    """What the engine's manifest says of its session; None if there is no whole one."""
    store = SessionFolder(folder)
    try:
        with reading(folder):
            identity: dict[str, Any] | None = store.read()["identity"] if store.exists() else None
            return identity
    except StorageError:
        return None


def latents_paths(folder: Path, number: int) -> list[Path]:
    """Where a turn's latents lie: one file, or one of each window of an edit."""
    turns = folder / "turns"
    one = turns / f"turn_{number:02d}.safetensors"
    windows = sorted(turns.glob(f"turn_{number:02d}/window_*.safetensors"))
    return [*([one] if one.exists() else []), *windows]


def result_paths(folder: Path, number: int) -> list[Path]:
    """A turn's video and thumbnail, those that are there."""
    paths = [result_path(folder, number, which) for which in _SUFFIXES]
    return [path for path in paths if path.exists()]


def turn_bytes(folder: Path, number: int) -> int:
    """Bytes of one turn's latents, video and thumbnail."""
    paths = (*latents_paths(folder, number), *result_paths(folder, number))
    return sum(path.stat().st_size for path in paths)


def sweep_session(folder: Path) -> None:
    """Remove what a killed worker left in a session: half-written files, and unlisted turns.

    Raises:
        StorageError: the folder's manifest is damaged.
    """
    names = ("turns", "results", "rows")
    places = [folder, *(folder / name for name in names), *folder.glob("turns/turn_*/")]
    remove_matching(places, _UNFINISHED)
    store = SessionFolder(folder)
    with reading(folder):
        listed = store.listed_files() if store.exists() else set()
    for path in [*folder.glob("turns/*.safetensors"), *folder.glob("turns/*/*.safetensors")]:
        if path not in listed:
            path.unlink(missing_ok=True)
    for path in folder.glob("turns/*/"):
        with suppress(OSError):  # it is not empty
            path.rmdir()


def sweep_results(folder: Path, number: int) -> None:
    """Remove half-written files of one turn that a killed worker left."""
    for path in (folder / "results").glob(f".turn_{number:04d}-*"):
        path.unlink(missing_ok=True)


def remove_content(folder: Path) -> None:
    """Remove what lies in a folder, as far as it can be removed."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
