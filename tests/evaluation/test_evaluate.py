"""`run evaluate` end to end on a small random checkpoint: written, resumed, refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mv2v_engine import run
from mv2v_engine.errors import MemoryBudgetError
from mv2v_engine.evaluation.parallel import Processes, measure_all
from mv2v_engine.evaluation.protocol import FIRST_SCENE, MAIN_ROWS
from mv2v_engine.evaluation.scene import SceneEvaluator

Capture = pytest.CaptureFixture[str]
PICTURES = ("side_by_side.png", "consistency.png", "cost.png")
QUICK = ("--quick", "--quiet", "--scenes", "2")


def command(checkpoint: Path, out: Path, *more: str) -> list[str]:
    where = ["--out", str(out), "--checkpoint", str(checkpoint), "--device", "cpu"]
    return ["evaluate", *where, *more]


def small(checkpoint: Path, out: Path, *more: str) -> list[str]:
    return command(checkpoint, out, "--scenes", "1", "--steps", "1", "--rows", "memory", *more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    out = tmp_path_factory.mktemp("evaluation") / "out"
    assert run.main(command(tiny_checkpoint, out, *QUICK, "--jobs", "1")) == 0
    return out


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def test_quick_writes_everything(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert results["scenes"] == 2 and list(results["rows"]) == list(MAIN_ROWS)
    for row in results["rows"].values():
        low, high = row["consistency_ci"]
        assert 0 < low <= row["consistency"] <= high < 1
        assert row["source_psnr"] > 0 and row["tokens"] > 0 and row["seconds"] > 0
        assert row["source_sharpness"] > 0 and row["unseen_sharpness"] > 0
    assert results["rows"]["static"]["flops"] < results["rows"]["memory"]["flops"]
    assert results["settings"]["steps"] == 4 and results["settings"]["trained_for_memory"]
    assert "memory / independent" in results["targets"]
    assert results["references"]["vae"]["sharpness"] == 1
    assert list(results["references"]) == ["truth", "vae", "source"]
    own, full = results["cost"].values()
    assert own[4]["flops_merged"] < own[4]["flops_dynamic"] < own[4]["flops_uniform"]
    # METHOD 16 at four memory videos
    assert full[4]["tokens_dynamic"] == 92_274
    assert list(results["merging_saves"].values())[1]["4"] == pytest.approx(0.328, abs=5e-4)
    assert set(results["seconds_by_memory"]["memory"]) == {"0", "1", "2"}
    assert len(list((finished / "scenes").iterdir())) == 2
    assert "| memory, joint |" in (finished / "table.md").read_text()
    for name in PICTURES:
        with Image.open(finished / name) as picture:
            assert min(picture.size) > 200


def test_several_processes_measure_what_one_does(
    finished: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    some = [*QUICK, "--rows", "independent,memory"]
    assert run.main(command(tiny_checkpoint, tmp_path, *some, "--jobs", "2")) == 0
    one, other = (
        json.loads((folder / "results.json").read_text()) for folder in (finished, tmp_path)
    )
    assert (one["machine"]["processes"], other["machine"]["processes"]) == (1, 2)
    assert set(other["rows"]) == {"independent", "memory"}
    for name, row in other["rows"].items():
        assert row["consistency"] == pytest.approx(one["rows"][name]["consistency"], rel=1e-3)
        assert row["flops"] == one["rows"][name]["flops"]
    assert (tmp_path / "side_by_side.png").exists()


def test_jobs_are_counted(tiny_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run.main(command(tiny_checkpoint, tmp_path / "out", "--jobs", "0")) == 2
    assert "at least 1 job, got 0" in capsys.readouterr().err


def test_a_killed_process_is_said() -> None:
    # each process "loads" its own number and is told to send itself signal 9
    suicidal: Any = Processes(jobs=2, load=os.getpid)  # type: ignore[arg-type]
    engine: Any = None
    with pytest.raises(MemoryBudgetError, match="one of 2 measuring processes was killed"):
        list(measure_all(engine, [signal.SIGKILL] * 2, os.kill, suicidal))  # type: ignore[arg-type]


def test_resuming_measures_only_what_is_missing(
    again: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (again / "results.json").read_text()
    (again / "scenes" / f"scene_{FIRST_SCENE + 1}.json").unlink()
    (again / "results.json").unlink()
    measured = []
    plain = SceneEvaluator.measure

    def noted(self: SceneEvaluator, seed: int) -> object:
        measured.append(seed)
        return plain(self, seed)

    monkeypatch.setattr(SceneEvaluator, "measure", noted)
    assert run.main(command(tiny_checkpoint, again, *QUICK, "--resume")) == 0
    assert measured == [FIRST_SCENE + 1]
    one, other = json.loads(before), json.loads((again / "results.json").read_text())
    for name, row in one["rows"].items():
        for key in ("consistency", "consistency_ci", "source_psnr", "camera_error", "flops"):
            assert other["rows"][name][key] == row[key]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ([], "already holds an evaluation of 2 scenes; continue it with --resume"),
        (["--resume", "--steps", "3"], "whose steps is 4, this one's is 3"),
        (["--resume", "--turns", "5"], "whose turns is 3, this one's is 5"),
        (["--resume", "--grade", "textured"], "whose grade is 'plain', this one's is 'textured'"),
        (["--resume", "--rows", "memory"], "whose rows is"),
    ],
)
def test_a_folder_in_use_is_refused(
    again: Path, tiny_checkpoint: Path, capsys: Capture, option: list[str], words: str
) -> None:
    assert run.main(command(tiny_checkpoint, again, *QUICK, *option)) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "mv2v-evaluation"}'])
def test_a_damaged_scene_is_refused(
    again: Path, tiny_checkpoint: Path, capsys: Capture, content: str
) -> None:
    path = again / "scenes" / f"scene_{FIRST_SCENE + 1}.json"
    path.write_text(content)
    assert run.main(command(tiny_checkpoint, again, *QUICK, "--resume")) == 2
    assert f"{path} cannot be read" in capsys.readouterr().err


def test_overwriting_removes_its_own_files_alone(again: Path, tiny_checkpoint: Path) -> None:
    (again / "notes.txt").write_text("mine")
    assert run.main(small(tiny_checkpoint, again, "--overwrite", "--quiet")) == 0
    assert (again / "notes.txt").exists()
    assert len(list((again / "scenes").iterdir())) == 1
    assert list(json.loads((again / "results.json").read_text())["rows"]) == ["memory"]


def test_a_model_that_cannot_be_measured(
    tmp_path: Path, make_checkpoint: Callable[..., Path], capsys: Capture
) -> None:
    base = make_checkpoint(tmp_path / "base", tokenizers=(2,), merger=None)
    assert run.main(small(base, tmp_path / "out")) == 2
    assert "memory asks for tokenizer 1x4x4; this model has (2,)" in capsys.readouterr().err
    blind = make_checkpoint(tmp_path / "blind", camera_conditioning="none")
    assert run.main(small(blind, tmp_path / "other")) == 2
    assert "takes no camera" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--rows", "memori"], "no row 'memori'; nearest: memory"),
        (["--scenes", "0"], "at least 1 scene"),
        (["--turns", "4"], "invalid choice"),
    ],
)
def test_bad_requests(
    tmp_path: Path, tiny_checkpoint: Path, capsys: Capture, option: list[str], words: str
) -> None:
    assert run.main(command(tiny_checkpoint, tmp_path / "out", *option)) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_steps_that_a_family_cannot_take_are_refused_before_anything(
    tiny_checkpoint: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mv2v_engine.evaluation.command.evaluate", None)
    assert (
        run.main(command(tiny_checkpoint, tmp_path / "out", "--fast", "turbo", "--steps", "9")) == 2
    )
    assert "scheduler rcm has a table for" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
