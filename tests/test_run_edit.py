"""`run edit` end to end: a long video in, one of the same length out; resumed and cut off."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mv2v_engine import run
from mv2v_engine.progress import Event, WindowStarted
from mv2v_engine.testing import largest_file
from mv2v_engine.video.io import probe_video, read_video, write_video
from tests.conftest import EDIT_FPS, EDIT_FRAMES, EDIT_SIZE, EDIT_WINDOW
from tests.folders import DAMAGES, contents

ROOT = Path(__file__).resolve().parents[1]
WINDOW, SIZE, NUM_FRAMES, FPS = EDIT_WINDOW, EDIT_SIZE, EDIT_FRAMES, EDIT_FPS
PROMPT = "a red ball"
KEPT = {f"turns/turn_01/window_{number:05d}.safetensors" for number in range(1, 6)}

Capture = pytest.CaptureFixture[str]
Edit = Callable[..., int]


def words(clip: Path, out: Path, checkpoint: Path | str, *more: str) -> list[str]:
    where = ["--out", str(out), "--checkpoint", str(checkpoint), "--device", "cpu"]
    return ["edit", str(clip), "--prompt", PROMPT, *where, *more]


@pytest.fixture
def edit(long_clip: Path, editor_folder: Path) -> Callable[..., int]:
    """Runs edit; returns its exit code."""

    def do(out: Path, *more: str, clip: Path = long_clip) -> int:
        return run.main(words(clip, out, editor_folder, *more))

    return do


@pytest.fixture
def copied(tmp_path: Path, finished_edit: tuple[Path, str]) -> Path:
    """The finished edit's folder again."""
    return Path(shutil.copytree(finished_edit[0], tmp_path / "copy"))


def files(folder: Path) -> set[str]:
    return set(contents(folder))


def report_of(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out.with_suffix(".edit") / "report.json").read_text())
    return report


def test_five_windows(finished_edit: tuple[Path, str], long_clip: Path) -> None:
    folder, _ = finished_edit
    kept = {f"edited.edit/{name}" for name in (*KEPT, "session.json", "overview.png")}
    assert files(folder) == {"edited.mp4", "edited.edit/report.json", *kept}
    made, source = probe_video(folder / "edited.mp4"), probe_video(long_clip)
    assert (made.num_frames, made.fps) == (source.num_frames, source.fps) == (NUM_FRAMES, FPS)
    report = report_of(folder / "edited.mp4")
    assert (report["format"], report["version"]) == ("mv2v-edit-report", 1)
    assert report["file"] == "edited.mp4" and report["prompt"] == PROMPT
    assert report["engine"]["checkpoint"] == "editor" and report["peak_host_bytes"] > 1 << 20
    assert [row["new_frames"] for row in report["windows"]] == [
        [start, min(start + WINDOW, NUM_FRAMES)] for start in range(0, NUM_FRAMES, WINDOW)
    ]
    remembered = [[row["turn"] for row in w["memory"]["retrieved"]] for w in report["windows"]]
    assert [sorted(row) for row in remembered] == [list(range(1, n)) for n in range(1, 6)]
    assert [row[0] for row in remembered[1:]] == [1, 2, 3, 4]  # the one just before leads


def test_the_overview(finished_edit: tuple[Path, str], long_clip: Path) -> None:
    """Two rows a window, its source above its edit, each cell the frame that it says."""
    folder, _ = finished_edit
    sheet = np.asarray(Image.open(folder / "edited.edit" / "overview.png"))
    scale, label = 320 // SIZE[1], 26
    height, width = SIZE[0] * scale, SIZE[1] * scale
    assert sheet.shape == (10 * (label + height + 4), 5 * (width + 4) + 4, 3)
    for line, video in enumerate((long_clip, folder / "edited.mp4")):
        frames = read_video(video).frames.numpy()
        for window, shown in ((0, (0, 1, 2, 3, 4)), (4, (20, 21, 22))):
            top = (2 * window + line) * (label + height + 4) + label
            for column, frame in enumerate(shown):
                left = 4 + column * (width + 4)
                cell = sheet[top : top + height : scale, left : left + width : scale]
                assert (cell == frames[frame]).all()


def test_what_is_printed(finished_edit: tuple[Path, str]) -> None:
    folder, said = finished_edit
    lines = said.splitlines()
    assert lines[0].startswith("source long.mp4: 23 frames at 12.5 a second; 48x32 to 48x32: ")
    assert lines[1] == "5 windows of 5 frames, one shot"
    assert re.search(r"^edit  window 4/5, 0:\d\d left$", said, re.M)
    header = next(line for line in lines if line.startswith("window  shot  frames"))
    for title in ("retrieved (score)", "target", "memory", "merged at 1", "video s", "sampling s"):
        assert title in header
    assert re.search(r"^ +5 +1 +20-22 +4 \(\d\.\d\d\), \d \(", said, re.M)
    written = ["edited.mp4", "edited.edit/overview.png", "edited.edit/report.json"]
    assert lines[-3:] == [str(folder / name) for name in written]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--memory", "none", "--seed", "3", "--cuts", "none", "--cross-shot-similarity", "0.5"],
            {"most": 0, "seed": 3, "shots": 1, "similarity": 0.5},
        ),
        (["--max-memory", "1", "--conditioning", "static"], {"most": 1, "mode": "static"}),
        (["--cuts", "10", "--steps", "1", "--guidance", "2"], {"shots": 2, "steps": 1}),
    ],
)
def test_options_reach_the_windows(
    tmp_path: Path, edit: Edit, options: list[str], expected: dict[str, Any]
) -> None:
    out = tmp_path / "out.mp4"
    assert edit(out, *options, "--quiet") == 0
    report = report_of(out)
    windows = report["windows"]
    found = {
        "most": max(len(window["memory"]["retrieved"]) for window in windows),
        "seed": report["seed"],
        "mode": windows[0]["plan"]["conditioning"],
        "shots": report["shots"],
        "steps": report["num_inference_steps"],
        "similarity": report["memory"]["cross_shot_similarity"],
    }
    assert found | expected == found
    if found["shots"] == 2:
        # a window begins with the second shot, and remembers nothing before it
        assert next(w["frames"][0] for w in windows if w["shot"] == 2) == 10
        assert windows[2]["memory"]["retrieved"] == []


def test_short_videos(tmp_path: Path, edit: Edit, moving_frames: Callable[..., Tensor]) -> None:
    """Shorter than a window, down to one frame: repeated for the model, and cut back."""
    for count in (1, 3):
        clip, out = tmp_path / f"{count}.mp4", tmp_path / f"{count}_edited.mp4"
        write_video(clip, moving_frames(count), FPS)
        assert edit(out, "--quiet", clip=clip) == 0
        assert probe_video(out).num_frames == count
        assert report_of(out)["num_windows"] == 1


def test_quiet_and_overwriting(tmp_path: Path, edit: Edit, capsys: Capture) -> None:
    out = tmp_path / "edited.mp4"
    assert edit(out, "--steps", "1", "--quiet") == 0
    first, folder = out.read_bytes(), tmp_path / "edited.edit"
    (folder / "mine.txt").write_text("mine")
    capsys.readouterr()
    assert edit(out, "--cuts", "6", "--overwrite", "--quiet") == 0
    captured, written = capsys.readouterr(), (out, folder / "overview.png", folder / "report.json")
    assert captured.out.split() == [str(path) for path in written]
    assert captured.err == "" and out.read_bytes() != first
    assert {"session.json", "overview.png", "report.json", "mine.txt"} <= files(folder)
    assert report_of(out)["shots"] == 2


@contextlib.contextmanager
def interrupting(title: str, num_steps: int) -> Iterator[Callable[[Event], None]]:
    """Progress that presses Ctrl-C when the third window begins."""

    def show(event: Event) -> None:
        if isinstance(event, WindowStarted) and event.number == 3:
            signal.raise_signal(signal.SIGINT)

    yield show


def test_interrupting_keeps_windows_and_says_how_to_go_on(
    tmp_path: Path,
    edit: Edit,
    finished_edit: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    out = tmp_path / "a folder" / "edited.mp4"
    with monkeypatch.context() as patch:
        patch.setattr("mv2v_engine.turns.turn_progress", interrupting)
        assert edit(out) == 130
    errors = capsys.readouterr().err
    said, _, command = errors.partition("; continue with: ")
    assert said == "interrupted: 2 of 5 windows are kept" and errors.count("\n") == 1
    assert files(out.parent) == {
        f"edited.edit/{name}" for name in ("session.json", *sorted(KEPT)[:2])
    }
    python, *module, name = shlex.split(command)[:3]
    assert [python, *module, name] == ["python", "-m", "mv2v_engine.run"]
    assert run.main(shlex.split(command)[3:]) == 0
    assert "resumed after 2 finished windows" in capsys.readouterr().out
    assert out.read_bytes() == (finished_edit[0] / "edited.mp4").read_bytes()


KILLED = """
import contextlib, os, signal, sys
from mv2v_engine import run, turns
from mv2v_engine.progress import StepDone, WindowStarted

@contextlib.contextmanager
def killing(title, num_steps):
    windows = []
    def show(event):
        if isinstance(event, WindowStarted):
            windows.append(event.number)
        if isinstance(event, StepDone) and windows[-1] == 4:
            os.kill(os.getpid(), signal.SIGKILL)
    yield show

turns.turn_progress = killing
run.main(sys.argv[1:])
"""


def test_killed_and_resumed(
    tmp_path: Path, long_clip: Path, editor_folder: Path, finished_edit: tuple[Path, str]
) -> None:
    out = tmp_path / "edited.mp4"
    arguments = words(long_clip, out, editor_folder)
    process = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        cwd=ROOT,
        capture_output=True,
        timeout=600,
        env={**os.environ, "MV2V_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert KEPT & files(tmp_path / "edited.edit") == set(sorted(KEPT)[:3])
    # a temporary file is left of the mp4 under way
    assert not out.exists() and any(path.name.startswith(".") for path in tmp_path.iterdir())
    assert run.main([*arguments, "--resume", "--quiet"]) == 0
    assert files(tmp_path) == files(finished_edit[0])
    assert (tmp_path / "edited.mp4").read_bytes() == (finished_edit[0] / "edited.mp4").read_bytes()


@pytest.mark.parametrize(("limit", "code"), [(100, 2), (9_000, 3)])
def test_full_disk(tmp_path: Path, edit: Edit, capsys: Capture, limit: int, code: int) -> None:
    out = tmp_path / "edited.mp4"
    with largest_file(limit):
        assert edit(out, "--quiet") == code
    errors = capsys.readouterr().err
    assert errors.startswith("error: cannot write") and errors.count("\n") == 1
    assert not [name for name in files(tmp_path) if Path(name).name.startswith(".")]
    if code == 2:
        assert not files(tmp_path)
        return
    assert "windows are kept; continue with: python -m mv2v_engine.run edit" in errors
    assert edit(out, "--quiet", "--resume") == 0
    assert probe_video(out).num_frames == NUM_FRAMES


def test_resuming_a_finished_edit_makes_what_is_missing(
    edit: Edit, finished_edit: tuple[Path, str], copied: Path
) -> None:
    for name in ("edited.mp4", "edited.edit/overview.png", "edited.edit/report.json"):
        (copied / name).unlink()
    assert edit(copied / "edited.mp4", "--resume", "--quiet") == 0
    assert files(copied) == files(finished_edit[0])
    assert (copied / "edited.mp4").read_bytes() == (finished_edit[0] / "edited.mp4").read_bytes()


@pytest.mark.parametrize("damage", DAMAGES)
def test_resuming_finds_every_damaged_file(
    tmp_path: Path, edit: Edit, finished_edit: tuple[Path, str], capsys: Capture, damage: str
) -> None:
    """Each is made again to the same bits, or refused; none is taken for what it was."""
    whole, folder = finished_edit[0], tmp_path / "copy"
    for name, content in sorted(contents(whole).items()):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        spoilt = DAMAGES[damage](content)
        (folder / name).write_bytes(spoilt)
        code = edit(folder / "edited.mp4", "--resume", "--quiet")
        said = capsys.readouterr().err
        if name.endswith("session.json") and damage != "short":
            assert code == run.REFUSED and said.startswith(f"error: {folder / name} ")
            assert said.count("\n") == 1 and (folder / name).read_bytes() == spoilt
            continue
        assert code == 0, (name, said)
        assert said.startswith(f"{folder / name} cannot be read") == ("window" in name)
        assert (folder / "edited.mp4").read_bytes() == (whole / "edited.mp4").read_bytes()
        overview = "edited.edit/overview.png"
        assert (folder / overview).read_bytes() == (whole / overview).read_bytes()
        assert report_of(folder / "edited.mp4")["num_windows"] == 5


def test_another_video_in_the_edits_place_is_not_replaced(
    edit: Edit, copied: Path, capsys: Capture
) -> None:
    out = copied / "edited.mp4"
    mine = out.read_bytes() + b"of my own"
    out.write_bytes(mine)
    assert edit(out, "--resume", "--quiet") == run.REFUSED
    assert "is not the video that its edit wrote" in capsys.readouterr().err
    assert out.read_bytes() == mine


def test_the_overview_of_a_long_video_is_capped(
    edit: Edit, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, overview = copied / "edited.mp4", copied / "edited.edit" / "overview.png"
    whole = np.asarray(Image.open(overview))
    overview.unlink()
    written = out.stat().st_mtime_ns
    monkeypatch.setattr("mv2v_engine.engine.results.MAX_WINDOWS", 2)
    assert edit(out, "--resume", "--quiet") == 0
    # the video that is there is not made again
    assert out.stat().st_mtime_ns == written
    capped, row = np.asarray(Image.open(overview)), len(whole) // 10
    assert len(capped) == 4 * row
    assert (capped[26 : 2 * row] == whole[26 : 2 * row]).all()  # the first window
    assert (capped[2 * row :] == whole[8 * row :]).all()  # and the last
    assert (capped[:26] < 100).sum() > (whole[:26] < 100).sum()  # it says what is missing


def test_a_folder_of_images_letterboxed(tmp_path: Path, edit: Edit, capsys: Capture) -> None:
    (tmp_path / "frames").mkdir()
    for number in range(8, 13):
        pixels = np.full((*SIZE[::-1], 3), 20 * number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "frames" / f"{number}.png")
    out = tmp_path / "out.mp4"
    options = ("--fit", "letterbox", "--fps", "10", "--steps", "1", "--cuts", "none")
    assert edit(out, *options, clip=tmp_path / "frames") == 0
    said = capsys.readouterr().out
    assert "note: 5 images were taken at 10 a second\n" in said
    assert "between black bars of" in said
    assert (probe_video(out).num_frames, probe_video(out).fps) == (5, 10)
    source = report_of(out)["source"]
    assert source["notes"] == ["5 images were taken at 10 a second"]
