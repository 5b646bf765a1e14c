"""How the benchmarks measure: cold caches, medians with quartiles, this device's own ceilings.

Results are JSON lines, each with the device, driver, versions and commit that it was made with;
the file is written whole after every row, so that a run cut short leaves what it has.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from mv2v_engine.files import replacing

ROOT = Path(__file__).resolve().parents[1]
MIN_RUNS, MAX_RUNS = 5, 50
TINY_NOTE = "tiny shapes: shows that the benchmark runs, says nothing of speed"


@dataclass(frozen=True)
class Timing:
    """Seconds: the median of `runs` calls and their quartiles."""

    median: float
    low: float
    high: float
    runs: int


class Timer:
    """Times calls one by one; before each, a buffer larger than the caches is overwritten.

    seconds: how long the calls of one measurement take in all, about. clock: of a CPU; a single
    thread's `time.process_time` leaves out what else the machine does.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        seconds: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.device, self.seconds, self.clock = device, seconds, clock
        num_bytes = 1 << 22
        if device.type == "cuda":
            # many times the L2, so that the host also gets ahead of the device meanwhile
            l2 = torch.cuda.get_device_properties(device).L2_cache_size
            num_bytes = max(8 * l2, 1 << 28)
        self._flush = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def __call__(self, run: Callable[[], Any]) -> Timing:
        return self.turn_about([run])[0]

    def turn_about(self, rivals: Sequence[Callable[[], Any]]) -> list[Timing]:
        """Timings of calls to compare: each once, then each again, as often as the slowest.

        What drifts meanwhile, clocks and temperature, drifts for all of them.
        """
        for run in rivals:
            run()  # compiles, and lets libraries choose their algorithms
        slowest = max(statistics.median(self._times([run] * 2)) for run in rivals)
        runs = min(max(int(self.seconds / max(slowest, 1e-9)), MIN_RUNS), MAX_RUNS)
        times = self._times([run for _ in range(runs) for run in rivals])
        timings = []
        for first in range(len(rivals)):
            low, median, high = statistics.quantiles(times[first :: len(rivals)], n=4)
            timings.append(Timing(median, low, high, runs))
        return timings

    def rounds(self, rivals: Sequence[Callable[[], Any]], count: int) -> list[list[float]]:
        """Seconds of every call in each of `count` rounds; all have been called before.

        Ratios within a round are freer of drift than those of medians.
        """
        times = self._times([run for _ in range(count) for run in rivals])
        return [times[first : first + len(rivals)] for first in range(0, len(times), len(rivals))]

    def _times(self, calls: Sequence[Callable[[], Any]]) -> list[float]:
        if self.device.type == "cuda":
            return self._times_on_cuda(calls)
        times = []
        for run in calls:
            self._flush.zero_()
            began = self.clock()
            run()
            times.append(self.clock() - began)
        return times

    def _times_on_cuda(self, calls: Sequence[Callable[[], Any]]) -> list[float]:
        """All calls are queued before the first result is read: nothing waits in between."""
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls]
        for run, (began, ended) in zip(calls, pairs, strict=True):
            self._flush.zero_()
            began.record()
            run()
            ended.record()
        torch.cuda.synchronize(self.device)
        return [began.elapsed_time(ended) / 1e3 for began, ended in pairs]


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches, measured in the same run: the floors' denominators.

    bytes_per_second: of a copy, read and written. flops_per_second: of a bfloat16 product.
    """

    bytes_per_second: float
    flops_per_second: float

    def floor(self, phases: Iterable[tuple[int, int]]) -> float:
        """Seconds that phases of (bytes, FLOPs) take at least, one after the other."""
        return sum(
            max(moved / self.bytes_per_second, flops / self.flops_per_second)
            for moved, flops in phases
        )


def measure_ceilings(timer: Timer, *, tiny: bool) -> Ceilings:
    """Copies of 4 GiB and products of 8192 x 8192 matrices of random numbers; tiny: small ones."""
    new: dict[str, Any] = {"dtype": torch.bfloat16, "device": timer.device}

    def copying(count: int) -> float:
        source, target = torch.zeros(2, count, **new).unbind()
        return 2 * int(source.nbytes) / timer(lambda: target.copy_(source)).median

    def multiplying(side: int) -> float:
        # zeros would draw less power, and so run faster than data does
        a, b = torch.randn(2, side, side, **new).unbind()
        return 2 * side**3 / timer(lambda: a @ b).median

    return Ceilings(copying(1 << 20 if tiny else 1 << 31), multiplying(256 if tiny else 8192))


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """The most that a call holds at once beyond what was held before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    results: Any = profile.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = accumulate(event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0)


def held_mib(device: torch.device) -> float | None:
    """What lies on a GPU between two calls; a CPU does not say."""
    if device.type != "cuda":
        return None
    return digits(torch.cuda.memory_allocated(device) / 2**20)


def existing_device(name: str, otherwise: str = "--device cpu") -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"no CUDA device was found, got --device {name}; use {otherwise}")
    return device


def usable_device(name: str, *, quick: bool) -> torch.device:
    """The device to measure on; a CPU takes tiny shapes alone."""
    device = existing_device(name, "--device cpu --quick")
    if device.type == "cpu" and not quick:
        raise SystemExit("full-size shapes need --device cuda; on a CPU add --quick")
    return device


def provenance(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Where and with what a row was measured. commit: for a copy without its history."""
    is_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else "cpu",
        "driver": _driver() if is_cuda else None,
        "torch": torch.__version__,
        "triton": installed("triton"),
        "commit": commit or current_commit(),
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    return done.stdout.split("\n")[0].strip() or None


def current_commit() -> str:
    """The commit of this checkout, marked where tracked files other than results differ."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise OSError(done.stderr.strip())
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "-uno", "--", ".", ":!profiling/results")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except OSError:
        return "unknown"


class Report:
    """Rows with what is common to them, saved after each as JSON lines."""

    def __init__(self, out: Path | None, common: dict[str, Any]) -> None:
        self.out, self.common = out, common
        self.rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        self.save()

    def save(self) -> None:
        if self.out is None:
            return
        lines = [json.dumps(row | self.common, ensure_ascii=False) for row in self.rows]
        with replacing(self.out) as temporary:
            temporary.write_text("\n".join([*lines, ""]), encoding="utf-8")


def report_predictions(doc: str | None, predict: Callable[[Report], None], columns: str) -> None:
    """The command of a script that predicts and runs nothing: `--out FILE` keeps its rows.

    doc: the script's; its first line is the help. predict: adds the rows. columns: of the table.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = Report(args.out, provenance(torch.device("cpu")) | {"what": "predicted"})
    predict(report)
    print(table(report.rows, columns))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """A report's rows, as `Report` wrote them."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def figures(
    timing: Timing, ceilings: Ceilings, phases: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """A row's numbers; None where the phases have no bytes or no FLOPs."""
    moved, flops = (sum(column) for column in zip(*phases, strict=True)) if phases else (0, 0)
    floor = ceilings.floor(phases)
    return {
        "ms": digits(timing.median * 1e3),
        "ms_low": digits(timing.low * 1e3),
        "ms_high": digits(timing.high * 1e3),
        "runs": timing.runs,
        "gb_per_s": digits(moved / timing.median / 1e9) if moved else None,
        "tflop_per_s": digits(flops / timing.median / 1e12) if flops else None,
        "floor_ms": digits(floor * 1e3) if floor else None,
        "percent_of_floor": digits(100 * floor / timing.median) if floor else None,
    }


def digits(value: float) -> float:
    """Four of them: more than a measurement has."""
    return float(f"{value:.4g}")


def percentile(values: Sequence[float], share: float) -> float:
    """The value that a share of all lies below, or at."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def table(rows: Sequence[dict[str, Any]], names: str) -> str:
    """Rows as aligned text, by the names of columns; what a row lacks is left empty."""
    columns = names.split()
    cells = [["" if row.get(name) is None else str(row[name]) for name in columns] for row in rows]
    titled = [columns, *cells]
    widths = [max(map(len, column)) for column in zip(*titled, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in titled
    )


def reason(error: BaseException) -> str:
    """An error as one line of a row."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
