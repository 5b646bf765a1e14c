"""One holder at a time, whoever asks; and nothing of a lock outlives its holder."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mv2v_engine.errors import StorageError
from mv2v_engine.locks import Lock, WriterLock
from mv2v_engine.testing import largest_file

HOLDER = """
import sys
from pathlib import Path
from mv2v_engine.locks import WriterLock
lock = WriterLock(Path(sys.argv[1]))
lock.take()
print("held", flush=True)
sys.stdin.read()
"""


def held_elsewhere(folder: Path) -> subprocess.Popen[str]:
    """A process that holds a folder until its input ends, or it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("is_killed", [True, False])
def test_another_process_is_named_and_its_end_ends_the_lock(
    tmp_path: Path, is_killed: bool
) -> None:
    folder = tmp_path / "out"
    process = held_elsewhere(folder)
    lock = WriterLock(folder)
    with pytest.raises(StorageError, match=rf"is in use: process {process.pid} on .*choose anoth"):
        lock.take()
    assert not lock.is_held and not lock.acquire(patience=0.1)
    if is_killed:
        process.kill()
    process.communicate(timeout=600)
    # only a killed one leaves its file, which stops nobody
    assert folder.exists() == is_killed
    lock.take()
    assert lock.is_held and (folder / "writer.lock").exists()


def test_threads_and_objects_of_one_process_are_apart(tmp_path: Path) -> None:
    first = WriterLock(tmp_path)
    first.take()
    told: list[str] = []

    def ask() -> None:
        with pytest.raises(StorageError, match="another session of this process") as caught:
            WriterLock(tmp_path).take()
        told.append(str(caught.value))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(600)
    assert len(told) == 1
    # the lock goes with its object
    del first
    with WriterLock(tmp_path) as second:
        second.acquire()
    assert list(tmp_path.iterdir()) == [tmp_path / "writer.lock"]


def test_a_lock_in_a_circle_that_nobody_reaches_is_no_holder(tmp_path: Path) -> None:
    first = WriterLock(tmp_path)
    first.take()
    first.circle = first  # type: ignore[attr-defined]
    del first
    WriterLock(tmp_path).take()


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    lock = WriterLock(folder)
    lock.take()
    assert folder.is_dir()
    lock.release()
    lock.release()
    assert not list(tmp_path.iterdir())
    # what was there stays, and what has been used
    folder.mkdir(parents=True)
    for content in ((), ("kept",)):
        lock.take()
        for name in content:
            (folder / name).write_text("")
        lock.release()
        assert [path.name for path in folder.iterdir()] == list(content)


def test_a_holder_that_removes_its_file_lets_no_two_in(tmp_path: Path) -> None:
    """Many take the same lock in turn; each removes its file, and never do two hold it at once."""
    inside, most, done = 0, 0, 0
    counting = threading.Lock()

    def work() -> None:
        nonlocal inside, most, done
        for _ in range(10):
            lock = WriterLock(tmp_path)
            while True:
                try:
                    lock.take()
                    break
                except StorageError:
                    time.sleep(0.001)
            with counting:
                inside += 1
                most = max(most, inside)
            with counting:
                inside -= 1
                done += 1
            lock.release()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert (most, done) == (1, 30) and not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_does_not_let_go(tmp_path: Path) -> None:
    lock = WriterLock(tmp_path / "s")
    lock.take()
    pid = os.fork()
    if pid == 0:
        lock.release()
        os._exit(0)
    os.waitpid(pid, 0)
    with pytest.raises(StorageError, match="is in use"):
        WriterLock(tmp_path / "s").take()


def test_names_of_the_holder_before(tmp_path: Path) -> None:
    first, second = Lock(tmp_path / "lock", "first"), Lock(tmp_path / "lock", "second")
    assert first.acquire() and first.previous == ""
    assert not second.acquire() and second.holder() == "first"
    first.release()
    assert second.acquire() and second.previous == "first"
    second.release()
    # a full disk has no room for a name, and keeps the lock
    with largest_file(0):
        assert first.acquire() and first.holder() == "unknown"


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock = WriterLock(tmp_path / "out")
    with pytest.raises(StorageError, match=r"cannot lock .*keeps no locks .*on one that does"):
        lock.take()
    assert not lock.is_held
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write into"):
        WriterLock(tmp_path / "file" / "out").take()
