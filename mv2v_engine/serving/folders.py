"""The files of a store; what may lie where, and what a kill can leave behind.

    service.sqlite3 (-wal, -shm)  lock  worker.lock
    sessions/<id>/  source                          the upload, under no name of its user's
                    session.json  turns/            the engine's own (engine.store)
                    results/turn_0001.mp4, .jpg     written by rename, after the engine's
    uploads/<random>   trash/<random>               emptied at every start

A session's folder is in place before its row is, and gone from its place only after its row is
marked: so a row has its folder, and a folder without a row is what a kill left.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mv2v_engine.engine.editing.store import EditStore
from mv2v_engine.engine.store import SessionFolder, SessionStore
from mv2v_engine.errors import StorageError
from mv2v_engine.locks import Lock
from mv2v_engine.serving.database import Database
from mv2v_engine.serving.errors import ApiError
from mv2v_engine.serving.records import Kind, TurnFile, is_id

_SUFFIXES: dict[TurnFile, str] = {"video": "mp4", "thumbnail": "jpg"}
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
        self.trash = root / "trash"
        self._lock: Lock | None = None
        try:
            for folder in (self.sessions, self.uploads, self.trash):
                folder.mkdir(parents=True, exist_ok=True)
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

    def open_database(self) -> Database:
        """The store's database, new in a new store.

        Raises:
            StorageError: it cannot be opened, or is lost while the sessions are not.
        """
        if not self.database.exists() and any(self.sessions.iterdir()):
            raise StorageError(
                f"{self.root} has sessions and no {self.database.name}; restore it, or choose "
                "another --store"
            )
        return Database(self.database)

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
            path.rename(self.trash / secrets.token_hex(12))

    def empty_trash(self) -> None:
        """Remove what was discarded."""
        remove_content(self.trash)

    def require_free(self, num_bytes: int) -> None:
        """Raises disk_full."""
        free = shutil.disk_usage(self.root).free
        if free < num_bytes:
            raise ApiError(
                "disk_full",
                f"the store's disk has {free:,} bytes free, {num_bytes:,} are needed; delete "
                "sessions, or make room",
            )


def worker_lock(root: Path) -> Path:
    """What a store's worker holds for as long as it can write there."""
    return root / "worker.lock"


def window_path(folder: Path) -> Path:
    """Where a session keeps which part of its video it is about; absent if nobody chose one."""
    return folder / "window.txt"


def source_path(folder: Path) -> Path:
    """A session's uploaded video."""
    return folder / "source"


def result_path(folder: Path, number: int, which: TurnFile) -> Path:
    """A turn's mp4 or thumbnail."""
    return folder / "results" / f"turn_{number:04d}.{_SUFFIXES[which]}"


def engine_store(folder: Path, kind: Kind) -> SessionFolder:
    """What the engine keeps in a session's folder."""
    return SessionStore(folder) if kind == "views" else EditStore(folder)


def finished_report(folder: Path, kind: Kind, number: int | None) -> dict[str, Any] | None:
    """The report of a turn that the session's folder has whole; None if it has not.

    Raises:
        StorageError: the folder's manifest is damaged, or a window of an edit.
    """
    store = engine_store(folder, kind)
    if number is None or not store.exists():
        return None
    for row in store.read()["turns"]:
        if row.get("number") == number and row.get("report") is not None:
            report: dict[str, Any] = row["report"]
            if isinstance(store, EditStore):
                report = report | {"windows": store.window_reports(number)}
            return report
    return None


def turn_bytes(folder: Path, number: int) -> int:
    """Bytes of one turn's latents, video and thumbnail."""
    turns = folder / "turns"
    latents = [turns / f"turn_{number:02d}.safetensors", *turns.glob(f"turn_{number:02d}/*")]
    results = [result_path(folder, number, which) for which in _SUFFIXES]
    return sum(path.stat().st_size for path in (*latents, *results) if path.exists())


def is_published(folder: Path, number: int) -> bool:
    """Whether a turn's video and thumbnail are there."""
    return all(result_path(folder, number, which).exists() for which in _SUFFIXES)


def sweep_session(folder: Path, kind: Kind) -> None:
    """Remove what a killed worker left in a session: half-written files, and unlisted turns.

    Raises:
        StorageError: the folder's manifest is damaged.
    """
    places = [folder, folder / "turns", folder / "results", *folder.glob("turns/turn_*/")]
    for place in places:
        for path in place.iterdir() if place.is_dir() else ():
            if _UNFINISHED.fullmatch(path.name):
                path.unlink(missing_ok=True)
    store = engine_store(folder, kind)
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
