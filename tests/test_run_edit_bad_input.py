"""What `run edit` refuses: exit code 2, one line on stderr, and everything as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from mv2v_engine import run
from mv2v_engine.video.io import write_video
from tests.folders import refusal

Capture = pytest.CaptureFixture[str]
Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, long_clip: Path, editor_folder: Path, capsys: Capture) -> Refused:
    """Runs edit with something wrong; returns the one line that it ends with."""

    def check(
        *more: str,
        source: Path = long_clip,
        out: Path = tmp_path / "edited.mp4",
        checkpoint: Path | str = editor_folder,
    ) -> str:
        where = ["--out", str(out), "--checkpoint", str(checkpoint), "--device", "cpu"]
        words = ["edit", str(source), "--prompt", "a red ball", *where, *more]
        return refusal(capsys, tmp_path, *words)

    return check


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--cuts", "now"], "must be auto, none or frame numbers as 40,85, got 'now'"),
        (["--memory", "previous"], "invalid choice: 'previous'"),
        (["--steps", "0"], "--steps must lie in 1..1000, got 0"),
        (["--cross-shot-similarity", "2"], "--cross-shot-similarity must lie in -1..1, got 2"),
        (["--descriptor", "none"], "none holds no readable config.json"),
    ],
)
def test_wrong_options(refused: Refused, more: list[str], said: str) -> None:
    assert said in refused(*more)


def test_no_prompt(long_clip: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run.main(["edit", str(long_clip), "--out", str(tmp_path / "edited.mp4")]) == 2
    assert "the following arguments are required: --prompt" in capsys.readouterr().err


def test_a_model_of_the_other_task(refused: Refused, tiny_checkpoint: Path) -> None:
    assert "tiny renders novel views and takes no instruction" in refused(
        checkpoint=tiny_checkpoint
    )


def test_places_that_are_taken(refused: Refused, tmp_path: Path, long_clip: Path) -> None:
    assert "must name an mp4 to write" in refused(out=tmp_path / "edited")
    mine = tmp_path / "mine.mp4"
    shutil.copyfile(long_clip, mine)
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
    refused: Refused,
    tmp_path: Path,
    finished_edit: tuple[Path, str],
    moving_frames: Callable[..., Tensor],
) -> None:
    shutil.copytree(finished_edit[0], tmp_path, dirs_exist_ok=True)
    said = refused()
    assert "already holds an edit of 5 windows; continue it with --resume" in said
    differences = {
        "prompt 'a red ball' instead of 'the floor'": ["--prompt", "the floor"],
        "seed 0 instead of 1": ["--seed", "1"],
        "--max-memory 10 instead of 2": ["--max-memory", "2"],
        "whose cuts is []": ["--cuts", "9"],
    }
    for words_, more in differences.items():
        assert words_ in refused("--resume", *more)
    other = tmp_path / "other.mp4"
    write_video(other, moving_frames(23, seed=1), 12.5)
    assert "holds a session whose source is" in refused("--resume", source=other)
    # what it began with and nobody asks for now is another setting, too
    manifest = tmp_path / "edited.edit" / "session.json"
    content = json.loads(manifest.read_text())
    content["turns"][0]["settings"]["quantize_text"] = "int8"
    content.pop("sha256")
    manifest.write_text(json.dumps(content))
    assert "--quantize-text 'int8' instead of None" in refused("--resume")


def test_a_foreign_video_beside_an_unfinished_edit(
    refused: Refused, tmp_path: Path, finished_edit: tuple[Path, str]
) -> None:
    shutil.copytree(finished_edit[0], tmp_path, dirs_exist_ok=True)
    manifest = tmp_path / "edited.edit" / "session.json"
    content = json.loads(manifest.read_text())
    content["turns"][0] |= {"report": None, "windows": content["turns"][0]["windows"][:2]}
    content.pop("sha256")
    manifest.write_text(json.dumps(content))
    (tmp_path / "edited.mp4").write_bytes(b"of another origin")
    assert "is not finished; move that video away" in refused("--resume")
