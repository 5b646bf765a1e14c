"""A power cut, and moments to hit a process at: the side of `faults.c` that a test holds.

Of a power cut three outcomes are made, for a file system may do more than it was asked to:

- `synced`: what was synced and nothing else. A file is as at its last sync, or empty; a folder has
  the names that it had at its own last sync.
- `named`: every name is there, of files that were not synced, too, whose bytes are as at their last
  sync, or none.
- `mixed`: each folder's names and each file's bytes are the synced ones or the newest; what was
  appended without a sync is cut anywhere.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

Outcome = Literal["synced", "named", "mixed"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
SOURCE = Path(__file__).resolve().with_name("faults.c")
_POLL_SECONDS = 0.002


class Faults:
    """The layer under the processes that are started with its `environment`.

    root: the folder that is watched. folder: where the layer keeps what it needs, outside of it.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root.resolve(), folder.resolve()
        self._durable = self.folder / "durable"
        self._hold, self._held = self.folder / "hold", self.folder / "held"
        self._library = self.folder / "faults.so"
        self.folder.mkdir(parents=True, exist_ok=True)
        command = ["cc", "-O1", "-shared", "-fPIC", "-o", str(self._library), str(SOURCE), "-ldl"]
        subprocess.run(command, check=True)
        self._c = ctypes.CDLL(str(self._library))
        self.settle()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "LD_PRELOAD": str(self._library),
            "FAULTS_ROOT": str(self.root),
            "FAULTS_FOLDER": str(self.folder),
        }

    def settle(self) -> None:
        """Everything that lies in `root` now is durable. Nothing may be writing there."""
        self.release()
        shutil.rmtree(self._durable, ignore_errors=True)
        self._durable.mkdir()
        for path in (self.root, *self.root.rglob("*")):
            copy = self._durable / self._key(path)
            if path.is_dir():
                copy.write_text(
                    "".join(f"{kind} {key} {name}\n" for kind, key, name in self._now(path))
                )
            else:
                shutil.copyfile(path, copy)

    def hold(self, pattern: str) -> None:
        """Let the next rename to a path that fits a pattern wait, just before it is done."""
        self._hold.with_suffix(".new").write_text(pattern)
        self._hold.with_suffix(".new").replace(self._hold)

    def wait_held(self, patience: float, is_over: Callable[[], bool] = lambda: False) -> bool:
        """Whether a rename is held now; False once `is_over`, or after so many seconds."""
        deadline = time.monotonic() + patience
        while not self._held.exists():
            if is_over() or time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def release(self) -> None:
        """Let what is held go on, and hold nothing more."""
        self._hold.unlink(missing_ok=True)
        self._held.unlink(missing_ok=True)

    def cut(self, target: Path, outcome: Outcome, choose: random.Random) -> None:
        """Write what a power cut now leaves of `root` into a new folder. Its processes are dead."""
        target.mkdir()
        self._rebuild(self.root, self._key(self.root), target, outcome, choose)

    def _rebuild(
        self, path: Path, key: str, target: Path, outcome: Outcome, choose: random.Random
    ) -> None:
        for kind, inner, name in self._names(path, key, outcome, choose):
            if kind == "d":
                (target / name).mkdir()
                self._rebuild(path / name, inner, target / name, outcome, choose)
            else:
                data = self._bytes(path / name, inner, outcome, choose)
                (target / name).write_bytes(data)

    def _names(
        self, path: Path, key: str, outcome: Outcome, choose: random.Random
    ) -> list[tuple[str, str, str]]:
        synced, now = self._synced_names(key), self._now(path) if self._is_still(path, key) else []
        if outcome == "synced":
            return synced
        return now if outcome == "named" or choose.random() < 0.5 else synced

    def _synced_names(self, key: str) -> list[tuple[str, str, str]]:
        copy = self._durable / key
        lines = copy.read_text().splitlines() if copy.exists() else []
        return [(kind, inner, name) for kind, inner, name in (line.split(" ", 2) for line in lines)]

    def _bytes(self, path: Path, key: str, outcome: Outcome, choose: random.Random) -> bytes:
        copy = self._durable / key
        synced = copy.read_bytes() if copy.exists() else b""
        if outcome != "mixed" or not self._is_still(path, key):
            return synced
        now = path.read_bytes()
        if now.startswith(synced):
            return now[: choose.randint(len(synced), len(now))]
        return choose.choice((synced, now))

    def _is_still(self, path: Path, key: str) -> bool:
        """Whether a path leads to what had this key."""
        return path.exists() and self._key(path) == key

    def _now(self, folder: Path) -> list[tuple[str, str, str]]:
        return [
            ("d" if path.is_dir() else "f", self._key(path), path.name) for path in folder.iterdir()
        ]

    def _key(self, path: Path) -> str:
        key = ctypes.create_string_buffer(64)
        if self._c.faults_key(os.fsencode(path), key):
            raise FileNotFoundError(path)
        return key.value.decode()


def children(pid: int) -> dict[int, str]:
    """The processes that one has started, with their command lines."""
    found = {}
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            try:
                words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            except OSError:  # it has just ended
                continue
            found[int(child)] = b" ".join(words).decode(errors="replace")
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def kill_all(pids: list[int], sig: int) -> None:
    """Send a signal to those that still are."""
    for pid in pids:
        if is_alive(pid):
            os.kill(pid, sig)
