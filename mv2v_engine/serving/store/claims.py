"""Who may write into a session's folder, where several could and one may be believed dead.

    claim         the token of the one attempt that may write; the service alone writes it
    writer.lock   held while somebody writes; says who did last

A new token ends the right of whoever had it: an attempt that still runs, on a machine that nobody
reaches or for a service that is gone, finds another token at its next step and ends as cancelled.
The next attempt begins only once it holds the lock, so two never write at once, whatever is
believed of them; one that hangs keeps the session, not the service, waiting. The store's file
system must keep locks between machines.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mv2v_engine.errors import InUseError, StorageError
from mv2v_engine.locks import WriterLock
from mv2v_engine.progress import CancelToken

# seconds that an attempt has to reach its next step, and let go
PATIENCE = 60.0
# seconds that a worker has to let go of a session that it holds open and does nothing with
_RELEASE_SECONDS = 5.0
# seconds between two looks at whether to go on waiting
_LOOK_SECONDS = 1.0
# the service's name for those that find its lock
_SERVICE = "the service"


def issue(folder: Path) -> str:
    """Take the right to write from whoever has it; the token of who has it now.

    Raises:
        StorageError: the folder cannot be written.
    """
    token = secrets.token_hex(12)
    try:
        # in place: a reader on another machine must not hold on to a file that is gone
        file = os.open(_claim(folder), os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(file, token.encode(), 0)
        finally:
            os.close(file)
    except OSError as error:
        raise StorageError(
            f"cannot write {_claim(folder)}: {error.strerror}; make room, or restore the folder"
        ) from error
    return token


class Claim(CancelToken):
    """One attempt's right to write; losing it is to be cancelled.

    token: that the service issued. writer: who it is, in words, and no other is.
    """

    def __init__(
        self, folder: Path, token: str, writer: str, *, patience: float = PATIENCE
    ) -> None:
        super().__init__()
        self.folder, self.token, self.writer = folder, token, writer
        self._patience = patience

    @property
    def cancelled(self) -> bool:
        """Whether it was cancelled or has lost its right.

        Raises:
            StorageError: this machine does not see the session's folder.
        """
        if not super().cancelled and self._current() != self.token:
            self.cancel()
        return super().cancelled

    @contextmanager
    def held(self) -> Iterator[bool]:
        """Hold the lock; yields whether the last to hold it was this writer.

        Raises:
            CancelledError: another attempt has the right.
            InUseError: somebody else holds on to the lock. StorageError: the folder is not seen
                here.
        """
        self.check()
        lock = WriterLock(self.folder, self.writer)
        deadline = time.monotonic() + self._patience
        while not lock.acquire(min(_LOOK_SECONDS, self._patience)):
            self.check()
            if time.monotonic() >= deadline:
                holder = lock.holder()
                raise InUseError(
                    f"{holder} still writes into {self.folder}, {self._patience:g} s after it was "
                    "told to stop; end that process and ask again",
                    holder,
                )
        try:
            self.check()
            yield lock.previous == self.writer
        finally:
            lock.release()

    def _current(self) -> str:
        path = _claim(self.folder)
        try:
            return path.read_text(encoding="ascii")
        except OSError as error:
            raise StorageError(
                f"{socket.gethostname()} cannot read {path} ({error.strerror}); every machine must "
                "have the store at the same path"
            ) from error


@contextmanager
def taken(folder: Path, *, patience: float = PATIENCE) -> Iterator[None]:
    """Nobody else writes into a session's folder, if it is there, during the block.

    Raises:
        InUseError: somebody does not stop. StorageError: there can be no lock.
    """
    if not folder.is_dir():
        yield
    elif _claim(folder).exists():
        with Claim(folder, issue(folder), _SERVICE, patience=patience).held():
            yield
    else:
        # no attempt was ever told to write here: whoever does, as a command line, gives way to none
        lock = WriterLock(folder, _SERVICE)
        lock.take(min(patience, _RELEASE_SECONDS))
        with lock:
            yield


def _claim(folder: Path) -> Path:
    return folder / "claim"
