"""Whatever is wrong: exit code 2, one line on stderr, no traceback, nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mv2v_engine import run
from mv2v_engine.testing import largest_file
from mv2v_engine.video.io import write_video
from tests.folders import refusal

Capture = pytest.CaptureFixture[str]
Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, source_clip: Path, tiny_checkpoint: Path, capsys: Capture) -> Refused:
    """Runs novel-view with something wrong; returns the one line that it ends with."""

    def check(
        *more: str,
        clip: Path = source_clip,
        camera: str = "pan_right",
        checkpoint: Path | str = tiny_checkpoint,
        out: Path = tmp_path / "out",
    ) -> str:
        where = ["--out", str(out), "--device", "cpu", "--checkpoint", str(checkpoint)]
        words = ["novel-view", str(clip), "--camera", camera, *where, *more]
        return refusal(capsys, tmp_path, *words)

    return check


def test_missing_clip(refused: Refused, tmp_path: Path) -> None:
    assert "does not exist; give the path" in refused(clip=tmp_path / "none.mp4")


def test_truncated_clip(refused: Refused, tmp_path: Path, source_clip: Path) -> None:
    content = source_clip.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    assert "give a whole video file" in refused(clip=tmp_path / "cut.mp4")


def test_editing_model(refused: Refused, lucy_folder: Path, tmp_path: Path) -> None:
    # before the clip is looked at
    said = refused(checkpoint=lucy_folder, clip=tmp_path / "none.mp4")
    assert "lucy edits by instruction" in said and "use a checkpoint for novel views" in said


@pytest.mark.parametrize("window", [[], ["--window", "pad"]])
def test_one_frame(
    refused: Refused, tmp_path: Path, source_frames: Tensor, window: list[str]
) -> None:
    write_video(tmp_path / "still.mp4", source_frames[:1], 8)
    assert "has 1 frame, at least 2" in refused(*window, clip=tmp_path / "still.mp4")


def test_large_frames(refused: Refused, tmp_path: Path) -> None:
    write_video(tmp_path / "large.mp4", torch.zeros(9, 2176, 3840, 3, dtype=torch.uint8), 8)
    assert "3840x2176 (8.4 MP); at most 8.3 MP" in refused(clip=tmp_path / "large.mp4")


@pytest.mark.parametrize(
    ("count", "window", "words"),
    [
        (12, None, "has 12 frames, the model's window is 9; choose --window first, middle"),
        (5, None, "has 5 frames, the model's window is 9; choose --window pad"),
        (5, "first", "choose --window pad"),
        (12, "pad", "choose --window first"),
        (12, "-1", "unknown window '-1'"),
    ],
)
def test_windows(
    refused: Refused,
    tmp_path: Path,
    source_frames: Tensor,
    count: int,
    window: str | None,
    words: str,
) -> None:
    write_video(tmp_path / "clip.mp4", source_frames.repeat(2, 1, 1, 1)[:count], 8)
    more = [] if window is None else [f"--window={window}"]
    assert words in refused(*more, clip=tmp_path / "clip.mp4")


@pytest.mark.parametrize(
    ("camera", "words"),
    [
        ("pan_rigth", "unknown camera 'pan_rigth'; nearest: pan_right"),
        ("pan:fast", "amounts must be finite numbers"),
        ("none.json", "cannot read camera file none.json"),
        ("", "unknown camera ''"),
    ],
)
def test_cameras(refused: Refused, camera: str, words: str) -> None:
    assert words in refused(camera=camera)
    assert words in refused("--source-camera", camera)
    assert words in refused("--camera", camera)  # the second, before the first turn


def test_misspelt_checkpoint(refused: Refused) -> None:
    assert "no checkpoint at 'tiny-nsv'" in refused(checkpoint="tiny-nsv")


@pytest.fixture
def copied(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def test_wrong_checkpoint(refused: Refused, tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(3, 3)}, tmp_path / "resnet.safetensors")
    message = refused(checkpoint=tmp_path / "resnet.safetensors")
    assert "holds no Wan transformer (first keys: conv1.weight)" in message
    (tmp_path / "notes.safetensors").write_text("not weights")
    refused(checkpoint=tmp_path / "notes.safetensors")


def test_missing_parts(refused: Refused, copied: Path) -> None:
    shutil.rmtree(copied / "vae")
    assert "holds no VAE" in refused(checkpoint=copied)
    (copied / "transformer.safetensors").unlink()
    assert "no transformer.safetensors" in refused(checkpoint=copied)


def test_mismatched_shapes(refused: Refused, copied: Path) -> None:
    weights = copied / "transformer.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"proj_out.weight": torch.zeros(8, 48)}, weights)
    assert "proj_out.weight got [8, 48], expected [64, 48]" in refused(checkpoint=copied)
    del tensors["proj_out.bias"]
    save_file(tensors, weights)
    assert "lacks 1 parameters: proj_out.bias" in refused(checkpoint=copied)


def test_components(refused: Refused, tmp_path: Path) -> None:
    assert "lacks a VAE" in refused("--components", str(tmp_path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "0"], "--steps must lie in 1..1000, got 0"),
        (["--steps", "many"], "error: --steps: must be an integer, got 'many'; see"),
        (["--seed", "-3"], "--seed must lie in"),
        (["--guidance", "nan"], "error: --guidance: must be a finite number, got 'nan'; see"),
        (["--guidance", "-1"], "--guidance must lie in 0..100, got -1"),
        (["--guidance", "5"], "has no text encoder, so guidance changes nothing"),
        (["--prompt", "a ball"], "has no text encoder, got the prompt 'a ball'"),
        (["--memory", "all"], "--memory: invalid choice: 'all'"),
        (["--max-memory", "-1"], "--max-memory must be at least 0, got -1"),
        (["--merge-fraction", "1.5"], "--merge-fraction must lie in 0..1, got 1.5"),
        (["--fov-radius", "0"], "--fov-radius must be positive, got 0"),
        (["--cache-bytes", "4 apples"], "--cache-bytes: must be a number of bytes, or one with KB"),
        (["--cache-bytes", "1KiB"], "9,216 bytes of latents, --cache-bytes allows 1,024; raise it"),
        (
            ["--device-cache-bytes", "8GiB"],
            "give 0..4,294,967,296 or raise --cache-bytes, got 8,589",
        ),
        (["--device", "gpu"], "device 'gpu' cannot be used"),
        (["--dtype", "int8"], "--dtype: invalid choice"),
        (["--backend", "triton"], "backend 'triton' was asked for, but it needs a CUDA device"),
        (["--reuse", "approximate"], "approximate reuse of joint conditioning is gone: fewer"),
        (["--reuse-refresh", "2"], "fewer --steps or a --step-cache save as much and lose less"),
        (["--step-cache", "-1"], "--step-cache must be at least 0, got -1"),
        (["--size", "160x96"], "not 160x96; ask for that: --fit letterbox brings the whole source"),
        (["--size", "large"], "height x width as 480x832, got 'large'"),
        (["--rename", "names.json"], "names.json"),
        (["--resume", "--overwrite"], "not allowed with argument"),
        (["--colour", "red"], "unrecognized arguments"),
    ],
)
def test_options(refused: Refused, options: list[str], words: str) -> None:
    assert words in refused(*options)


@pytest.mark.parametrize("arguments", [[], ["novel-view"], ["edit"], ["inspect", "none"]])
def test_commands(arguments: list[str], capsys: Capture) -> None:
    assert run.main(arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1


def test_unwritable_places(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        assert "Not a directory; choose another folder" in refused(out=out)


@pytest.fixture
def session(tmp_path: Path, source_clip: Path, tiny_checkpoint: Path, capsys: Capture) -> Path:
    """A folder that holds a session of two turns."""
    out = tmp_path / "out"
    cameras = ["--camera", "pan_right", "--camera", "arc_left"]
    where = ["--out", str(out), "--checkpoint", str(tiny_checkpoint)]
    assert run.main(["novel-view", str(source_clip), *cameras, *where]) == 0
    capsys.readouterr()
    return out


def test_a_taken_folder(refused: Refused, session: Path) -> None:
    message = refused()
    assert "already holds a session of 2 turns; continue it with --resume" in message
    # something else is wrong: the old results stay
    refused("--overwrite", "--prompt", "a ball")
    refused("--overwrite", clip=session / "turn_01_pan_right.mp4")
    (session / "session.json").write_text("{")
    for option in ("--resume", "--overwrite"):
        assert "session.json cannot be read" in refused(option, "--camera", "arc_left")


def test_other_turns_are_not_resumed(
    refused: Refused, session: Path, tmp_path: Path, source_frames: Tensor
) -> None:
    assert "2 finished turns (pan_right, arc_left), only 1 are asked for" in refused("--resume")
    for words, more in {
        "its turn 2 has camera 'arc_left' instead of 'pan_left'": ["--camera", "pan_left"],
        "--steps 3 instead of 4": ["--camera", "arc_left", "--steps", "4"],
        "source camera is 'static'": ["--camera", "arc_left", "--source-camera", "zoom_in"],
    }.items():
        assert words in refused("--resume", *more)
    write_video(tmp_path / "other.mp4", 255 - source_frames, 8)
    message = refused("--resume", "--camera", "arc_left", clip=tmp_path / "other.mp4")
    assert "whose source is" in message


@pytest.mark.parametrize(
    ("limit", "code", "file"),
    [
        (100, 2, "session.json"),
        (6_000, 3, "turn_01.safetensors"),
        (11_000, 3, "turn_01_pan_right.mp4"),
        (60_000, 3, "overview.png"),
    ],
)
def test_full_disk(
    tmp_path: Path,
    source_clip: Path,
    tiny_checkpoint: Path,
    capsys: Capture,
    limit: int,
    code: int,
    file: str,
) -> None:
    out = tmp_path / "out"
    cameras = ["--camera", "pan_right", "--camera", "arc_left"]
    where = ["--out", str(out), "--checkpoint", str(tiny_checkpoint), "--device", "cpu"]
    arguments = ["novel-view", str(source_clip), *cameras, *where]
    with largest_file(limit):
        assert run.main(arguments) == code
    errors = capsys.readouterr().err
    assert errors.startswith("error: cannot write") and errors.count("\n") == 1
    assert file in errors and "File too large" in errors
    # nothing is there in half, and with room the session goes on
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]
    assert run.main([*arguments, "--resume"]) == 0
    assert len(json.loads((out / "report.json").read_text())["turns"]) == 2
