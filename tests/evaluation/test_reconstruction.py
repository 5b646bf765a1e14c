"""The command that measures a VAE."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mv2v_engine.evaluation import reconstruction


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["reconstruction", *map(str, words)])
    return reconstruction.main()


def test_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "reconstruction_psnr", lambda vae, worlds: [20.0, 26.0])
    out = tmp_path / "vae.json"
    assert run(monkeypatch, "--worlds", 1, "--out", out) == 0
    expected = {"psnr": 23.0, "psnr_lowest": 20.0, "psnr_highest": 26.0}
    assert json.loads(out.read_text()) == {"checkpoint": "tiny-nvs", "worlds": 1} | expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--worlds", 0), "--worlds: must be at least 1, got '0'"),
        (("--checkpoint", "nowhere"), "no checkpoint at 'nowhere'"),
    ],
)
def test_what_is_refused(
    words: tuple[object, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "vae.json"
    assert run(monkeypatch, *words, "--out", out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not out.exists()
