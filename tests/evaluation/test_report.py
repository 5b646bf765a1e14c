"""Summaries of made-up scenes, whose answers are known."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from mv2v_engine.evaluation.protocol import Protocol
from mv2v_engine.evaluation.report import markdown, summarise

ROWS = ("independent", "previous", "memory", "memory_merged")
PROTOCOL = Protocol(scenes=4, rows=ROWS)
NINE = Protocol(scenes=4, grade="furnished", turns=9)


def _turn(psnr: float, **changes: Any) -> dict[str, Any]:
    names = ("psnr", "unseen_psnr", "ssim", "rotation_error", "translation_error", "flicker")
    cost = {"tokens": 600, "flops": 10**9, "seconds": 0.5, "memory": 0}
    plain = dict.fromkeys(names, 0.5) | {"source_psnr": psnr, "camera_error": 2.0} | cost
    plain |= {"turn": "1", "energy": 3.0, "source_energy": 2.0, "unseen_energy": 1.0}
    return plain | changes


def _row(*l1: float, psnr: float = 20.0) -> dict[str, Any]:
    names = ("1-2", "1-3", "2-3")
    pairs = {n: {"l1": v, "features": 2 * v} for n, v in zip(names, l1, strict=True)}
    return {"turns": [_turn(psnr)] * 3, "pairs": pairs}


def _scenes() -> list[dict[str, Any]]:
    scenes = []
    for scale in (1.0, 2.0, 3.0, 6.0):
        rows = {
            "independent": _row(0.1 * scale, 0.1 * scale, 0.1 * scale),
            "previous": _row(0.02 * scale, 0.1 * scale, 0.02 * scale),
            "memory": _row(0.03 * scale, 0.05 * scale, 0.04 * scale, psnr=19.9),
            "memory_merged": _row(0.03 * scale, 0.06 * scale, 0.04 * scale, psnr=19.9),
        }
        table = {"1 vs 2-8": {"pearson": 0.1 * scale, "spearman": 0.2, "bottom_half": 0.5}}
        best = _row(0.01, 0.01, 0.01)
        best["turns"] = [_turn(30.0, energy=6.0)] * 3
        references = {"truth": _row(0.01, 0.01, 0.01), "vae": best}
        scenes.append({"rows": rows, "references": references, "responsiveness": table})
    return scenes


def _results(scenes: list[dict[str, Any]]) -> dict[str, Any]:
    settings = {"grade": "plain", "turns": 3, "steps": 10, "trained_for_memory": True}
    return {
        **summarise(scenes, PROTOCOL),
        "settings": settings,
        "engine": {"checkpoint": "tiny", "device": "cpu"},
        "merging_saves": {"small": {"4": 0.21}, "large": {"4": 0.328}},
    }


def test_means_and_intervals() -> None:
    results = _results(_scenes())
    independent = results["rows"]["independent"]
    assert results["scenes"] == 4 and list(results["rows"]) == list(ROWS)
    assert independent["consistency"] == pytest.approx(0.3)
    low, high = independent["consistency_ci"]
    assert 0.1 <= low < 0.3 < high <= 0.6
    assert independent["features"] == pytest.approx(0.6)
    memory = results["rows"]["memory"]
    assert memory["pairs"]["1-3"]["value"] == pytest.approx(0.15)
    # turn 3 against turns 1 and 2
    assert memory["by_turn"]["3"]["value"] == pytest.approx(0.135)
    assert (memory["tokens"], memory["flops"], memory["seconds"]) == (600, 1e9, 0.5)
    assert "tokens" not in results["references"]["truth"]
    assert results["responsiveness"]["1 vs 2-8"]["pearson"]["value"] == pytest.approx(0.3)


def test_sharpness_is_of_all_turns_together() -> None:
    scenes = _scenes()
    for scene in scenes:
        turns = [_turn(20.0, turn=name, energy=energy) for name, energy in (("1", 9.0), ("2", 1.0))]
        best = [_turn(30.0, turn=name, energy=energy) for name, energy in (("2", 0.1), ("1", 9.9))]
        scene["rows"]["memory"]["turns"], scene["references"]["vae"]["turns"] = turns, best
        for name in ("independent", "previous", "memory_merged"):
            scene["rows"][name]["turns"] = turns
        scene["references"]["truth"]["turns"] = best
    # ten times too much in a turn that has next to nothing
    assert _results(scenes)["rows"]["memory"]["sharpness"] == pytest.approx(1)


def test_targets_compare_scene_by_scene() -> None:
    found = _results(_scenes())["targets"]
    # every scene has the same ratio, however different the scenes are
    ratio = found["memory / independent"]
    assert ratio["value"] == pytest.approx(0.4) and ratio["ci"] == pytest.approx([0.4, 0.4])
    assert ratio["met"] and ratio["at_most"] == 0.5
    psnr = found["PSNR where seen, dB"]
    assert psnr["value"] == pytest.approx(19.9) and psnr["at_least"] == 26 and not psnr["met"]
    sharpness = found["gradient energy / truth through the VAE"]
    assert sharpness["value"] == pytest.approx(0.5) and not sharpness["met"]
    assert (sharpness["at_least"], sharpness["at_most"]) == (0.85, 1.1)
    merged = found["merged / memory"]
    assert merged["value"] == pytest.approx(0.13 / 0.12, rel=1e-4) and not merged["met"]
    assert "static / memory" not in found
    assert "memory / independent, loop closure" not in found


def _last(**l1: float) -> dict[str, Any]:
    """A row's last turns of nine against two earlier ones, which see 100 and 300 pixels."""
    pairs = {
        f"{earlier}-{later}": {"l1": value * scale, "features": 0.1, "pixels": pixels}
        for later, value in l1.items()
        for earlier, scale, pixels in (("1", 1.0, 300), ("4", 2.0, 100))
    }
    return {"turns": [_turn(20.0)] * 2, "pairs": pairs}


def test_rankings_are_compared_by_pixels_and_by_branch() -> None:
    rows = {
        "independent": _last(**{"9": 0.2, "detour": 0.2}),
        "memory": _last(**{"9": 0.06, "detour": 0.1}),
        "retrieved_2": _last(**{"9": 0.08, "detour": 0.2}),
        "random_2": _last(**{"9": 0.16, "detour": 0.2}),
        "coverage_2": _last(**{"9": 0.08, "detour": 0.15}),
        "responsiveness_2": _last(**{"9": 0.08, "detour": 0.3}),
        "oracle_2": _last(**{"9": 0.08, "detour": 0.1}),
    }
    rows["independent"]["pairs"]["3-4"] = {"l1": 0.2, "features": 0.1, "pixels": 100}
    references = dict.fromkeys(("truth", "vae"), _last(**{"9": 0.01}))
    scene = {"rows": rows, "references": references, "responsiveness": {}}
    results = summarise([scene] * 4, NINE)
    found = results["targets"]
    assert found["memory / independent, loop closure"]["value"] == pytest.approx(0.3)
    assert found["memory / independent, loop closure"]["met"]
    # (0.08 + 0.2) / (0.16 + 0.2)
    chosen = found["retrieved / random"]
    assert chosen["value"] == pytest.approx(0.777778) and chosen["at_most"] == 0.9
    assert found["oracle / random"]["value"] == pytest.approx(0.5)
    assert found["oracle / random"]["met"] is None
    # of 0.28 down to 0.18, which are half of the way from 0.36
    assert found["coverage, of the oracle's gain over VideoFOV"]["value"] == pytest.approx(0.5)
    assert found["VideoFOV, of the oracle's gain over random"]["value"] == pytest.approx(0.444444)
    assert found["responsiveness, of the oracle's gain over VideoFOV"]["value"] == pytest.approx(-1)
    assert "learned, of the oracle's gain over VideoFOV" not in found
    # (0.08 + 0.15) / (0.08 + 0.2)
    assert found["coverage / VideoFOV"]["value"] == pytest.approx(0.821429)
    assert "learned / VideoFOV" not in found
    assert found["retrieved / random, detour"]["value"] == pytest.approx(1)
    assert list(results["rows"]["independent"]["by_turn"]) == ["4", "9", "detour"]
    branches = results["rows"]["random_2"]["branches"]
    assert set(branches) == {"loop closure", "detour", "choice"}
    # 300 pixels of 0.2 and 100 of 0.4
    assert branches["detour"]["value"] == pytest.approx(0.25)
    assert results["rows"]["random_2"]["by_turn"]["9"]["value"] == pytest.approx(0.24)


def test_a_scene_without_a_pair_is_left_out_of_it() -> None:
    scenes = _scenes()
    for scene in scenes[:3]:
        for row in scene["rows"].values():
            del row["pairs"]["1-3"]
    results = _results(scenes)
    pair = results["rows"]["memory"]["pairs"]["1-3"]
    assert (pair["value"], pair["scenes"]) == (pytest.approx(0.3), 1)
    nothing = copy.deepcopy(scenes)
    for scene in nothing:
        for turn in scene["rows"]["memory"]["turns"]:
            turn["camera_error"] = None
    empty = _results(nothing)
    assert empty["rows"]["memory"]["camera_error"] is None
    assert "memory / independent, camera" not in empty["targets"]
    assert "| - |" in markdown(empty)


def test_the_table_shows_every_row_and_target() -> None:
    text = markdown(_results(_scenes()))
    assert "| independent turns | 0.3000 (0.1" in text
    assert "| *truth* | 0.0100 (0.0100 to 0.0100) |" in text
    assert "| memory / independent | 0.400 | 0.400 to 0.400 | ≤ 0.5 | yes |" in text
    assert text.startswith("4 held-out plain worlds, 3 turns each, 10 denoising steps")
    assert "ST-LPIPS was not measured" in text and "ST-LPIPS ↓" not in text
    assert "21.0 % (small)" in text and "32.8 % (large)" in text
    assert "| 1 vs 2-8 | 0.300 | 0.200 | 0.500 |" in text
    widths = {line.count("|") for line in text.splitlines()[2:9]}
    assert widths == {13}


def test_st_lpips_has_a_column_where_it_was_measured() -> None:
    scenes = _scenes()
    for scene in scenes:
        for row in (*scene["rows"].values(), *scene["references"].values()):
            row["turns"] = [turn | {"st_lpips": 0.25} for turn in row["turns"]]
    results = _results(scenes)
    assert results["rows"]["memory"]["st_lpips"] == pytest.approx(0.25)
    assert "0.250 (0.250 to 0.250)" in markdown(results)
    assert "not measured" not in markdown(results)
