"""The hot paths run, the gate tells slower from not, and the guides' tables are the results'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gate
import memory_plot
import pytest
import readme_numbers
import torch
from bench_memory import count_full_size
from hot_paths import CASES
from measure import ROOT, Report, read_rows


@pytest.mark.parametrize("name", CASES)
def test_every_hot_path_runs(name: str) -> None:
    with torch.no_grad():
        assert CASES[name]()() is not None


class Toy:
    """A version whose cases take what they are told to."""

    def __init__(self, **seconds: float) -> None:
        self.told, self.asked = seconds, 0

    def seconds(self, case: str) -> float:
        self.asked += 1
        if case not in self.told:
            raise RuntimeError("no such thing")
        return self.told[case]


def test_slower_cases_fail_and_new_ones_are_said() -> None:
    old, new = Toy(same=1.0, slow=1.0, gone=1.0), Toy(same=1.1, slow=1.3, new=1.0)
    cases: Any = ["same", "slow", "new", "gone"]
    rows = gate.compare(old, new, cases, rounds=3, ratio=1.15)  # type: ignore[arg-type]
    assert [(row["case"], row["passed"]) for row in rows] == [
        ("same", True),
        ("slow", False),
        ("new", True),
        ("gone", False),
    ]
    assert rows[1]["ratio"] == 1.3 and "baseline: no such thing" in rows[2]["skipped"]
    assert "this version" in rows[3]["skipped"]
    assert old.asked == 2 * (1 + 3) + 1


def test_a_version_runs_in_its_own_process() -> None:
    version = gate.Version(ROOT)
    try:
        assert 0 < version.seconds("token merge") < 1
        with pytest.raises(RuntimeError, match="KeyError: 'no case'"):
            version.seconds("no case")
        assert version.seconds("token merge") > 0
    finally:
        version.close()
    assert version.process.returncode == 0


def test_an_unknown_commit_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"git worktree add .* failed"), gate.checked_out("0" * 40):
        pass


def test_the_pages_hold_the_results() -> None:
    for page in readme_numbers.PAGES:
        assert readme_numbers.written(page) == page.read_text(encoding="utf-8"), page.name
    text = readme_numbers.COSTS.read_text(encoding="utf-8")
    assert "(cost_of_memory.svg)" in text
    svg = (ROOT / "docs" / "cost_of_memory.svg").read_text(encoding="utf-8")
    assert "memory videos" in svg and "tokenizers by rank" in svg


def test_the_walk_of_a_turn_is_the_codes() -> None:
    page = readme_numbers.ARCHITECTURE
    text = page.read_text(encoding="utf-8")
    assert readme_numbers.placed(page) == text, "python profiling/readme_numbers.py --write"
    assert text.count("#L") > 20


def test_the_plot_is_drawn_from_counted_rows_alone(tmp_path: Path) -> None:
    report = Report(tmp_path / "rows.jsonl", {"model": "toy", "device": "cpu"})
    count_full_size(report)
    memory_plot.draw(read_rows(tmp_path / "rows.jsonl"), tmp_path / "plot.svg")
    assert "PFLOP of one forward" in (tmp_path / "plot.svg").read_text(encoding="utf-8")
