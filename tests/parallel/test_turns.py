"""Turns, edits and failures of two processes."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mv2v_engine import run
from tests.launched import both, both_succeed, torchrun
from tests.torch_state import num_threads

CAMERAS = ("pan_right", "arc_left")


@pytest.fixture(scope="module")
def told(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, source_clip: Path
) -> dict[str, Any]:
    """What two processes say of their turns, the last of which fails in the second one."""
    folder = tmp_path_factory.mktemp("turns")
    script = str(Path(__file__).with_name("turns.py"))
    first, second = both(script, str(tiny_checkpoint), str(source_clip), str(folder))
    assert first.returncode == 0, first.stderr[:5000]
    # no one watches over them: each ended by itself, the second with its own error
    assert second.returncode == 1
    assert "RuntimeError: device on fire" in second.stderr
    result: dict[str, Any] = json.loads((folder / "told.json").read_text())
    return result


def test_static_turns_equal_those_of_one_process(told: dict[str, Any]) -> None:
    assert len(told["differences"]) == 2
    assert max(told["differences"]) < 1e-5
    assert told["merged"] == [True, True]
    assert told["work"] == {"whole": 1, "kept": 2}
    # the first process alone writes
    turns = ["turn_01.safetensors", "turn_02.safetensors"]
    assert told["files"] == ["session.json", *turns, "turns"]


def test_fresh_noise_is_that_of_one_process(told: dict[str, Any]) -> None:
    apart, *run = told["few_steps"]
    assert apart < 1e-5 and run == ["dmd", 3]


def test_a_turn_that_is_not_finite_leaves_all_processes_ready(told: dict[str, Any]) -> None:
    assert told["not_finite"].startswith("NotFiniteError: step 1 of 3 gave latents that are not")
    assert told["turns_then"] == 2 and told["healed"] < 1e-5


def test_the_report_says_how_it_ran(told: dict[str, Any]) -> None:
    report = told["parallel"]
    assert (report["processes"], report["context"], report["backend"]) == (2, 2, "gloo")
    assert report["heads_by_rank"] == [1, 1]
    assert report["received_bytes"] > report["bytes_of_a_later_step"]["attention"] > 0
    (row,) = told["warmed"]
    assert row["eager_steps"] == 1
    assert "several processes" in row["reason"]


def test_a_cancelled_turn_leaves_all_processes_ready(told: dict[str, Any]) -> None:
    assert told["cancelled"].startswith("CancelledError")
    assert told["turns"] == 3  # those after it


def test_a_failure_in_one_process_ends_the_turn_in_all(told: dict[str, Any]) -> None:
    assert told["failed"].startswith("ParallelError: rank 1 failed (RuntimeError: device on fire)")
    assert "finished ones are kept" in told["failed"]
    assert "the processes have parted: rank 1 failed" in told["after"]


def test_sessions_are_not_batched_over_processes(told: dict[str, Any]) -> None:
    assert "RequestError: turns of several sessions share a forward in one process" in told["batch"]


@pytest.mark.slow
def test_guidance_on_two_processes_is_that_of_one_to_the_bit(
    tmp_path: Path, worded_checkpoint: Path, source_clip: Path
) -> None:
    """By the command, which finds out how many there are and writes once."""
    words = ["novel-view", str(source_clip), "--prompt", "a red ball", "--guidance", "3"]
    words += [word for camera in CAMERAS for word in ("--camera", camera)]
    words += ["--memory", "retrieved", "--checkpoint", str(worded_checkpoint), "--device", "cpu"]
    done = torchrun("-m", "mv2v_engine.run", *words, "--out", str(tmp_path / "two"))
    # as torchrun's processes have: another number of threads splits products otherwise
    with num_threads(1), contextlib.redirect_stdout(io.StringIO()):
        assert run.main([*words, "--out", str(tmp_path / "one")]) == 0
    found = [
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        for folder in (tmp_path / "one", tmp_path / "two")
    ]
    assert found[0] == found[1]
    assert done.stdout.count("overview.png") == 1
    for number in (1, 2):
        one, two = (
            load_file(tmp_path / name / "turns" / f"turn_{number:02d}.safetensors")["latents"]
            for name in ("one", "two")
        )
        assert torch.equal(one, two)
    turn = json.loads((tmp_path / "two" / "report.json").read_text())["turns"][1]
    assert (turn["parallel"]["guidance"], turn["parallel"]["context"]) == (2, 1)
    assert turn["parallel"]["received_bytes"] == (
        3 * turn["parallel"]["bytes_of_a_later_step"]["guidance"]
    )
    assert turn["memory"]["retrieved"]


@pytest.mark.slow
def test_an_edit_over_two_processes(
    tmp_path: Path, long_clip: Path, editor_folder: Path, finished_edit: tuple[Path, str]
) -> None:
    words = [
        "edit",
        str(long_clip),
        "--prompt",
        "a red ball",
        "--out",
        str(tmp_path / "edited.mp4"),
    ]
    where = ["--checkpoint", str(editor_folder), "--device", "cpu"]
    first, second = both_succeed("-m", "mv2v_engine.run", *words, *where)
    assert first.count("edited.mp4\n") == 1 and not second
    tensors = sorted((tmp_path / "edited.edit").rglob("*.safetensors"))
    assert len(tensors) == 5
    for path in tensors:
        expected = load_file(finished_edit[0] / path.relative_to(tmp_path))
        for name, value in load_file(path).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)
    report = json.loads((tmp_path / "edited.edit" / "report.json").read_text())
    rows = report["windows"] if "windows" in report else report["turns"][0]["windows"]
    assert [row["parallel"]["context"] for row in rows] == [2] * 5
