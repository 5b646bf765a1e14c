"""From frames asked back to the tables of encoders and rankings, as small as they run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import history_frames
import memory_table
import pytest
import torch
from PIL import Image

from mv2v_engine.files import save_json, save_tensors
from mv2v_engine.synthetic.cameras import scene_cameras
from mv2v_engine.training.latents import save_latents


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
    monkeypatch.setattr(history_frames.EditStudy, "encoders", ("both", "kernel"))
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


def test_views_are_asked_back_from_each_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of worlds by their seeds, judged where the remembered cameras see what is asked for."""
    generator, folder = torch.Generator().manual_seed(0), tmp_path / "latents"
    for seed in range(3):
        poses = torch.stack([each.poses for each in scene_cameras(seed, num_cameras=5)])
        latents = torch.randn(5, 16, 5, 12, 20, generator=generator)
        save_latents(folder / f"scene_plain_{seed:07d}.safetensors", latents, poses)
    monkeypatch.setattr(history_frames.ViewStudy, "encoders", ("kernel", "view"))
    monkeypatch.setattr(history_frames, "SAMPLING_STEPS", 1)
    monkeypatch.setattr(memory_table, "RESULTS", tmp_path)
    assert memory_table.NOTHING in memory_table.view_encoders().splitlines()[2]
    out, picture = tmp_path / "memory_encoders.json", tmp_path / "encoders.png"
    words = ["--latents", str(folder), "--work", str(tmp_path / "work"), "--steps", "1"]
    words += ["--held-out", "1", "--batch", "1", "--out", str(out), "--picture", str(picture)]
    run(*words)
    found = json.loads(out.read_text())
    rows = found["rows"]
    assert set(rows) == {"kernel", "no history", "view", "view, read"}
    assert {row["tokens"] for row in rows.values()} == {90}
    assert rows["view"]["psnr"]["value"] != rows["view"]["psnr_everywhere"]["value"]
    kernel, view = (rows[name]["psnr"]["value"] for name in ("kernel", "view"))
    assert rows["view"]["kernel_over_it"]["value"] == pytest.approx(kernel - view)
    # 90 tokens of 144 numbers; the latents of three videos of two latent frames
    assert rows["kernel"]["kept_bytes"] == 4 * 90 * 144
    assert rows["view"]["kept_bytes"] == 4 * 16 * 6 * 12 * 20
    with Image.open(picture) as image:
        assert image.width > image.height
    table = memory_table.view_encoders().splitlines()
    assert f"| {kernel:.2f} [" in table[2] and f"| {view:.2f} [" in table[5]
    assert memory_table.NOTHING in table[3]  # TinyHistory was left out
    last = folder / "scene_plain_0000002.safetensors"
    for name, message in (
        ("scene_plain_0000003", "other cameras than world 3"),
        ("scene_x", "named after no world"),
    ):
        last = last.rename(folder / f"{name}.safetensors")
        with pytest.raises(SystemExit, match=message):
            run(*words[:-4])


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
