"""`run edit` end to end: a long video in, one of the same length out; resumed, refused, cut off."""

from __future__ import annotations

import contextlib
import io
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

ROOT = Path(__file__).resolve().parents[1]
WINDOW, SIZE = 5, (32, 48)
NUM_FRAMES, FPS = 23, 12.5  # five windows, the last of which begins within the fourth
PROMPT = "a red ball"
KEPT = {f"turns/turn_01/window_{number:05d}.safetensors" for number in range(1, 6)}

Capture = pytest.CaptureFixture[str]
Refused = Callable[..., str]


def moving(num_frames: int, seed: int = 0) -> Tensor:
    """uint8 [num_frames, 32, 48, 3]: a smooth picture that moves."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 6, generator=generator)
    (picture,) = torch.nn.functional.interpolate(coarse, SIZE, mode="bilinear")
    frames = torch.stack([picture.roll(number, -1) for number in range(num_frames)])
    return (frames * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Path:
    """A small random model that takes windows of 5 frames and reads 8 tokens."""
    return make_checkpoint(
        tmp_path_factory.mktemp("checkpoint") / "editor",
        name="editor",
        has_text=True,
        sampling={"num_frames": WINDOW, "size": SIZE, "num_inference_steps": 2},
        in_channels=32,
        source_channels=16,
        camera_conditioning="none",
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "long.mp4"
    write_video(path, moving(NUM_FRAMES), FPS)
    return path


def words(clip: Path, out: Path, checkpoint: Path | str, *more: str) -> list[str]:
    where = ["--out", str(out), "--checkpoint", str(checkpoint), "--device", "cpu"]
    return ["edit", str(clip), "--prompt", PROMPT, *where, *more]


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def report_of(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out.with_suffix(".edit") / "report.json").read_text())
    return report


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, clip: Path, editor: Path
) -> tuple[Path, str]:
    """The folder of an unbroken edit, and what was printed."""
    folder = tmp_path_factory.mktemp("finished")
    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        assert run.main(words(clip, folder / "edited.mp4", editor)) == 0
    assert errors.getvalue() == ""
    return folder, said.getvalue()


def test_five_windows(finished: tuple[Path, str], clip: Path) -> None:
    folder, _ = finished
    kept = {f"edited.edit/{name}" for name in (*KEPT, "session.json", "overview.png")}
    assert files(folder) == {"edited.mp4", "edited.edit/report.json", *kept}
    made, source = probe_video(folder / "edited.mp4"), probe_video(clip)
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


def test_the_overview(finished: tuple[Path, str], clip: Path) -> None:
    """Two rows a window, its source above its edit, each cell the frame that it says."""
    folder, _ = finished
    sheet = np.asarray(Image.open(folder / "edited.edit" / "overview.png"))
    scale, label = 320 // SIZE[1], 26
    height, width = SIZE[0] * scale, SIZE[1] * scale
    assert sheet.shape == (10 * (label + height + 4), 5 * (width + 4) + 4, 3)
    for line, video in enumerate((clip, folder / "edited.mp4")):
        frames = read_video(video).frames.numpy()
        for window, shown in ((0, (0, 1, 2, 3, 4)), (4, (20, 21, 22))):
            top = (2 * window + line) * (label + height + 4) + label
            for column, frame in enumerate(shown):
                left = 4 + column * (width + 4)
                cell = sheet[top : top + height : scale, left : left + width : scale]
                assert (cell == frames[frame]).all()


def test_what_is_printed(finished: tuple[Path, str]) -> None:
    folder, said = finished
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
        (["--memory", "none", "--seed", "3"], {"most": 0, "seed": 3}),
        (["--max-memory", "1", "--conditioning", "static"], {"most": 1, "mode": "static"}),
        (["--cuts", "10", "--steps", "1", "--guidance", "2"], {"shots": 2, "steps": 1}),
        (["--cuts", "none", "--cross-shot-similarity", "0.5"], {"shots": 1, "similarity": 0.5}),
    ],
)
def test_options_reach_the_windows(
    tmp_path: Path,
    clip: Path,
    editor: Path,
    finished: tuple[Path, str],
    options: list[str],
    expected: dict[str, Any],
) -> None:
    out = tmp_path / "out.mp4"
    assert run.main(words(clip, out, editor, *options, "--quiet")) == 0
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


def test_short_videos(tmp_path: Path, editor: Path) -> None:
    """Shorter than a window, down to one frame: repeated for the model, and cut back."""
    for count in (1, 3):
        clip, out = tmp_path / f"{count}.mp4", tmp_path / f"{count}_edited.mp4"
        write_video(clip, moving(count), FPS)
        assert run.main(words(clip, out, editor, "--quiet")) == 0
        assert probe_video(out).num_frames == count
        assert report_of(out)["num_windows"] == 1


def test_quiet_and_overwriting(tmp_path: Path, clip: Path, editor: Path, capsys: Capture) -> None:
    out = tmp_path / "edited.mp4"
    assert run.main(words(clip, out, editor, "--steps", "1", "--quiet")) == 0
    first, folder = out.read_bytes(), tmp_path / "edited.edit"
    (folder / "mine.txt").write_text("mine")
    capsys.readouterr()
    assert run.main(words(clip, out, editor, "--cuts", "6", "--overwrite", "--quiet")) == 0
    captured = capsys.readouterr()
    assert captured.out.split() == [
        str(out),
        str(folder / "overview.png"),
        str(folder / "report.json"),
    ]
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
    clip: Path,
    editor: Path,
    finished: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    out = tmp_path / "a folder" / "edited.mp4"
    with monkeypatch.context() as patch:
        patch.setattr("mv2v_engine.editing.turn_progress", interrupting)
        assert run.main(words(clip, out, editor)) == 130
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
    assert out.read_bytes() == (finished[0] / "edited.mp4").read_bytes()


KILLED = """
import contextlib, os, signal, sys
from mv2v_engine import editing, run
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

editing.turn_progress = killing
run.main(sys.argv[1:])
"""


def test_killed_and_resumed(
    tmp_path: Path, clip: Path, editor: Path, finished: tuple[Path, str]
) -> None:
    out = tmp_path / "edited.mp4"
    arguments = words(clip, out, editor)
    process = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        cwd=ROOT,
        capture_output=True,
        timeout=300,
        env={**os.environ, "MV2V_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert KEPT & files(tmp_path / "edited.edit") == set(sorted(KEPT)[:3])
    # of the mp4 under way, a temporary file is left
    assert not out.exists() and any(path.name.startswith(".") for path in tmp_path.iterdir())
    assert run.main([*arguments, "--resume", "--quiet"]) == 0
    assert files(tmp_path) == files(finished[0])
    assert (tmp_path / "edited.mp4").read_bytes() == (finished[0] / "edited.mp4").read_bytes()


@pytest.mark.parametrize(("limit", "code"), [(100, 2), (9_000, 3)])
def test_full_disk(
    tmp_path: Path, clip: Path, editor: Path, capsys: Capture, limit: int, code: int
) -> None:
    out = tmp_path / "edited.mp4"
    with largest_file(limit):
        assert run.main(words(clip, out, editor, "--quiet")) == code
    errors = capsys.readouterr().err
    assert errors.startswith("error: cannot write") and errors.count("\n") == 1
    assert not [name for name in files(tmp_path) if Path(name).name.startswith(".")]
    if code == 2:
        assert not files(tmp_path)
    else:
        assert "windows are kept; continue with: python -m mv2v_engine.run edit" in errors
    assert run.main(words(clip, out, editor, "--quiet", "--resume")) == 0
    assert probe_video(out).num_frames == NUM_FRAMES


def test_resuming_a_finished_edit_makes_what_is_missing(
    tmp_path: Path, clip: Path, editor: Path, finished: tuple[Path, str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    for name in ("edited.mp4", "edited.edit/overview.png", "edited.edit/report.json"):
        (folder / name).unlink()
    assert run.main(words(clip, folder / "edited.mp4", editor, "--resume", "--quiet")) == 0
    assert files(folder) == files(finished[0])
    assert (folder / "edited.mp4").read_bytes() == (finished[0] / "edited.mp4").read_bytes()


@pytest.fixture
def refused(tmp_path: Path, clip: Path, editor: Path, capsys: Capture) -> Refused:
    """Runs edit with something wrong; returns the one line that it ends with."""

    def check(
        *more: str,
        source: Path = clip,
        out: Path = tmp_path / "edited.mp4",
        checkpoint: Path | str = editor,
    ) -> str:
        before = contents(tmp_path)
        code = run.main(words(source, out, checkpoint, *more))
        captured = capsys.readouterr()
        assert code == 2, captured
        assert captured.out == ""
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
        assert contents(tmp_path) == before
        return captured.err

    return check


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--prompt", "  "], "an edit needs an instruction, got the prompt ' '"),
        (["--prompt", "a red ball " * 4], "the prompt has 13 tokens, the model reads 8; shorten"),
        (["--cuts", "now"], "auto, none or frame numbers as 40,85, got 'now'"),
        (["--cuts", "0"], "cuts must increase within 1..22, got [0]"),
        (["--cuts", "11,23"], "cuts must increase within 1..22, got [11, 23]"),
        (["--memory", "previous"], "invalid choice: 'previous'"),
        (["--steps", "0"], "num_inference_steps must lie in 1..1000, got 0"),
        (["--cross-shot-similarity", "2"], "cross_shot_similarity is a cosine, -1..1"),
        (["--descriptor", "none"], "none holds no readable config.json"),
        (["--device", "tpu"], "device 'tpu' cannot be used"),
    ],
)
def test_wrong_options(refused: Refused, more: list[str], said: str) -> None:
    assert said in refused(*more)


def test_no_prompt(clip: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run.main(["edit", str(clip), "--out", str(tmp_path / "edited.mp4")]) == 2
    assert "the following arguments are required: --prompt" in capsys.readouterr().err


def test_wrong_sources(refused: Refused, tmp_path: Path) -> None:
    assert "does not exist; give the path" in refused(source=tmp_path / "none.mp4")
    (tmp_path / "notes.mp4").write_text("not a video at all\n" * 50)
    assert "not a video" in refused(source=tmp_path / "notes.mp4")


def test_a_model_of_the_other_task(refused: Refused, tiny_checkpoint: Path, editor: Path) -> None:
    assert "tiny renders novel views and takes no instruction" in refused(
        checkpoint=tiny_checkpoint
    )


def test_a_folder_that_is_no_dinov2(refused: Refused, editor: Path) -> None:
    text_encoder = editor / "text_encoder"
    said = refused("--descriptor", str(text_encoder))
    assert "holds a model of type 'umt5', expected dinov2" in said


def test_places_that_are_taken(refused: Refused, tmp_path: Path, clip: Path) -> None:
    assert "must name an mp4 to write" in refused(out=tmp_path / "edited")
    mine = tmp_path / "mine.mp4"
    shutil.copyfile(clip, mine)
    assert "belongs to no edit; replace it with --overwrite" in refused(out=mine)
    for more in ([], ["--overwrite"]):
        assert "is the source itself" in refused(*more, source=mine, out=mine)
    (tmp_path / "edited.edit").mkdir()
    (tmp_path / "edited.edit" / "session.json").write_text('{"format": "browser"}')
    for more in ([], ["--resume"], ["--overwrite"]):
        assert "is no session of this engine" in refused(*more)
    (tmp_path / "other.edit").touch()
    assert "is in the way" in refused(out=tmp_path / "other.mp4")
    assert "cannot write into" in refused(out=mine / "edited.mp4")


def test_another_edit_is_not_resumed(
    refused: Refused, tmp_path: Path, clip: Path, finished: tuple[Path, str]
) -> None:
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    said = refused()
    assert "already holds an edit of 5 windows; continue it with --resume" in said
    differences = {
        "prompt 'a red ball' instead of 'the floor'": ["--prompt", "the floor"],
        "seed 0 instead of 1": ["--seed", "1"],
        "max_memory 10 instead of 2": ["--max-memory", "2"],
        "whose cuts is []": ["--cuts", "9"],
    }
    for words_, more in differences.items():
        assert words_ in refused("--resume", *more)
    other = tmp_path / "other.mp4"
    write_video(other, moving(NUM_FRAMES, seed=1), FPS)
    assert "holds a session whose source is" in refused("--resume", source=other)


def test_a_foreign_video_beside_an_unfinished_edit(
    refused: Refused, tmp_path: Path, finished: tuple[Path, str]
) -> None:
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    manifest = tmp_path / "edited.edit" / "session.json"
    content = json.loads(manifest.read_text())
    content["turns"][0] |= {"report": None, "windows": content["turns"][0]["windows"][:2]}
    manifest.write_text(json.dumps(content))
    assert "is not finished; move that video away" in refused("--resume")
