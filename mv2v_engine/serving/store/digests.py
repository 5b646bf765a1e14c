"""What rows promise of files: for each its bytes and its SHA-256, by its path in the folder.

    {"results/turn_0001.mp4": {"bytes": 48211, "sha256": "9f86d0..."}}

A file is read once and then believed as long as nothing has touched it.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

from mv2v_engine.errors import StorageError
from mv2v_engine.files import file_digest

Promises: TypeAlias = Mapping[str, Mapping[str, Any]]

_MAX_KNOWN = 100_000
# what a row may name: nothing outside its session's folder
_NAME = re.compile(
    r"source|references/\d+|mask|video\.mp4|turns/turn_\d+(\.safetensors|/window_\d+\.safetensors)|results/turn_\d+\.(mp4|jpg)"
)


def promised(folder: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """What a row promises of files as they are now.

    Raises:
        StorageError: one cannot be read.
    """
    found = {}
    for path in paths:
        try:
            sha256 = file_digest(path)
            found[path.relative_to(folder).as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": sha256,
            }
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}") from error
    return found


def is_promise(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether a row has of a file what it should have; not so where the row is damaged."""
    if not isinstance(value, Mapping) or not {"bytes", "sha256"} <= value.keys():
        return False
    return type(value["bytes"]) is int and isinstance(value["sha256"], str | None)


def num_bytes(files: Promises) -> int:
    """Bytes of all files that a row promises."""
    return sum(int(promise["bytes"]) for promise in files.values())


class Verifier:
    """Compares files with what rows promise. Safe to use from several threads.

    num_read: bytes that were read so far.
    """

    def __init__(self) -> None:
        self.num_read = 0
        self._known: OrderedDict[str, tuple[tuple[int, ...], str]] = OrderedDict()
        self._lock = threading.Lock()

    def problem(
        self, folder: Path, name: str, files: Promises, *, is_deep: bool = True
    ) -> str | None:
        """What is wrong with a file, in words; None if it is the one that was promised.

        is_deep: compare its SHA-256 too, not only its size.
        """
        promise = files.get(name)
        if not is_promise(promise) or not _NAME.fullmatch(name):
            return f"{name}: nothing is recorded of it"
        path = folder / name
        try:
            size = path.stat().st_size
            if size != promise["bytes"]:
                return f"{name} has {size:,} bytes, {promise['bytes']:,} were stored"
            if promise["sha256"] is None:
                return f"{name} has no digest on record"
            if is_deep and self._digest(path) != promise["sha256"]:
                return f"{name} holds other bytes than were stored"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        return None

    def _digest(self, path: Path) -> str:
        status = path.stat()
        mark = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        with self._lock:
            known = self._known.get(str(path))
        if known is not None and known[0] == mark:
            return known[1]
        found = file_digest(path)
        with self._lock:
            self.num_read += status.st_size
            self._known[str(path)] = (mark, found)
            while len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)
        return found
