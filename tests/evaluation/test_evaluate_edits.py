"""`run evaluate` of edits, end to end on a small random editor: written, resumed, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from mv2v_engine import Engine, run
from mv2v_engine.evaluation.edit_clip import ClipEvaluator
from mv2v_engine.evaluation.edit_protocol import EDIT_ROWS, EditProtocol
from mv2v_engine.evaluation.editing_measures import FIRST_EDIT_CLIP, MEASURES

Capture = pytest.CaptureFixture[str]
ROWS = ("independent", "fifo", "memory")


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("editor") / "editor",
        name="editor",
        has_text=True,
        in_channels=32,
        source_channels=16,
        camera_conditioning="none",
        num_layers=2,
    )


def command(checkpoint: Path, out: Path, *more: str) -> list[str]:
    where = ["--out", str(out), "--checkpoint", str(checkpoint), "--device", "cpu"]
    little = ["--clips", "2", "--windows", "2", "--steps", "3", "--rows", ",".join(ROWS)]
    return ["evaluate", *where, *little, "--quiet", "--jobs", "1", *more]


def test_clips_are_measured_and_resumed(
    editor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    out = tmp_path / "out"
    assert run.main(command(editor, out)) == 0
    first = json.loads((out / "results.json").read_text())
    assert first["clips_by_kind"] == {"colour": 1, "paint": 1}
    assert first["clips_by_windows"] == {"2": 2} and list(first["rows"]) == list(ROWS)
    assert list(first["references"]) == ["source", "truth", "vae"]
    for row in first["rows"].values():
        assert row["flops"] > 0 and row["seconds"] > 0 and row["psnr"] > 0
    flops = {name: row["flops"] for name, row in first["rows"].items()}
    assert flops["independent"] < flops["memory"]
    assert first["references"]["truth"]["agreement"] > first["references"]["source"]["agreement"]
    assert set(MEASURES) <= set(first["measures"]) and "dino_f" not in first["measures"]
    assert "| FIFO diagonal denoising |" in (out / "table.md").read_text()
    names = ("windows_colour.png", "windows_paint.png", "measures.png")
    for name in names:
        with Image.open(out / name) as picture:
            assert min(picture.size) > 100
    printed = capsys.readouterr().out.split()
    assert printed == [str(out / name) for name in ("results.json", "table.md", *names)]

    (out / "clips" / f"clip_{FIRST_EDIT_CLIP + 1}.json").unlink()
    measured, plain = [], ClipEvaluator.measure

    def noted(self: ClipEvaluator, seed: int) -> object:
        measured.append(seed)
        return plain(self, seed)

    monkeypatch.setattr(ClipEvaluator, "measure", noted)
    assert run.main(command(editor, out)) == 2
    assert "already holds an evaluation of 1 clips; continue" in capsys.readouterr().err
    assert run.main(command(editor, out, "--resume", "--steps", "4")) == 2
    assert "whose steps is 3, this one's is 4" in capsys.readouterr().err
    assert run.main(command(editor, out, "--resume")) == 0
    assert measured == [FIRST_EDIT_CLIP + 1]
    again = json.loads((out / "results.json").read_text())
    for name, row in first["rows"].items():
        for measure in (*MEASURES, "flops"):
            assert again["rows"][name][measure] == row[measure]


def test_rows_differ_where_they_say(editor: Path) -> None:
    protocol = EditProtocol(clips=1, windows=2, steps=2, rows=("independent", "one_noise"))
    engine = Engine.from_pretrained(editor, device="cpu")
    evaluator = ClipEvaluator(engine, protocol)
    result = evaluator.measure(FIRST_EDIT_CLIP)
    own, same = (result.frames[name] for name in ("independent", "one_noise"))
    # the first window has the request's noise in both, the second noise of its own in one
    assert torch.equal(own[:9], same[:9]) and not torch.equal(own[9:], same[9:])
    configured = {row.name: row.configure(engine.config) for row in EDIT_ROWS}
    assert configured["static"].conditioning == "static"
    assert configured["memory_merged"].merge == "conv" and configured["memory"].merge == "off"
    assert configured["recent_1"].max_memory == 1


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--rows", "memori"], "no row 'memori'; nearest: memory"),
        (["--clips", "0"], "at least 1 clip"),
        (["--windows", "1"], "at least 2, got 1"),
        (["--turns", "5"], "--turns is for the other task, this checkpoint's is edit"),
        (["--task", "novel-view"], "editor is a checkpoint for the task edit, asked was novel"),
    ],
)
def test_bad_requests(
    editor: Path, tmp_path: Path, capsys: Capture, option: list[str], words: str
) -> None:
    assert run.main(command(editor, tmp_path / "out", *option)) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_kinds_take_turns_and_some_clips_are_long() -> None:
    protocol = EditProtocol(clips=40)
    kinds = [protocol.kind_of(seed) for seed in protocol.seeds]
    assert {kinds.count(kind) for kind in kinds} == {8} and len(set(kinds)) == 5
    windows = [protocol.windows_of(seed) for seed in protocol.seeds]
    assert windows.count(8) == 10 and windows.count(5) == 30
    long = {kind for kind, count in zip(kinds, windows, strict=True) if count == 8}
    assert len(long) == 5
    assert len(protocol.drawn) == 5 and "windows_colour.png" in protocol.drawn.values()
