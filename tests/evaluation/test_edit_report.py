"""Summaries of made-up clips, whose answers are known."""

from __future__ import annotations

from typing import Any

import pytest

from mv2v_engine.evaluation.edit_protocol import EditProtocol
from mv2v_engine.evaluation.edit_report import edits_markdown, summarise_edits
from mv2v_engine.evaluation.editing_measures import MEASURES

PROTOCOL = EditProtocol(clips=4, rows=("independent", "memory", "fifo"))


def _quality(subject: float | None, **changes: Any) -> dict[str, Any]:
    plain = dict.fromkeys(MEASURES, 0.5) | {"seam_ratio": 1.0, "background_psnr": 25.0}
    return plain | {"subject_error": subject} | changes


def _clips() -> list[dict[str, Any]]:
    clips = []
    for scale, kind in ((1.0, "colour"), (2.0, "hat"), (3.0, "colour"), (6.0, "remove")):
        subject = None if kind == "remove" else 0.1 * scale
        cost = {"flops": int(1e12 * scale), "seconds": scale}
        rows = {
            "independent": _quality(subject, **cost),
            "memory": _quality(
                subject and 0.4 * subject, seam_ratio=1.08, background_psnr=25.3, energy=0.4, **cost
            ),
            "fifo": _quality(subject and 0.3 * subject, agreement=0.2, **cost),
        }
        references = {
            "source": _quality(0.01, agreement=0.0),
            "truth": _quality(0.02, agreement=1.0),
            "vae": _quality(0.03, agreement=0.9),
        }
        windows = 8 if kind == "hat" else 5
        about = {"seed": 1, "kind": kind, "prompt": "make it red", "windows": windows}
        clips.append({**about, "rows": rows, "references": references})
    return clips


def _results(clips: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        **summarise_edits(clips, PROTOCOL),
        "settings": {"steps": 10, "trained_for_memory": True},
        "engine": {"checkpoint": "tiny", "device": "cpu"},
    }


def test_means_by_row_kind_and_length() -> None:
    results = _results(_clips())
    assert list(results["rows"]) == ["independent", "fifo", "memory"]
    assert results["clips"] == 4
    assert results["clips_by_kind"] == {"colour": 2, "hat": 1, "remove": 1}
    assert results["clips_by_windows"] == {"5": 3, "8": 1}
    independent = results["rows"]["independent"]
    # a clip without the measure is left out of it
    assert independent["subject_error"] == pytest.approx(0.2)
    low, high = independent["subject_error_ci"]
    assert 0.1 <= low < 0.2 < high <= 0.3
    assert (independent["flops"], independent["seconds"]) == (3e12, 2.5)
    assert independent["by_kind"]["colour"]["subject_error"]["value"] == pytest.approx(0.2)
    assert independent["by_kind"]["remove"]["subject_error"]["value"] is None
    assert independent["by_windows"]["8"]["subject_error"]["value"] == pytest.approx(0.2)
    assert "flops" not in results["references"]["truth"]


def test_targets_compare_clip_by_clip() -> None:
    found = _results(_clips())["targets"]
    gain = found["subject error, memory / independent"]
    assert gain["value"] == pytest.approx(0.4) and gain["ci"] == pytest.approx([0.4, 0.4])
    assert gain["met"] and gain["at_most"] == 0.5 and gain["scenes"] == 3
    sharp = found["gradient energy, memory / truth through the VAE"]
    assert sharp["value"] == pytest.approx(0.8) and sharp["met"] is None
    # an edit that does not follow the words is no rival
    against_fifo = "subject error, memory / FIFO, where both follow the words"
    assert against_fifo not in found
    able = _clips()
    for clip in able:
        clip["rows"]["fifo"]["agreement"] = 0.6 if clip["kind"] == "hat" else 0.4
    fifo = _results(able)["targets"][against_fifo]
    assert fifo["value"] == pytest.approx(4 / 3, rel=1e-4) and not fifo["met"]
    assert fifo["scenes"] == 1
    background, agreement = found["background PSNR, dB"], found["agreement"]
    assert background["value"] == pytest.approx(25.3) and not background["met"]
    assert (background["at_least"], agreement["at_least"]) == (30, 0.95)
    # 8 % above what the true edit itself does at seams
    seams = found["seam ratio, memory / truth"]
    assert seams["value"] == pytest.approx(1.08) and seams["met"] and seams["at_most"] == 1.2
    assert "subject error, memory / one noise, where both follow the words" not in found


@pytest.mark.parametrize(("worst", "is_met"), [(0.9, True), (1.5, False)])
def test_better_than_fifo_is_a_matter_of_the_whole_interval(worst: float, is_met: bool) -> None:
    clips = _clips()[:3]
    for clip, ratio in zip(clips, (0.5, 0.5, worst), strict=True):
        memory = clip["rows"]["memory"]["subject_error"]
        clip["rows"]["fifo"] |= {"agreement": 0.9, "subject_error": memory / ratio}
    found = _results(clips)["targets"]["subject error, memory / FIFO, where both follow the words"]
    assert found["value"] < 1 and found["for_interval"]
    assert found["met"] is is_met is (found["ci"][1] <= 1)


def test_the_tables_show_every_row_target_and_kind() -> None:
    text = edits_markdown(_results(_clips()))
    assert "4 held-out clips (3 of 5 windows, 1 of 8 windows), 10 denoising steps" in text
    assert "| independent windows | 0.2000 (0.1" in text and "| *the true edit* | 0.0200" in text
    assert "| ≤ 1.2 | yes |" in text
    assert "| subject error, memory / independent | 0.400 | 0.400 to 0.400 | ≤ 0.5 | yes |" in text
    assert "|  | colour | hat | remove |" in text
    assert "| FIFO diagonal denoising | 0.0600 (0.20) | 0.0600 (0.20) | - (0.20) |" in text
    assert "DINO" not in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables[:8]} == {11}


def test_features_have_a_column_where_they_were_measured() -> None:
    clips = _clips()
    for clip in clips:
        for quality in (*clip["rows"].values(), *clip["references"].values()):
            quality["dino_f"] = 0.9
    text = edits_markdown(_results(clips))
    assert "| DINO_F |" in text and "| 0.9000 |" in text and "CLIP_F" not in text
