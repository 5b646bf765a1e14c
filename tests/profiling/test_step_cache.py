"""Approximate turns are held against the exact turn of the same noise, memory and conditioning."""

from __future__ import annotations

from pathlib import Path

from bench_step_cache import Setting, measure, settings

from mv2v_engine import Engine


def test_every_setting_has_its_exact_turn() -> None:
    found = settings(20)
    names = [setting.name for setting in found]
    assert len(set(names)) == len(names)
    for setting in found:
        # the exact one is measured first
        assert names.index(setting.against) <= names.index(setting.name)
        exact = found[names.index(setting.against)].changes
        assert exact.items() <= setting.changes.items()


def test_settings_against_exact_turns(tiny_checkpoint: Path) -> None:
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu")
    chosen = [
        Setting("joint", {}, "joint"),
        Setting("fewer", {}, "joint", 2),
        Setting("closed", {"step_cache": 0.0}, "joint"),
        Setting("open", {"step_cache": 9.0}, "joint"),
    ]
    joint, fewer, closed, skipped = measure(engine, chosen, range(2_000_000, 2_000_001), 4)
    assert joint["psnr"] is None and joint["flop_ratio"] == joint["time_ratio"] == 1
    assert joint["memory"] == closed["memory"] == 4 and joint["whole"] == joint["computed"] == 4
    assert (fewer["computed"], fewer["flop_ratio"]) == (2, 0.5)
    # bit for bit: as good as this measure can say
    assert closed["latents"] == 0 and closed["psnr"] == closed["worst_psnr"] > 78
    assert skipped["computed"] == 2 and skipped["flop_ratio"] < 1 and skipped["psnr"] < 78
    assert skipped["first_scene"]["steps_computed"] == [0, 3]
