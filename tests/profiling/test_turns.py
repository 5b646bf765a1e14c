"""Whole turns in the benchmarks: their stages, their trace, and engines of random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_engine
import bench_stages
import pytest
import torch
from forwards import Setting
from random_parts import random_engine
from trace_turn import ranges, trace

from mv2v_engine import Engine
from mv2v_engine.checkpoints import load_checkpoint
from mv2v_engine.engine.denoise import Denoiser
from mv2v_engine.text import TextEncoder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows(tiny_checkpoint: Path) -> list[dict[str, Any]]:
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu")
    return list(bench_engine.engine_turns(engine, (0, 2), num_inference_steps=2))


def test_turns_of_both_configurations_take_turns(rows: list[dict[str, Any]]) -> None:
    assert [(row["config"], row["memory"]) for row in rows] == [
        ("joint, merged", 0),
        ("static", 0),
        ("joint, merged", 2),
        ("static", 2),
    ]
    for row in rows:
        assert row["steps"] == row["forwards"] == 2 and row["sampling_own"] > 0
        assert row["seconds"] == pytest.approx(sum(row["stages"].values()), rel=1e-3)
        assert set(row["peak_mib_by_stage"]) == {"vae", "text", "memory", "sampling"}
        # a session encodes its source once
        assert ("vae encode" in row["stages"]) == (row["memory"] == 0)
        assert {"text", "memory", "sampling", "vae decode"} <= set(row["stages"])


def test_shares_of_the_stages(rows: list[dict[str, Any]]) -> None:
    for row in bench_stages.measured([*rows, {"target": "no turn"}]):
        percent = [row[f"{name.replace(' ', '_')}_percent"] or 0 for name in bench_stages.STAGES]
        assert sum(percent) == pytest.approx(100, abs=0.2) and min(percent[2:]) > 0


def test_whole_turn_targets() -> None:
    def row(config: str, memory: int, own: float, forwards: int) -> dict[str, Any]:
        timed = {"sampling_own": own, "seconds": 140.0, "forwards": forwards}
        return {"config": config, "memory": memory} | timed

    rows = [row("static", 10, 3.0, 100), row("joint, merged", 0, 4.0, 20)]
    ratio, _, static = bench_engine.targets(rows, torch.device("cuda"))
    assert (ratio["measured"], ratio["met"]) == (0.75, True)
    assert (static["measured"], static["met"]) == (140.0, True)
    # fewer steps, or no GPU, are not what is asked for
    assert bench_engine.targets(rows, CPU)[2]["met"] is None
    rows[0]["forwards"] = 4
    assert bench_engine.targets(rows, torch.device("cuda"))[2]["met"] is None


def test_an_engine_of_random_weights(tiny_checkpoint: Path) -> None:
    """Guided turns, with a VAE and a text encoder that no file holds."""
    checkpoint = load_checkpoint(tiny_checkpoint)
    setting = Setting("random", checkpoint.transformer, checkpoint.sampling)
    assert checkpoint.vae_path is not None
    vae = json.loads((checkpoint.vae_path / "config.json").read_text())
    fields = {name: value for name, value in vae.items() if not name.startswith("_")}
    engine = random_engine(setting, fields)
    assert isinstance(engine.text, TextEncoder)
    request = {"num_inference_steps": 2, "guidance_scale": 5.0, "prompt": "a"}
    joint, static = bench_engine.engine_turns(engine, (0,), **request)
    assert joint["forwards"] == static["forwards"] == 4
    (alone, _) = bench_engine.denoised_turns(setting, (0,), steps=2, guidance=5.0)
    assert (alone["forwards"], alone["tflop"]) == (4, joint["tflop"])


def test_a_trace_names_stages_steps_and_blocks(engine: Engine, tmp_path: Path) -> None:
    step, transformer = Denoiser.step, engine.transformer
    engine.text_embedding("")
    trace(engine, tmp_path / "trace.json", memory=1, steps=2)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event.get("cat") == "user_annotation"]
    named = {name: [s for s in spans if s["name"] == name] for name in {s["name"] for s in spans}}
    assert {"vae", "text", "memory", "sampling", "step", "forward", "block 0"} <= set(named)
    (sampling,) = named["sampling"]
    assert len(named["step"]) == len(named["forward"]) == len(named["block 2"]) == 2
    for inner in (*named["step"], *named["block 0"]):
        assert sampling["ts"] <= inner["ts"]
        assert inner["ts"] + inner["dur"] <= sampling["ts"] + sampling["dur"] + 1
    # nothing stays wrapped
    assert Denoiser.step is step and "forward" not in vars(transformer)
    assert all("forward" not in vars(block) for block in transformer.blocks)


def test_ranges_end_with_an_error(engine: Engine) -> None:
    with pytest.raises(ValueError, match="toy"), ranges(engine.transformer):
        assert "forward_samples" in vars(engine.transformer)
        raise ValueError("toy")
    assert "forward_samples" not in vars(engine.transformer)
