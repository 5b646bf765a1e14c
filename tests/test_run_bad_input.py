"""Whatever is wrong: exit code 2, one line on stderr, no traceback, nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
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


def test_truncated_clip(refused: Refused, tmp_path: Path, source_clip: Path) -> None:
    content = source_clip.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    assert "give a whole video file" in refused(clip=tmp_path / "cut.mp4")


def test_editing_model(refused: Refused, lucy_folder: Path, tmp_path: Path) -> None:
    # before the clip is looked at
    said = refused(checkpoint=lucy_folder, clip=tmp_path / "none.mp4")
    assert "lucy edits by instruction" in said and "use a checkpoint for novel views" in said


def test_a_longer_clip(refused: Refused, tmp_path: Path, source_frames: Tensor) -> None:
    clip = tmp_path / "clip.mp4"
    write_video(clip, source_frames.repeat(2, 1, 1, 1)[:12], 8)
    message = refused(clip=clip)
    assert "has 12 frames, the model's window is 9; choose --window first, middle" in message
    assert "unknown window '-1'" in refused("--window=-1", clip=clip)


@pytest.mark.parametrize(
    ("camera", "words"),
    [
        ("pan_rigth", "unknown camera 'pan_rigth'; nearest: pan_right"),
        ("none.json", "cannot read camera file none.json"),
    ],
)
def test_cameras(refused: Refused, camera: str, words: str) -> None:
    assert words in refused(camera=camera)
    assert words in refused("--source-camera", camera)
    assert words in refused("--camera", camera)  # the second, before the first turn


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


def test_components(refused: Refused, tmp_path: Path) -> None:
    assert "lacks a VAE" in refused("--components", str(tmp_path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "0"], "--steps must lie in 1..1000, got 0"),
        (["--steps", "many"], "error: --steps: must be an integer, got 'many'; see"),
        (["--seed", "-3"], "--seed must lie in"),
        (["--guidance", "-1"], "--guidance must lie in 0..100, got -1"),
        (["--prompt", "a ball"], "has no text encoder, got the prompt 'a ball'"),
        (["--memory", "all"], "--memory: invalid choice: 'all'"),
        (["--cache-bytes", "4 apples"], "--cache-bytes: must be a number of bytes, or one with KB"),
        (["--cache-bytes", "1KiB"], "9,216 bytes of latents, --cache-bytes allows 1,024; raise it"),
        (["--device", "gpu"], "device 'gpu' cannot be used"),
        (["--dtype", "int8"], "--dtype: invalid choice"),
        (["--backend", "triton"], "backend 'triton' was asked for, but it needs a CUDA device"),
        (["--reuse-refresh", "2"], "fewer --steps or a --step-cache save as much and lose less"),
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
    assert "2 finished turns (pan_right, arc_left), only 1 are asked for" in refused("--resume")
    more = ["--camera", "arc_left", "--steps", "4"]
    assert "--steps 3 instead of 4" in refused("--resume", *more)
    # something else is wrong: the old results stay
    refused("--overwrite", "--prompt", "a ball")
    refused("--overwrite", clip=session / "turn_01_pan_right.mp4")
    (session / "session.json").write_text("{")
    for option in ("--resume", "--overwrite"):
        assert "session.json cannot be read" in refused(option, "--camera", "arc_left")


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
