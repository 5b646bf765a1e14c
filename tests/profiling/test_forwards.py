"""Whole forwards as the benchmarks time them: right FLOPs, the same outputs as the peers'."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import bench_memory
import compare_peers
import forwards
import pytest
import roofline
import torch
from forwards import KINDS, Inputs, Setting, attention_flops, flops
from measure import Report, Timer
from torch.utils.flop_counter import FlopCounterMode

from mv2v_engine.checkpoints import load_checkpoint
from mv2v_engine.testing import cpu_flops

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def setting(tiny_checkpoint: Path) -> Setting:
    checkpoint = load_checkpoint(tiny_checkpoint)
    return Setting("tiny", checkpoint.transformer, checkpoint.sampling)


@pytest.mark.parametrize("kind", KINDS)
def test_flops_by_part_are_the_counted_ones(setting: Setting, kind: str) -> None:
    given = Inputs(setting, setting.plan(kind, 3))
    for later, run in ((False, given.first), (True, given.later)):
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=cpu_flops()) as counter:
            run()
        counted = counter.get_flop_counts()["Global"]
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        assert flops(given.plan, later=later) == counter.get_total_flops()
        assert attention_flops(given.plan, later=later) == counted[attention]


def test_a_count_of_memory_videos(setting: Setting) -> None:
    report, timer = Report(None, {}), Timer(CPU, seconds=0.0)
    args = argparse.Namespace(most_uniform=2, rounds=2, steps=4)
    with torch.no_grad():
        for memory in (0, 2, 4):
            bench_memory.measure_count(setting, memory, timer, report, args)
    rows = {(row["kind"], row["memory"]): row for row in report.rows}
    assert ("uniform", 4) not in rows and len(rows) == 3 * len(KINDS) - 1
    assert rows["dynamic", 0]["flop_ratio"] == rows["uniform", 0]["flop_ratio"] == 1
    for (kind, memory), row in rows.items():
        plan = setting.plan(kind, memory)
        assert row["tokens"] == plan.length and row["peak_mib"] > 0 and row["time_ratio"] > 0
        assert (row["kept_mib"] > 0) == (kind == "static")
        off = 100 * (row["time_ratio"] / row["flop_ratio"] - 1)
        assert row["off_percent"] == pytest.approx(off, abs=0.2)
        # a static turn's first step costs more than its others
        assert (row["turn_flop_ratio"] > row["flop_ratio"]) == (kind == "static")
        # nor does a later step hold what the first one did
        if kind == "static":
            assert row["peak_mib"] < rows["dynamic", memory]["peak_mib"]
    kinds = ("static", "merged", "dynamic", "uniform")
    ratios = [rows[kind, 2]["flop_ratio"] for kind in kinds]
    assert ratios == sorted(ratios) and len(set(ratios)) == 4


def test_full_size_is_counted_wherever_it_runs() -> None:
    report = Report(None, {})
    bench_memory.count_full_size(report)
    ten = next(row for row in report.rows if row["memory"] == 10)
    assert (ten["tokens_uniform"], ten["tokens_dynamic"]) == (393_120, 105_378)
    names = ("uniform", "dynamic", "merged", "static")
    counted = [ten[f"pflop_{name}"] for name in names]
    assert counted == [29.561457, 2.335327, 1.38969, 0.726108]
    assert [row["memory"] for row in report.rows] == list(bench_memory.COUNTS)


def test_memory_targets() -> None:
    def row(kind: str, memory: int, off: float, turn: float) -> dict[str, Any]:
        measured = {"off_percent": off, "turn_time_ratio": turn}
        return {"what": "forward", "kind": kind, "memory": memory} | measured

    rows = [row("static", 3, -20.0, 0.7), row("static", 10, 4.0, 0.9), row("merged", 0, 9.0, 1.0)]
    found = {row["target"]: row for row in bench_memory.targets(rows, steps=20)}
    by_kind = {name.partition(":")[0]: row["met"] for name, row in found.items()}
    assert (by_kind["static"], by_kind["merged"], by_kind["uniform"]) == (False, True, None)
    ten = found["static turn of 20 steps, 10 memory videos / joint turn, none"]
    assert (ten["measured"], ten["met"]) == (0.9, True)


def test_peers_compute_the_same(setting: Setting) -> None:
    report, timer = Report(None, {}), Timer(CPU, seconds=0.0)
    with torch.no_grad():
        compare_peers.measure(setting, timer, report, 1, threads=1)
    same = [row for row in report.rows if row["ours"] == "the same"]
    errors = {row["peer"]: row["relative_error"] for row in same}
    assert set(errors) == {"diffusers", "ReCamMaster"} and max(errors.values()) < 1e-5
    ours = [row["ours"] for row in report.rows if row["peer"] == "ReCamMaster"]
    assert len(ours) == 1 + len(compare_peers.TURNS)
    assert all(row["speedup"] > 0 for row in report.rows)


def test_peers_that_are_missing_or_wrong_are_not_timed(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, timer = Report(None, {}), Timer(CPU, seconds=0.0)
    monkeypatch.setitem(sys.modules, "diffusers", None)

    def noise(setting: Setting, given: Inputs) -> Any:
        return lambda: torch.randn_like(given.latents[0])

    monkeypatch.setattr(compare_peers, "eager_forward", noise)
    with torch.no_grad():
        compare_peers.measure(setting, timer, report, 1)
    missing, wrong = report.rows
    assert "ModuleNotFoundError" in missing["skipped"] and "not timed" in wrong["skipped"]
    assert all(row["met"] is None for row in compare_peers.targets(report.rows))


def test_a_forward_against_the_floor(setting: Setting) -> None:
    report, timer = Report(None, {}), Timer(CPU, seconds=0.0)
    cases, name = roofline.cases(setting), "3 memory videos, merged"
    assert list(cases) == list(roofline.SECONDS)
    with torch.no_grad():
        roofline.measure_case(setting, name, cases[name], timer, 1e12, report)
    forward, *parts = report.rows
    assert forward["percent_of_own_floor"] == pytest.approx(
        100 * forward["own_floor_ms"] / forward["ms"], rel=2e-3
    )
    assert [row["part"] for row in parts] == ["attention", "product", "rest"]
    assert all(row["ms"] > 0 for row in parts)
    assert sum(row["percent_of_forward"] for row in parts) == pytest.approx(100, abs=0.1)
    counted = sum(row["tflop"] or 0 for row in parts)
    assert counted == pytest.approx(forward["tflop"], rel=1e-3)
    # this is not an H200, and its targets say so
    assert all(row["measured"] is row["met"] is None for row in roofline.targets(report.rows))


def test_the_full_size_floor_is_within_its_targets() -> None:
    """At 80 % of the floor, the forwards take no longer than the seconds that are wanted."""
    with torch.device("meta"):
        model = forwards.MV2VTransformer(forwards.WAN_1_3B)
    cases = roofline.cases(Setting("full", model, forwards.SamplingConfig()))
    for name, plan in cases.items():
        total, attending = flops(plan, later=True), attention_flops(plan, later=True)
        floor = attending / roofline.ATTENTION_RATE + (total - attending) / roofline.PRODUCT_RATE
        assert 100 * floor / roofline.PERCENT < 1.15 * roofline.SECONDS[name], name


def test_full_size_needs_a_gpu() -> None:
    with pytest.raises(SystemExit, match="on a CPU use --model tiny"):
        forwards.chosen(CPU, "full")
