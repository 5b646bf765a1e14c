"""From frames asked back to the tables of encoders and rankings, as small as they run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import history_edits
import history_frames
import memory_models
import memory_study
import memory_table
import pytest
import torch
from PIL import Image

from mv2v_engine.evaluation.edit_clip import ClipResult
from mv2v_engine.evaluation.edit_protocol import EditProtocol
from mv2v_engine.files import save_json, save_tensors
from mv2v_engine.synthetic.cameras import scene_cameras
from mv2v_engine.training.latents import save_latents


def run(module: ModuleType, *words: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *words])
        module.main()


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
    monkeypatch.setattr(history_frames, "ENCODERS", ("both", "kernel"))
    monkeypatch.setattr(memory_models, "SAMPLING_STEPS", 1)
    words = ["--edits", str(tmp_path / "latents"), "--work", str(tmp_path / "work")]
    words += ["--held-out", "2", "--batch", "1", "--windows", "3"]
    out = tmp_path / "history_frames.json"
    run(history_frames, *words, "--steps", "1", "--out", str(out))
    found = json.loads(out.read_text())
    assert set(found["rows"]) == {"both", "no history", "kernel"}
    assert all(row["psnr"]["scenes"] == 2 for row in found["rows"].values())
    kernel, both = (found["rows"][name]["psnr"]["value"] for name in ("kernel", "both"))
    assert found["rows"]["kernel"]["both_over_it"]["value"] == pytest.approx(both - kernel)
    assert found["rows"]["no history"]["psnr"]["value"] != both
    monkeypatch.setattr(history_frames, "trained", None)  # nothing is trained again
    run(history_frames, *words, "--steps", "1", "--out", str(out))
    assert json.loads(out.read_text())["rows"] == found["rows"]
    with pytest.raises(SystemExit, match="began with other settings"):
        run(history_frames, *words, "--steps", "2")
    monkeypatch.setattr(memory_table, "RESULTS", tmp_path)
    (line,) = (
        line
        for line in memory_table.encoders_and_rankings().splitlines()
        if "| TinyHistory |" in line
    )
    assert f"| {both:.2f} [" in line


def test_a_camera_comes_back_by_each_encoder_and_ranking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One world, one step; a second run trains, films and makes nothing anew."""
    generator, folder = torch.Generator().manual_seed(0), tmp_path / "latents"
    for seed in range(2):
        poses = torch.stack([each.poses for each in scene_cameras(seed, num_cameras=5)])
        latents = torch.randn(5, 16, 5, 12, 20, generator=generator)
        save_latents(folder / f"scene_plain_{seed:07d}.safetensors", latents, poses)
    for module in (memory_study, memory_models):
        monkeypatch.setattr(module, "SAMPLING_STEPS", 1)
    monkeypatch.setattr(memory_study, "PICTURED", ("patches", "view"))
    out, picture = tmp_path / "memory_study.json", tmp_path / "encoders.png"
    words = ["--latents", str(folder), "--work", str(tmp_path / "work"), "--steps", "1"]
    words += ["--batch", "1", "--worlds", "1", "--encoders", "patches", "view"]
    words += ["--out", str(out), "--picture", str(picture)]
    run(memory_study, *words)
    rows = json.loads(out.read_text())["rows"]
    patches = set(rows["patches"]) - {"took"}
    assert patches == {*memory_table.RANKINGS, "nothing", "all"}
    assert set(rows["view"]) == {"fov", "took"}
    found = {name: rows["patches"][name]["tokens"] for name in patches}
    # two videos of five frames of 3x5 tokens; of eight, five have 2x3
    assert found == dict.fromkeys(patches, 150) | {"nothing": 0, "all": 375}
    assert rows["view"]["fov"]["tokens"] == 150
    base, view = rows["patches"]["fov"], rows["view"]["fov"]
    assert view["psnr_below_patches"]["value"] == pytest.approx(
        base["psnr"]["value"] - view["psnr"]["value"]
    )
    ratio = view["return"]["value"] / base["return"]["value"]
    assert view["return_of_patches"]["value"] == pytest.approx(ratio)
    kept = 4 * 8 * 16 * 5 * 12 * 20  # latents of eight turns; a latent of views beside
    assert rows["patches"]["took"]["kept_bytes"] == kept
    assert rows["view"]["took"]["kept_bytes"] == kept + 4 * 150 * 96
    with Image.open(picture) as image:
        assert image.width > image.height
    for name in ("trained", "World"):
        monkeypatch.setattr(memory_study, name, None)
    out.unlink()
    run(memory_study, *words)
    assert json.loads(out.read_text())["rows"] == rows
    with pytest.raises(SystemExit, match="began with other settings"):
        run(memory_study, *words, "--batch", "2")


def test_long_edits_are_set_against_todays_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clip by clip; what was measured is not measured again."""

    class Evaluator:
        def __init__(self, engine: str, protocol: EditProtocol) -> None:
            self.rows = protocol.rows

        def measure(self, seed: int) -> ClipResult:
            own = {"memory": 4.0, "history": 2.0, "history_1": 1.0}
            values = {
                row: dict.fromkeys(history_edits.MEASURES, own.get(row, 8.0) + seed % 2)
                for row in self.rows
            }
            return ClipResult({"rows": values}, {}, None, ())  # type: ignore[arg-type]

    monkeypatch.setattr(history_edits, "ClipEvaluator", Evaluator)
    out = tmp_path / "history_edits.json"
    words = ["--models", "both=tiny-edit", "--work", str(tmp_path / "work"), "--clips", "2"]
    run(history_edits, *words, "--out", str(out))
    rows = json.loads(out.read_text())["rows"]
    assert set(rows["tiny-edit"]) == {"independent", "memory", "recent_2"}
    ratio = rows["both"]["history"]["subject_error_ratio"]
    assert ratio["value"] == pytest.approx(2.5 / 4.5)
    assert "subject_error_ratio" not in rows["tiny-edit"]["memory"]
    monkeypatch.setattr(history_edits, "ClipEvaluator", None)
    run(history_edits, *words)
    monkeypatch.setattr(memory_table, "RESULTS", tmp_path)
    lines = {
        line.split(" | ")[0][2:]: line
        for line in memory_table.encoders_and_rankings().splitlines()[2:]
    }
    assert "| 2.500 [2.000, 3.000] | 2.50 [2.00, 3.00] |" in lines["TinyHistory"]
    whole = lines["TinyHistory, and the last frame whole"]
    # four windows of five frames, two of them and 4x4 cells a token, and 6x10 of one frame
    assert "| 210 |" in whole and "| 1.500 [1.000, 2.000] |" in whole
    assert "| 8.500 [8.000, 9.000] |" in lines["*nothing remembered*"]
    assert lines["a recurrent state"].count(memory_table.NOTHING) == 6


def test_what_is_measured_stands_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_table, "RESULTS", tmp_path)
    cells = [line.split(" | ") for line in memory_table.rankings().splitlines()[2:]]
    assert len(cells) == 5 and all(memory_table.NOTHING in row[1] for row in cells)
    told = {"value": 0.5, "ci": [0.25, 0.75], "scenes": 4}
    rows = {"coverage": {"shown": told, "of_the_oracles_gain_over_fov": told}}
    save_json(tmp_path / "rankings.json", {"rows": rows})
    line = memory_table.rankings().splitlines()[3]
    assert line == "| by residual coverage | 0.500 [0.250, 0.750] | 0.50 [0.25, 0.75] |"
    own = {"tokens": 150.0, "flops": 5e10, "psnr": told, "return": told}
    took = {"encode_flops": 0, "kept_bytes": 614400}
    study = {"patches": {"fov": own, "random": own, "took": took}}
    save_json(tmp_path / "memory_study.json", {"rows": study})
    lines = memory_table.encoders_and_rankings().splitlines()[2:]
    start = "| 150 | 50.0 | in the turn | 614 | 0.50 [0.25, 0.75] | 0.5000 [0.2500, 0.7500] |"
    assert lines[0].startswith(f"| patches by rank {start}")
    (random,) = (line for line in lines if "at random" in line)
    assert random.startswith(f"| patches, at random {start} {memory_table.NO_CAMERAS} |")
