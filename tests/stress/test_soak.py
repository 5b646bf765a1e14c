"""The soak in short: nothing grows, and what does grow is found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import soak

from mv2v_engine.models import rope

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")


def run(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, *more: str) -> int:
    arguments = ["--checkpoint", str(checkpoint), "--device", "cpu", "--steps", "1", *more]
    monkeypatch.setattr(sys, "argv", ["soak", "--commit", "abc", *arguments])
    return soak.main()


@pytest.mark.slow
def test_twenty_turns(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "soak.json"
    code = run(monkeypatch, tiny_checkpoint, "--turns", "20", "--every", "5", "--out", str(out))
    result = json.loads(out.read_text())
    assert code == 0 and result["grows"] == [] and len(result["samples"]) == 4
    assert {"opened", "opened with a folder", "resumed", "cancelled"} <= set(result["done"])
    for name in ("cache_entries", "cache_bytes", "frames_bytes", "unfinished_files"):
        assert result["samples"][-1][name] == 0


def samples(**last: Any) -> list[dict[str, int]]:
    names = [*soak.ALLOWED, "objects", "rss_bytes", "rotary_tables", "graph_bytes"]
    rows = [{"turns": 10 * number} | dict.fromkeys(names, 7) for number in range(1, 10)]
    for number in range(6, 9):
        rows[number] |= last
    return rows


def test_what_grows_is_found() -> None:
    assert not any(row["grows"] for row in soak.growth(samples(), graph_bytes=7).values())
    assert soak.growth(samples(), graph_bytes=6)["graph_bytes"]["grows"]
    for name in soak.ALLOWED:
        assert soak.growth(samples(**{name: 100}))[name]["grows"]
    assert not soak.growth(samples(rss_bytes=8 << 20))["rss_bytes"]["grows"]
    assert soak.growth(samples(rss_bytes=32 << 20))["rss_bytes"]["grows"]
    assert not soak.growth(samples(objects=120))["objects"]["grows"]
    assert soak.growth(samples(objects=130))["objects"]["grows"]
    most = rope.table_on.cache_info().maxsize
    assert (
        most is not None and soak.growth(samples(rotary_tables=most + 1))["rotary_tables"]["grows"]
    )
