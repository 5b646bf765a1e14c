"""One writer at a time: locks on files, which the system lets go of however their holder ends."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import socket
import time
import weakref
from contextlib import suppress
from pathlib import Path

from mv2v_engine.errors import InUseError, StorageError
from mv2v_engine.files import make_folder

_POLL_SECONDS = 0.05
_NAME_BYTES = 1024
# what a file system answers that keeps no locks
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Lock:
    """A file that one holder at a time has, among processes and among threads.

    It is let go of by `release`, when this object is gone, or when the process ends.

    name: who holds it, for whoever asks; this process's number if not given. previous: who held it
    before, once it is held.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path, self.name = path, name or str(os.getpid())
        self.previous = ""
        # what the holder does not leave behind, in the order in which it goes
        self._temporary: list[Path] = []
        self._end: weakref.finalize[..., Lock] | None = None

    @property
    def is_held(self) -> bool:
        return self._end is not None

    def acquire(self, patience: float = 0.0) -> bool:
        """Try for so many seconds; whether it is held now.

        Raises:
            StorageError: the file cannot be made or written, or its file system keeps no locks.
        """
        deadline = time.monotonic() + patience
        try:
            while (file := self._locked_file()) is None:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(_POLL_SECONDS)
        except OSError as error:
            reason, advice = error.strerror, "choose another place"
            if error.errno in _NO_LOCKS:
                reason = f"its file system keeps no locks ({reason})"
                advice = "choose a place on one that does"
            raise StorageError(f"cannot lock {self.path}: {reason}; {advice}") from error
        self._end = weakref.finalize(self, _let_go, file, os.getpid(), self._temporary)
        return True

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        if self._end is not None:
            self._end()
            self._end = None

    def holder(self) -> str:
        """The name that the last one to hold it wrote into the file."""
        try:
            return self.path.read_text(encoding="utf-8").strip() or "unknown"
        except OSError:
            return "unknown"

    def _locked_file(self) -> int | None:
        """The locked file; None while another has it."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_in_place(file):
                    self.previous = os.pread(file, _NAME_BYTES, 0).decode(errors="replace")
                    os.ftruncate(file, 0)
                    with suppress(OSError):  # a full disk has no room for a name
                        os.pwrite(file, self.name.encode(), 0)
                    return file
            except BlockingIOError:
                os.close(file)
                return None
            except OSError:
                os.close(file)
                raise
            os.close(file)

    def _is_in_place(self, file: int) -> bool:
        """Whether the file still has its name: whoever held it may have removed it."""
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False


class WriterLock(Lock):
    """The right to write into a session's folder, as the file `writer.lock` in it.

    It leaves nothing behind: neither its file, nor folders that it made and nobody used.

    name: who has it; this process if not given.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.folder, self._own = folder, f"process {os.getpid()} on {socket.gethostname()}"
        super().__init__(folder / "writer.lock", name or self._own)

    def take(self, patience: float = 0.0) -> None:
        """Keep every other writer out from now on; a folder that is missing is made.

        patience: seconds for which another one may have the right.

        Raises:
            InUseError: it still has. StorageError: there can be no lock; nothing has changed.
        """
        try:
            made = make_folder(self.folder)
        except OSError as error:
            raise StorageError(
                f"cannot write into {self.folder}: {error.strerror}; choose another folder"
            ) from error
        self._temporary[:] = [self.path, *reversed(made)]
        is_held = False
        try:
            is_held = self.acquire(patience)
            if not is_held and self.holder() == self._own:
                gc.collect()  # a session that nobody can reach any more may not be gone yet
                is_held = self.acquire()
        finally:
            if not is_held:
                _remove_empty(self._temporary[1:])
        if not is_held:
            holder = self.holder()
            if holder == self._own:
                holder = "another session of this process"
            raise InUseError(
                f"{self.folder} is in use: {holder} writes into it; wait until it has ended, close "
                "it, or choose another folder",
                holder,
            )

    def own_folder(self) -> None:
        """Leave not even the folder behind, if it is empty then: what was in it was removed."""
        if self.folder not in self._temporary:
            self._temporary.insert(1, self.folder)


def _let_go(file: int, owner: int, temporary: list[Path]) -> None:
    # a process forked from the holder has the file, too, and must neither unlock nor remove it
    if os.getpid() == owner:
        if temporary:
            with suppress(OSError):  # the folder may have gone before, or be another one by now
                if os.path.samestat(os.fstat(file), os.stat(temporary[0])):
                    temporary[0].unlink()
            _remove_empty(temporary[1:])
        fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # it is not empty
            folder.rmdir()
