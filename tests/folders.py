"""Folders before and after: what lies in one, what damages it, and commands that leave it alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mv2v_engine import run


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its path there, but for what comes and goes."""
    passing = ("lock", "-wal", "-shm")  # a database has such files
    paths = [
        path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(passing)
    ]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def turned(content: bytes, place: int) -> bytes:
    """With one bit of one byte turned."""
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "short": lambda content: content[:-1],
    "turned": lambda content: turned(content, len(content) // 2),
}


@contextmanager
def edited_json(path: Path) -> Iterator[Any]:
    """A file's content, which is written there as it is left."""
    content = json.loads(path.read_text())
    yield content
    path.write_text(json.dumps(content))


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> str:
    """The one line that a command ends with when it is refused; the folder stays as it was."""
    before = contents(folder), set(folder.rglob("*"))
    code = run.main(list(words))
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, ""), captured
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert (contents(folder), set(folder.rglob("*"))) == before
    return captured.err
