"""The benchmarks run on a CPU at tiny shapes, say so, and record what fails."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import bench_batch
import bench_block
import bench_finite
import bench_graphs
import bench_ops
import bench_prope
import bench_shared_turns
import pytest
import torch
from bench_ops import measure_all, measure_case
from eager_block import EagerBlock
from measure import Ceilings, Report, Timer, Timing, figures, peak_bytes, table
from op_cases import OpCase
from targets import op_targets, target

from mv2v_engine.testing import relative_error
from mv2v_engine.tokens.plan import TokenPlan, novel_view_plan
from tests.engine.graph_stand_in import StandIn

CPU = torch.device("cpu")
CEILINGS = Ceilings(bytes_per_second=1e12, flops_per_second=1e15)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(script: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--commit", "abc", *arguments])
    script.main()


def test_operations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "ops.jsonl"
    run(bench_ops, monkeypatch, "--quick", "--out", str(out), "--ops", "adaln", "attention")
    found = rows(out)
    for row in found:
        assert (row["device"], row["driver"], row["commit"]) == ("cpu", None, "abc")
        assert (
            row["torch"] == torch.__version__ and "triton" in row and "tiny shapes" in row["note"]
        )
    timed = {(row["op"], row["implementation"]) for row in found if row.get("ms")}
    assert {("adaln", "reference"), ("adaln", "functional")} <= timed
    assert {op for op, _ in timed} == {"adaln", "attention", "attention_varlen"}
    skipped = [row for row in found if row.get("implementation") == "triton"]
    assert skipped and all("needs a CUDA device" in row["skipped"] for row in skipped)
    printed = capsys.readouterr().out
    assert "percent_of_floor" in printed and "tiny shapes" in printed


def test_what_looking_for_finite_numbers_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "finite.jsonl"
    run(bench_finite, monkeypatch, "--rounds", "3", "--layers", "0", "--out", str(out))
    *steps, loading = rows(out)
    assert len(steps) == 3 and loading["case"] == "loading tiny-nvs"
    for row in steps:
        assert 0 < row["count_percent"] < 100 and row["low"] <= row["high"]


def test_what_cameras_inside_attention_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "prope.jsonl"
    monkeypatch.setattr(sys, "argv", ["bench", "--rounds", "2", "--out", str(out)])
    bench_prope.main()
    found = rows(out)
    assert [row["camera_attention"] for row in found] == [*bench_prope.FORMS] * 3
    assert all(row["low"] <= row["percent"] <= row["high"] for row in found if "percent" in row)


def test_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "block.jsonl"
    monkeypatch.setitem(sys.modules, "diffusers.models.transformers.transformer_wan", None)
    run(bench_block, monkeypatch, "--quick", "--out", str(out))
    found = rows(out)
    assert [row["implementation"] for row in found] == [
        *("fused", "eager", "reference"),
        *("diffusers", "fused", "eager", "reference"),
    ]
    missing = found.pop(3)
    assert "ModuleNotFoundError" in missing["skipped"] and "ms" not in missing
    fused = {row["workload"]: row["ms"] for row in found if row["implementation"] == "fused"}
    for row in found:
        ratio = row["ms"] / fused[row["workload"]]
        assert row["speedup"] == pytest.approx(ratio, rel=0.01, abs=1e-3)


def test_packed_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, threads = tmp_path / "batch.jsonl", torch.get_num_threads()
    run(bench_batch, monkeypatch, "--turns", "2", "9", "--rounds", "1", "--out", str(out))
    torch.set_num_threads(threads)
    found = rows(out)
    # nine turns are more than there is time for
    asked = [("joint", 2), ("static", 2)]
    assert [(row["conditioning"], row["turns"]) for row in found] == asked
    # 300 tokens of a target each; joint turns have a source too, and one of them three memories
    assert [row["tokens"] for row in found] == [1425, 600]
    for row in found:
        assert (
            row["speedup"]
            == row["speedups"][0]
            == pytest.approx(row["alone_ms"] / row["packed_ms"], rel=1e-2)
        )
        assert row["error"] < 1e-5 and row["clip"] == "17x96x160" and row["commit"] == "abc"
    assert capsys.readouterr().out.splitlines()[-1].startswith("packing pays")


def test_turns_that_share_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path
) -> None:
    out, threads = tmp_path / "shared.jsonl", torch.get_num_threads()
    words = ("--turns", "2", "--rounds", "1", "--steps", "20", "--out", str(out))
    run(bench_shared_turns, monkeypatch, *words, "--checkpoint", str(tiny_checkpoint))
    torch.set_num_threads(threads)
    found = rows(out)
    # the first static step keeps what the second reads, and runs alone
    assert [row["packed_steps"] for row in found] == [20, 19]
    for row in found:
        assert row["speedup"] == pytest.approx(row["alone_s"] / row["packed_s"], rel=1e-2)
        # of turns that are made one after the other, the first is ready about half-way
        assert row["mean_alone_s"] < 0.9 * row["alone_s"]
        assert row["mean_packed_s"] > 0.7 * row["packed_s"]


def test_the_verdict_on_packing_names_where_it_pays() -> None:
    row = {"model": "m", "clip": "c", "conditioning": "joint", "turns": 2, "speedup": 1.2}
    assert bench_batch.verdict([row]).endswith("for 2 x m c joint (1.2x)")
    others = [row | {"turns": 1}, row | {"speedup": 1.01}, {**row, "speedup": 0}]
    assert "pays nowhere" in bench_batch.verdict(others)


@pytest.mark.parametrize("has_camera", [True, False])
def test_other_blocks_compute_the_same(has_camera: bool) -> None:
    (plan,) = bench_block.plans(tiny=True)
    plan = plan if has_camera else bench_block.without_cameras(plan)
    bench = bench_block.Bench(plan, CPU)
    bench.block.float()
    bench.text = bench.text.float()
    bench.sequence = bench_block.replace(
        bench.sequence, x=bench.sequence.x.float(), text=bench.text
    )
    with torch.inference_mode():
        expected = bench.ours("reference")() - bench.sequence.x
        others = [bench.eager()]
        if not has_camera:
            others.append(bench.diffusers())
        for other in others:
            assert relative_error(other() - bench.sequence.x, expected) < 1e-5


def test_the_eager_block_does_not_use_the_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    (plan,) = bench_block.plans(tiny=True)
    bench = bench_block.Bench(plan, CPU)
    # the fused block would ask for kernels that are not here
    monkeypatch.setattr(bench.block, "backend", "triton")
    monkeypatch.setattr(bench.block.attn1, "backend", "triton")
    block = EagerBlock(bench.block, bench.sequence, attention_backend="reference")
    with torch.inference_mode():
        assert block(bench.sequence.x, bench.temb, bench.text, bench.cameras).isfinite().all()


def test_full_size_shapes_are_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="on a CPU add --quick"):
        run(bench_ops, monkeypatch)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for script in (bench_ops, bench_block):
        monkeypatch.setattr(sys, "argv", ["bench"])
        with pytest.raises(SystemExit, match="no CUDA device was found"):
            script.main()


def test_rivals_are_timed_turn_about() -> None:
    order: list[str] = []

    def rival(name: str, seconds: float) -> Any:
        def run() -> None:
            order.append(name)
            time.sleep(seconds)

        return run

    quick, slow = Timer(CPU, seconds=0.0).turn_about([rival("a", 0.0), rival("b", 0.02)])
    # warm-up, two to estimate, then alternating
    assert "".join(order) == "ab" + "aabb" + "ab" * 5
    assert quick.runs == slow.runs == 5 and quick.median < slow.median
    assert quick.low <= quick.median <= quick.high and slow.median >= 0.02


def test_rounds_are_whole() -> None:
    order: list[str] = []
    clock = iter(range(100))
    timer = Timer(CPU, seconds=0.0, clock=lambda: float(next(clock)))
    found = timer.rounds([lambda: order.append("a"), lambda: order.append("b")], 3)
    assert "".join(order) == "ab" * 3 and found == [[1.0, 1.0]] * 3


def test_peak_bytes_are_what_a_call_held_at_once() -> None:
    size, count = 1 << 20, 3

    def run() -> None:
        for _ in range(count):
            torch.zeros(size, dtype=torch.uint8)
        both = torch.zeros(size, dtype=torch.uint8), torch.zeros(2 * size, dtype=torch.uint8)
        del both

    assert 3 * size <= peak_bytes(run, CPU) < 3.1 * size


def _case(run: Any) -> OpCase:
    return OpCase(
        op="toy",
        workload="one number",
        tokens=1,
        width=1,
        phases=((2, 0),),
        backends={"reference": None, "triton": "no such kernel"},
        run=run,
        expected=lambda dtype: torch.ones(1, dtype=dtype),
        pick=lambda out: out,
    )


def test_what_fails_or_is_wrong_is_recorded_and_not_timed() -> None:
    def broken(backend: str) -> None:
        raise RuntimeError("out of\ncheese")

    for toy, said in (
        (broken, "RuntimeError: out of cheese"),
        (lambda backend: torch.full((1,), 1.1), "ValueError: it is off by 0.1 from float64"),
        (lambda backend: torch.full((1,), torch.nan), "off by nan"),
    ):
        report = Report(None, {})
        measure_case(_case(toy), Timer(CPU, seconds=0.0), CEILINGS, report, compiled=False)
        reference, triton = report.rows
        assert said in reference["skipped"] and "ms" not in reference
        assert triton["skipped"] == "no such kernel"


def test_cases_that_cannot_be_made_or_come_too_late_are_recorded() -> None:
    def make(plan: TokenPlan, device: torch.device) -> list[OpCase]:
        raise torch.OutOfMemoryError("no room")

    report, timer = Report(None, {}), Timer(CPU, seconds=0.0)
    for seconds, said in ((60, "OutOfMemoryError: no room"), (-1, "-1 s were used up")):
        measure_all({"toy": make}, timer, report, tiny=True, seconds=seconds)
        assert report.rows[-1]["op"] == "toy" and report.rows[-1]["skipped"] == said


def test_figures_and_floors() -> None:
    found = figures(Timing(2e-3, 1e-3, 3e-3, 5), CEILINGS, ((10**9, 0), (0, 5 * 10**11)))
    assert (found["ms"], found["ms_low"], found["ms_high"], found["runs"]) == (2.0, 1.0, 3.0, 5)
    assert (found["gb_per_s"], found["tflop_per_s"]) == (500.0, 250.0)
    # the phases follow each other: 1 ms of bytes, then half a millisecond of products
    assert (found["floor_ms"], found["percent_of_floor"]) == (1.5, 75.0)
    assert CEILINGS.floor(((10**9, 5 * 10**11),)) == 1e-3
    nothing = figures(Timing(1e-3, 1e-3, 1e-3, 5), CEILINGS, ())
    assert nothing["floor_ms"] is nothing["gb_per_s"] is nothing["percent_of_floor"] is None


def test_targets() -> None:
    turn = novel_view_plan(memory=3)
    shape = {"tokens": turn.length, "width": 1536, "ms": 0.1}

    def row(op: str, implementation: str, **more: Any) -> dict[str, Any]:
        return shape | {"op": op, "implementation": implementation, "workload": ""} | more

    measured = [
        row("adaln", "triton", percent_of_floor=85.0),
        row("adaln", "triton", percent_of_floor=79.0, width=3072),
        row("adaln", "reference", percent_of_floor=10.0),
        row("token_merge", "triton", tflop_per_s=700.0, workload="9 of 21 frames of 30 x 52"),
        row("token_merge", "triton", tflop_per_s=650.0, workload="21 of 21 frames of 30 x 52"),
        row("attention", "triton", tflop_per_s=460.0),
        row("attention", "cudnn", tflop_per_s=560.0),
        row("attention", "cudnn", tflop_per_s=700.0, tokens=5),
        row("attention", "fa2", tflop_per_s=370.0),
        row("frame_responsiveness", "triton", percent_of_floor=50.0, ms=1.0),
    ]
    found = {each["target"]: each for each in op_targets(measured, CEILINGS)}
    values = {name: (each["measured"], each["met"]) for name, each in found.items()}
    # two merging blocks at 1 ms of a forward of 1.24 PFLOP at 1 PFLOP/s
    share = float(f"{100 * 2e-3 / (turn.flops() / 1e15):.4g}")
    assert values == {
        "adaln: % of the copy bandwidth": (79.0, False),
        "gated_residual: % of the copy bandwidth": (None, None),
        "prope: % of the copy bandwidth": (None, None),
        "qk_norm_rope: % of the copy bandwidth": (None, None),
        "residual_norm: % of the copy bandwidth": (None, None),
        "rope: % of the copy bandwidth": (None, None),
        "token_merge: % of the matrix rate": (65.0, True),
        "frame_responsiveness: % of its floor": (50.0, True),
        "frame_responsiveness: % of a forward": (share, False),
        "attention, best library: TFLOP/s": (560.0, True),
        "attention, Triton: TFLOP/s": (460.0, True),
    }
    assert target("x", 1.03, [{"speedup": 1.02}], "speedup")["met"] is False


def test_block_targets_name_its_rows() -> None:
    named = [
        {"implementation": name, "workload": f"{plan.length:,} tokens {cameras}", "speedup": 1.2}
        for plan in bench_block.plans(tiny=False)
        for name, cameras in (("eager", "with cameras"), ("diffusers", "without cameras"))
    ]
    assert [row["met"] for row in bench_block.targets(named)] == [True, False, True, False]


def test_a_table_is_aligned() -> None:
    assert table([{"a": 1, "b": None}, {"a": "long"}], "a b") == "a     b\n1\nlong"


def test_graphs_against_launches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a GPU the eager half runs; a recorder that acts one out makes the other run too."""
    out = tmp_path / "graphs.jsonl"
    run(bench_graphs, monkeypatch, "--quick", "--rounds", "2", "--out", str(out))
    for row in rows(out):
        assert row["eager_ms"] >= row["host_ms"] > 0 and "need a CUDA device" in row["skipped"]
    assert "nothing to compare" in capsys.readouterr().out
    monkeypatch.setattr(bench_graphs, "open_recorder", lambda device: StandIn())
    run(bench_graphs, monkeypatch, "--quick", "--rounds", "2", "--out", str(out))
    joint, static = rows(out)
    assert joint["equal"] and static["equal"] and joint["auto"] == "captured"
    assert static["arena_mib"] > joint["arena_mib"] == 0 and joint["pool_mib"] > 0
    for row in (joint, static):
        assert len(row["speedups"]) == 2 and row["replay_ms"] > 0
    assert "auto agrees" in bench_graphs.verdict([joint | {"speedup": 1.5}])
    assert "no gain" in bench_graphs.verdict([joint | {"speedup": 1.0}])
