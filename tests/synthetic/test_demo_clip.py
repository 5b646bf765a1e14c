"""The demo's clip: the embedded model's window, of a world that it never saw."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mv2v_engine.synthetic import demo_clip
from mv2v_engine.video.io import read_video


def test_the_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / "made" / f"{name}.mp4" for name in ("one", "again", "other")]
    seeds: list[list[str]] = [[], [], ["--seed", "1000034"]]
    for path, more in zip(paths, seeds, strict=True):
        monkeypatch.setattr("sys.argv", ["demo_clip", "--out", str(path), *more])
        assert demo_clip.main() == 0
    clip = read_video(paths[0])
    assert clip.frames.shape == (17, 96, 160, 3) and clip.fps == 8
    assert demo_clip.DEMO_WORLD >= 1_000_000
    # something moves while the camera stands still
    assert (clip.frames[0].float() - clip.frames[8].float()).abs().max() > 60
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert not torch.equal(read_video(paths[2]).frames, clip.frames)


def test_an_unwritable_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["demo_clip", "--out", str(tmp_path / "file" / "clip.mp4")])
    assert demo_clip.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot write") and error.count("\n") == 1
