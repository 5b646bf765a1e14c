"""What must hold of a store at any time when no turn runs."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

_DATABASE = {"service.sqlite3", "service.sqlite3-wal", "service.sqlite3-shm"}
_OWN = _DATABASE | {"store.json", "spare", "lock", "worker.lock"}


def check_store(root: Path) -> None:
    """Every file belongs to a row, every row has its files, and both tell the same of each turn."""
    with closing(sqlite3.connect(root / "service.sqlite3")) as db:
        sessions = [id for (id,) in db.execute("SELECT id FROM sessions")]
        query = "SELECT session, number, is_published, deleted IS NULL FROM turns"
        turns = db.execute(query).fetchall()
        jobs = db.execute("SELECT id, state, number, session FROM jobs").fetchall()
    expected = {root / "sessions" / id / "source" for id in sessions}
    expected |= {root / "sessions" / id / "rows" / "session.json" for id in sessions}
    for id in sessions:
        folder = root / "sessions" / id
        numbers = sorted(number for session, number, *_ in turns if session == id)
        assert numbers == list(range(1, len(numbers) + 1)), (id, numbers)
        manifest = folder / "session.json"
        stored = []
        if manifest.exists():
            expected.add(manifest)
            stored = [row["number"] for row in json.loads(manifest.read_text())["turns"]]
        assert stored == numbers, f"{id}: the folder has turns {stored}, the rows {numbers}"
    for session, number, is_published, is_kept in turns:
        folder = root / "sessions" / session
        expected.add(folder / "rows" / f"turn_{number:04d}.json")
        # nothing but its rows is left of a deleted turn
        if is_kept:
            expected.add(folder / "turns" / f"turn_{number:02d}.safetensors")
        if is_kept and is_published:
            expected |= {folder / "results" / f"turn_{number:04d}.{s}" for s in ("mp4", "jpg")}
    for id, state, number, session in jobs:
        assert (state == "finished") == ((session, number) in {t[:2] for t in turns}), (id, state)
    found = {path for path in root.rglob("*") if path.is_file() and path.parent != root}
    # the lock of a worker that has the session open, or of one that was killed
    found = {path for path in found if path.name != "writer.lock"}
    assert found == expected, f"orphans {found - expected}, missing {expected - found}"
    assert {path.name for path in root.iterdir() if path.is_file()} <= _OWN
