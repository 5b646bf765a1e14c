"""The fault matrix in short; and what its library says of a power cut is what was synced."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from faults import OUTCOMES, Faults, children, is_alive, kill_all

ROOT = Path(__file__).resolve().parents[2]
MOUNTS = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
PATIENCE = 600.0
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="it needs Linux and a compiler"
)

WRITER = """
import os, sqlite3
root = os.environ["FAULTS_ROOT"]

def sync(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)

def write(name, text, mode="w"):
    with open(f"{root}/{name}", mode) as file:
        file.write(text)

os.mkdir(f"{root}/folder")
for name in ("folder/synced", "folder/bytes", "replaced"):
    write(name, "new")
    sync(f"{root}/{name}")
write("folder/never", "new")
write("folder/synced", " and more", "a")
os.unlink(f"{root}/folder/bytes")
sync(f"{root}/folder")
sync(root)
write("folder/later", "new")
os.replace(f"{root}/replaced", f"{root}/old")
os.unlink(f"{root}/removed")
with open(f"{root}/removed", "w"):  # an inode that is used again is another file
    pass
db = sqlite3.connect(f"{root}/db", isolation_level=None)
for statement in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL", "CREATE TABLE t (x)",
                  "INSERT INTO t VALUES (1)", "BEGIN", "INSERT INTO t VALUES (2)"):
    db.execute(statement)
os._exit(0)
"""


def test_a_power_cut_leaves_what_was_synced(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for name in ("old", "removed"):
        (root / name).write_text("old")
    faults = Faults(root, tmp_path / "faults")
    environment = os.environ | faults.environment
    subprocess.run([sys.executable, "-c", WRITER], env=environment, check=True)
    left = {}
    for outcome in OUTCOMES:
        folder = tmp_path / outcome
        faults.cut(folder, outcome, random.Random(0))
        with closing(sqlite3.connect(folder / "db")) as db:
            assert db.execute("SELECT x FROM t").fetchall() == [(1,)]
        files = (path for path in folder.rglob("*") if path.is_file() and "db" not in path.name)
        left[outcome] = {str(path.relative_to(folder)): path.read_text() for path in files}
    # sqlite3 has synced the root's names once more
    both = {"folder/synced": "new", "folder/never": "", "old": "new", "removed": ""}
    assert left["synced"] == both
    assert left["named"] == both | {"folder/later": ""}
    assert left["mixed"]["folder/synced"].startswith("new")
    assert "new and more".startswith(left["mixed"]["folder/synced"])


def test_a_rename_is_held_until_it_is_let_go(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").touch()
    faults = Faults(root, tmp_path / "faults")
    code = "import os, sys; os.rename(sys.argv[1] + '/a', sys.argv[1] + '/b')"
    faults.hold("*/b")
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(root)], env=os.environ | faults.environment
    )
    assert faults.wait_held(PATIENCE) and (root / "a").exists() and not (root / "b").exists()
    faults.release()
    assert process.wait(PATIENCE) == 0 and (root / "b").exists()
    # nothing is held any more
    assert not faults.wait_held(0.0)


def test_processes_are_found_and_ended() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    deadline = time.monotonic() + PATIENCE
    while not children(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ((child, words),) = children(process.pid).items()
    assert "input()" in words and is_alive(child)
    kill_all([process.pid, child], signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    while is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_nothing_is_lost(tmp_path: Path) -> None:
    if subprocess.run(MOUNTS, capture_output=True).returncode:
        pytest.skip("no file system of one's own can be mounted here")
    out = tmp_path / "faults.jsonl"
    cases = ["power cut (named) all publishing", "at random"]
    command = [sys.executable, str(ROOT / "stress" / "fault_matrix.py"), "--small", "--kills", "2"]
    command += ["--only", *cases, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3 * PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row, case in zip(rows, cases, strict=True):
        assert row["lost"] == [] and case in row["name"]
        assert row["turns"] >= 2
    # what is there is not made again
    again = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert again.stdout.splitlines() == ["2 rows, 0 still to be made; lost: nothing"]
