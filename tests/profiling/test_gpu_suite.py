"""The GPU suite without a GPU: its plan, its time limits, and stages that fail."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import gpu_suite
import pytest
import torch
from faults import is_alive
from gpu_suite import LIMIT, ROOT, Stage, gpu_tests, plan, run_stages
from measure import Report


def python(name: str, code: str, seconds: float = 60) -> Stage:
    return Stage(name, (sys.executable, "-S", "-c", code), seconds)


def suite(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_suite", "--commit", "abc", *arguments])
    gpu_suite.main()


def test_the_plan_fits_nine_minutes_and_names_what_exists(tmp_path: Path) -> None:
    stages = plan(tmp_path, "abc")
    names = ["build", "tests", "roofline", "memory", "block", "ops", "engine", "peers"]
    assert [stage.name for stage in stages] == [*names, "graphs", "batch"]
    assert sum(stage.seconds for stage in stages) <= LIMIT < 9 * 60
    for stage in stages:
        assert stage.command[0] == sys.executable
        scripts = [part for part in stage.command if part.endswith(".py")]
        assert all((ROOT / script).is_file() for script in scripts)
        if stage.name not in ("build", "tests"):
            assert str(tmp_path / f"gpu_{stage.name}.jsonl") in stage.command
            assert stage.command[stage.command.index("--commit") + 1] == "abc"
    assert {"tests/kernels/test_bodies.py", "tests/ops/test_on_gpu.py"} <= set(gpu_tests())


def test_a_dry_run_prints_the_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    suite(monkeypatch, "--dry-run", "--results", str(tmp_path / "new"), "--only", "ops", "build")
    printed = capsys.readouterr().out
    assert "setup.py" in printed and "bench_ops.py" in printed and "bench_block" not in printed
    assert "at most 535 s" in printed and not (tmp_path / "new").exists()


def test_an_unknown_stage_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        suite(monkeypatch, "--dry-run", "--only", "ops", "naps")
    assert "no stage ['naps']; there are ['build', 'tests'," in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_and_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=r"needs a CUDA device: .*--dry-run"):
        suite(monkeypatch, "--results", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_what_fails_is_recorded_and_the_next_stage_runs(tmp_path: Path) -> None:
    out, child = tmp_path / "suite.jsonl", tmp_path / "child"
    sleeps = f"import os, time; open({str(child)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    starts = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {sleeps!r}])"
    stages = [
        python("broken", "print('warning: no library'); print('x' * 9999); raise SystemExit(3)"),
        Stage("missing", ("/nowhere/python",), 60),
        python("slow", f"print('so far', flush=True); {starts}", 6.0),
        python("tests", "print('1 failed, 41 passed, 2 skipped in 3.14s')"),
    ]
    assert not run_stages(stages, Report(out, {"device": "toy"}), 60)
    rows: list[dict[str, Any]] = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["stage"], row["ok"]) for row in rows] == [
        ("broken", False),
        ("missing", False),
        ("slow", False),
        ("tests", True),
    ]
    broken, missing, slow, tests = rows
    assert broken["returncode"] == 3 and broken["warnings"] == ["no library"]
    assert set(broken["said"].strip()) == {"x"} and len(broken["said"]) == gpu_suite.TAIL
    assert "No such file" in missing["said"]
    assert slow["timed_out"] and slow["limit_s"] == 6.0 and "so far" in slow["said"]
    assert tests["tests"] == {"failed": 1, "passed": 41, "skipped": 2} and "said" not in tests
    assert all(row["device"] == "toy" for row in rows)
    # what the slow stage had started was ended with it
    deadline = time.monotonic() + 600
    while is_alive(int(child.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_whole_has_a_limit_too() -> None:
    report = Report(None, {})
    stages = [python("first", "import time; time.sleep(60)"), python("second", "print('never')")]
    assert not run_stages(stages, report, 0.5)
    first, second = report.rows
    assert first["timed_out"] and first["limit_s"] <= 0.5
    assert second["skipped"] == "0.5 s were used up" and not second["ok"]


def test_stages_find_the_engine_and_the_kernels() -> None:
    code = "from importlib.util import find_spec as f; raise SystemExit(not all(map(f, %r)))"
    names = ["mv2v_engine", "mv2v_kernels"]
    assert run_stages([python("paths", code % (names,))], Report(None, {}), 60)
    assert not run_stages([python("paths", code % (["mv2v_moon"],))], Report(None, {}), 60)
