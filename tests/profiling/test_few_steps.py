"""What few steps save, by count, and the file that says so."""

from __future__ import annotations

import json

import pytest
from few_steps import GUIDED, plan, sampling_flops
from measure import ROOT

from mv2v_engine.config import FAST
from mv2v_engine.tokens.flops import work_flops

GUIDED_FORWARDS = 2 * GUIDED.num_inference_steps


def test_four_steps_against_fifty_guided_ones() -> None:
    """A 25th where every forward is whole. With static conditioning the one forward that is whole
    is as much as two others, and a turn of four steps has it as one of a hundred has."""
    joint, static = (
        sampling_flops(kind, GUIDED_FORWARDS) / sampling_flops(kind, 4)
        for kind in ("joint", "static")
    )
    assert joint == 25 > 24
    whole = work_flops(plan("static"), "whole") / work_flops(plan("static"), "kept")
    assert 1.95 < whole < 2.05
    assert static == pytest.approx((whole + 99) / (whole + 3)) and 20 < static < 20.5
    assert sampling_flops("joint", GUIDED_FORWARDS) / sampling_flops("static", 4) > 50
    # FastWan's three reach it
    assert sampling_flops("static", GUIDED_FORWARDS) / sampling_flops("static", 3) > 24


def test_the_result_is_what_is_counted() -> None:
    path = ROOT / "profiling" / "results" / "few_steps.jsonl"
    rows = {row["case"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert len(rows) == 2 * (1 + len(FAST))
    for case, row in rows.items():
        kind = case.split(", ")[1]
        assert row["pflop"] == pytest.approx(sampling_flops(kind, row["forwards"]) / 1e15, rel=1e-3)
        assert 0 < row["vae_decode_percent"] < 15
