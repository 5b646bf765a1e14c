"""From frames asked back to the tables of encoders and rankings, as small as they run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import history_frames
import memory_table
import pytest
import torch

from mv2v_engine.files import save_json, save_tensors


def run(*words: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["history_frames.py", *words])
        history_frames.main()


def test_frames_are_asked_back_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run measures nothing anew; other settings are refused."""
    generator = torch.Generator().manual_seed(0)
    for clip in range(3):
        source, edited = torch.randn(2, 3, 16, 5, 12, 20, generator=generator).half()
        save_tensors(
            tmp_path / "latents" / f"edit_{clip:07d}.safetensors",
            {
                "source": source.contiguous(),
                "edited": edited.contiguous(),
                "mask": torch.zeros(3, 5, 12, 20).half(),
                "text": torch.randn(4, 64, generator=generator).bfloat16(),
            },
        )
    monkeypatch.setattr(history_frames, "BRANCHES", ("both", "kernel"))
    monkeypatch.setattr(history_frames, "SAMPLING_STEPS", 1)
    monkeypatch.setattr(memory_table, "RESULTS", tmp_path)
    assert memory_table.NOTHING in memory_table.encoders().splitlines()[3]
    words = ["--edits", str(tmp_path / "latents"), "--work", str(tmp_path / "work")]
    words += ["--held-out", "2", "--batch", "1", "--windows", "3"]
    out = tmp_path / "history_frames.json"
    run(*words, "--steps", "1", "--out", str(out))
    found = json.loads(out.read_text())
    assert set(found["rows"]) == {"both", "no history", "kernel"}
    assert all(row["psnr"]["scenes"] == 2 for row in found["rows"].values())
    kernel, both = (found["rows"][name]["psnr"]["value"] for name in ("kernel", "both"))
    assert found["rows"]["kernel"]["both_over_it"]["value"] == pytest.approx(both - kernel)
    assert found["rows"]["no history"]["psnr"]["value"] != both
    monkeypatch.setattr(history_frames, "trained", None)  # nothing is trained again
    run(*words, "--steps", "1", "--out", str(out))
    assert json.loads(out.read_text())["rows"] == found["rows"]
    with pytest.raises(SystemExit, match="began with other settings"):
        run(*words, "--steps", "2")
    assert f"| {both:.2f} [" in memory_table.encoders().splitlines()[3]


def test_what_is_measured_stands_in_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_table, "RESULTS", tmp_path)
    cells = [line.split(" | ") for line in memory_table.rankings().splitlines()[2:]]
    assert len(cells) == 6 and all(memory_table.NOTHING in row for row in cells)
    told = {"value": 0.5, "ci": [0.25, 0.75], "scenes": 4}
    rows = {"coverage": {"shown": told, "of_the_oracles_gain_over_fov": told}}
    save_json(tmp_path / "rankings.json", {"rows": rows})
    nine = {"coverage_2": {"branches": {"choice": told}, "tokens": 650.0, "flops": 5e10}}
    save_json(tmp_path / "tiny_nvs_nine_turns.json", {"rows": nine})
    line = memory_table.rankings().splitlines()[3]
    assert line == (
        "| residual coverage | 0.500 [0.250, 0.750] | 0.50 [0.25, 0.75] "
        "| 0.5000 [0.2500, 0.7500] | 650 | 50.0 |"
    )
    # tokens by hand: two latent frames and 4x4 cells a token, of twenty frames of 12x20
    assert memory_table.encoders().splitlines()[3].split(" | ")[1] == "150"
