"""The log: one history over kills and resumptions, and clear words about a damaged one."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mv2v_engine.errors import TrainingError
from mv2v_engine.training.log import TrainingLog, plot_curves, read_curves


def _log(path: Path, *steps: int) -> TrainingLog:
    log = TrainingLog(path, step=0)
    for step in steps:
        log.append({"step": step, "loss": 1 / step})
    return log


def test_rows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    log = _log(path, 2, 4)
    assert read_curves(path) == {"loss": ([2, 4], [0.5, 0.25])} == log.curves()
    assert path.read_text() == "step,loss\n2,0.5\n4,0.25\n"


def test_a_metric_may_come_later_and_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    log = _log(path, 2)
    log.append({"step": 4, "loss": 1.0, "loss_static": 3.0})
    log.append({"step": 6, "loss": 2.0})
    curves = read_curves(path)
    assert curves["loss_static"] == ([4], [3.0]) and curves["loss"][0] == [2, 4, 6]


def test_a_resumed_run_takes_back_what_it_makes_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.csv"
    _log(path, 2, 4, 6, 8)
    log = TrainingLog(path, step=5)
    assert "loses 2 rows past step 5" in capsys.readouterr().err
    log.append({"step": 6, "loss": 9.0})
    assert read_curves(path)["loss"] == ([2, 4, 6], [0.5, 0.25, 9.0])


def test_a_line_cut_short_by_a_kill_is_taken_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.csv"
    _log(path, 2, 4)
    path.write_text(path.read_text()[:-3])  # 4,0. without its end
    TrainingLog(path, step=4)
    assert "cut short" in capsys.readouterr().err
    assert path.read_text() == "step,loss\n2,0.5\n"


def test_steps_written_twice_by_earlier_versions_count_once(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(b"step,loss\r\n2,1\r\n4,2\r\n6,3\r\n4,7\r\n6,8\r\n")
    assert read_curves(path)["loss"] == ([2, 4, 6], [1.0, 7.0, 8.0])


def test_a_missing_log_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TrainingLog(tmp_path / "log.csv", step=40)
    assert "begins anew at step 40" in capsys.readouterr().err
    with pytest.raises(TrainingError, match="no training log"):
        read_curves(tmp_path / "log.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\r\n\x1a\n\xff\xff", "is no text"),
        (b"time,value\n1,2\n", "begins with 'time,value'"),
        (b"step,loss\n2,0.5\n4,oops\n6,1\n", "line 3 of .* is '4,oops'"),
        (b"step,loss\n2,0.5,9\n", "line 2 of"),
        (b"step,loss\n,0.5\n", "line 2 of"),
    ],
    ids=["binary", "another-table", "word", "cells", "no-step"],
)
def test_a_damaged_log_is_named_with_what_to_do(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(content)
    with pytest.raises(TrainingError, match=f"(?s){message}.*move the file away"):
        TrainingLog(path, step=10)
    assert path.read_bytes() == content


def test_the_plot_shows_the_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_curves(
        {"a": {"x": ([1, 2], [1.0, 0.1])}, "b": {"y": ([1, 2], [0.1, 1.0])}}, tmp_path / "p.png"
    )
    with Image.open(tmp_path / "p.png") as image:
        assert image.width > 2 * image.height  # two panels
        colours = image.convert("RGB").getcolors(1 << 20)
    assert colours is not None and len(colours) > 20
