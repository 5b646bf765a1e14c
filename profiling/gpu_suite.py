"""Everything that needs a GPU, in under nine minutes: build, tests, benchmarks, results.

`python profiling/gpu_suite.py [--dry-run] [--results profiling/results] [--only tests ops]`

Stages run one after the other, each in a process of its own and under its own time limit; one that
fails or runs out of time is recorded and the next one starts. Needs torch with CUDA, Triton and
pytest; works without an install, without a network and without diffusers. `gpu_suite.jsonl` tells
how the stages ended, the other files hold what they measured.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 535  # seconds, for all stages
# results whose script has another name than `bench_<name>.py`
SCRIPTS = {"roofline": "roofline", "peers": "compare_peers"}
TAIL = 2000  # characters of a stage's output that its row keeps if it fails


@dataclass(frozen=True)
class Stage:
    """A command, run in the repository's root, and the seconds that it may take."""

    name: str
    command: tuple[str, ...]
    seconds: float


def plan(results: Path, commit: str) -> list[Stage]:
    """All stages in order; a benchmark stops by itself before its limit where it can."""

    def python(*arguments: str) -> tuple[str, ...]:
        return (sys.executable, *arguments)

    def bench(name: str, *arguments: str) -> tuple[str, ...]:
        out = str(results / f"gpu_{name}.jsonl")
        script = f"profiling/{SCRIPTS.get(name, f'bench_{name}')}.py"
        return python(script, "--device", "cuda", "--out", out, "--commit", commit, *arguments)

    # all at 1x2x2 takes a minute a forward with ten memory videos
    few = ("--memory", "10", "3", "0", "--most-uniform", "1", "--rounds", "2", "--seconds", "55")
    turns = ("--denoising", "--memory", "10", "--steps", "2")
    tests = python("-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider")
    return [
        Stage("build", python("setup.py", "-q", "build_ext", "--inplace"), 35),
        # a file that cannot be collected, for want of a package, must not hide the others
        Stage("tests", (*tests, "--continue-on-collection-errors", *gpu_tests()), 105),
        Stage("roofline", bench("roofline"), 45),
        Stage("memory", bench("memory", *few), 90),
        Stage("block", bench("block"), 35),
        Stage("ops", bench("ops", "--seconds", "50"), 75),
        Stage("engine", bench("engine", *turns), 35),
        Stage("peers", bench("peers", "--rounds", "1"), 40),
        Stage("graphs", bench("graphs"), 45),
        Stage("batch", bench("batch", "--rounds", "5"), 30),
    ]


def gpu_tests() -> list[str]:
    """The files that hold a test marked gpu; the others may need packages that are not there."""
    return [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "pytest.mark.gpu" in path.read_text(encoding="utf-8")
    ]


def _run(
    command: Sequence[str], environment: dict[str, str], seconds: float
) -> tuple[int | None, str]:
    """Exit status, None if it ran out of time, and what it printed; 127 if it cannot be started."""
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return 127, f"{command[0]} cannot be started: {error.strerror}"
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        # with the processes that it started: they would hold the device
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        return None, said
    return process.returncode, said


def run_stage(stage: Stage, seconds: float) -> dict[str, Any]:
    """The stage's row: how it ended, how long it took, and what it said if it failed."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path.rstrip(os.pathsep), "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    returncode, said = _run(stage.command, environment, seconds)
    print(said, flush=True)
    row: dict[str, Any] = {"stage": stage.name, "ok": returncode == 0}
    row |= {"returncode": returncode, "timed_out": returncode is None, "limit_s": round(seconds, 1)}
    row["seconds"] = round(time.monotonic() - began, 1)
    if stage.name == "tests":
        counted = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", said)
        row["tests"] = {kind: int(count) for count, kind in counted}
    # what setup.py says of a library that it could not build
    row["warnings"] = re.findall(r"^warning: (.+)$", said, re.MULTILINE)
    if not row["ok"]:
        row["said"] = said[-TAIL:]
    return row


def run_stages(stages: Sequence[Stage], report: Any, limit: float) -> bool:
    """Run them all, saving each one's row; whether all of them succeeded."""
    deadline = time.monotonic() + limit
    for stage in stages:
        seconds = min(stage.seconds, deadline - time.monotonic())
        if seconds <= 0:
            report.add(stage=stage.name, ok=False, skipped=f"{limit:g} s were used up")
            continue
        print(f"== {stage.name}, {seconds:.0f} s at most: {' '.join(stage.command)}", flush=True)
        report.add(**run_stage(stage, seconds))
    return all(row["ok"] for row in report.rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="print the stages and stop")
    parser.add_argument("--results", type=Path, default=ROOT / "profiling" / "results")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="some of the stages")
    parser.add_argument("--commit", help="of a copy without its git history")
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    from measure import Report, current_commit, provenance, table

    commit = args.commit or current_commit()
    stages = plan(args.results.resolve(), commit)
    unknown = set(args.only or ()) - {stage.name for stage in stages}
    if unknown:
        parser.error(f"no stage {sorted(unknown)}; there are {[stage.name for stage in stages]}")
    stages = [stage for stage in stages if not args.only or stage.name in args.only]
    if args.dry_run:
        for stage in stages:
            print(f"{stage.name:<6} {stage.seconds:>4.0f} s  {' '.join(stage.command)}")
        print(f"at most {LIMIT} s in all; results in {args.results}")
        return
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"CUDA {built} finds none" if built else "this torch is built without CUDA"
        sys.exit(f"the GPU suite needs a CUDA device: {why}; --dry-run prints what it would do")
    device = torch.device("cuda")
    report = Report(args.results / "gpu_suite.jsonl", provenance(device, commit))
    ok = run_stages(stages, report, LIMIT)
    print(table(report.rows, "stage ok seconds limit_s returncode skipped"))
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
