"""The soak in short: a kill between a turn and its row, a killed worker, cancels, a clean end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soak_service


@pytest.mark.slow
def test_the_service_keeps_its_promises(tmp_path: Path) -> None:
    out = tmp_path / "soak.jsonl"
    size = ["--sessions", "3", "--turns", "2", "--clients", "2", "--kills", "1"]
    assert soak_service.main([*size, "--worker-kills", "1", "--small", "--out", str(out)]) == 0
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["failures"] == []
    counts = row["counts"]
    assert (counts["service kills"], counts["worker kills"]) == (1, 1)
    assert counts["finished"] >= 2
    assert sum(counts.get(state, 0) for state in ("finished", "failed", "cancelled")) <= 6
