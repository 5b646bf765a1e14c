"""Whoever reads what `run` prints may leave: the work goes on, and its files are written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAD = "import sys; sys.stdin.readline()"


def _shell(words: str, tail: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A pipeline whose exit code is that of its first command."""
    command = f"set -o pipefail; '{sys.executable}' -m mv2v_engine.run {words} {tail}"
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize(
    ("tail", "code"),
    [
        (f"| '{sys.executable}' -c '{HEAD}'", 0),
        ("| true", 0),
        (f"2>&1 | '{sys.executable}' -c ''", 0),
        (">&-", 0),
        ("2>&-", 0),
        (">&- 2>&- <&-", 0),
        ("> /dev/full", 3),
    ],
)
def test_the_work_goes_on(
    tail: str, code: int, source_clip: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    words = f"novel-view {source_clip} --camera pan_left --camera static --out out --steps 1"
    done = _shell(f"{words} --checkpoint {tiny_checkpoint} --device cpu", tail, tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert len(list((tmp_path / "out").glob("turn_*.mp4"))) == 2
    assert (tmp_path / "out" / "report.json").is_file()
    if code:
        assert done.stderr.startswith("error: stdout is not complete: No space left")


@pytest.mark.parametrize("words", ["--help", "info", "inspect tiny-nvs", "novel-view --help"])
def test_what_only_prints_ends_quietly(words: str, tmp_path: Path) -> None:
    done = _shell(words, "| true", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_error_that_nobody_reads_keeps_its_code(tmp_path: Path) -> None:
    assert _shell("inspect nothing", "2>&-", tmp_path).returncode == 2
