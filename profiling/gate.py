"""The hot paths of this checkout against those of a commit, turn about in one run; fails if slower.

`python profiling/gate.py [--baseline COMMIT] [--ratio 1.15] [--out FILE]`

The commit is checked out into a temporary worktree; without one it is that of
`profiling/results/hot_paths.json`. The cases are this checkout's (`hot_paths.py`), the engine is
each version's own. A case fails where the median over rounds of new seconds over old, of the same
round, is above the ratio; one that the old engine cannot run is said and does not fail.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BASELINE = HERE / "results" / "hot_paths.json"
SECONDS = 0.2  # that one measurement of a case takes, about
COLUMNS = "case ratio old_ms new_ms rounds passed skipped"


def serve() -> None:
    """A version's process: a case's name in, a JSON line with its seconds a call out."""
    import torch

    sys.path.insert(0, str(HERE))
    from hot_paths import CASES

    torch.set_num_threads(1)
    ready: dict[str, tuple[Any, int]] = {}
    for line in sys.stdin:
        name = line.rstrip("\n")
        try:
            with torch.no_grad():
                if name not in ready:
                    ready[name] = _prepared(CASES[name]())
                call, count = ready[name]
                began = time.process_time()
                for _ in range(count):
                    call()
                said: dict[str, Any] = {"seconds": (time.process_time() - began) / count}
        # what a case of now raises in an engine of then
        except Exception as error:
            said = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(said), flush=True)


def _prepared(call: Any) -> tuple[Any, int]:
    """A warm call, and how many of them a measurement takes."""
    call()
    began = time.process_time()
    call()
    return call, max(1, int(SECONDS / max(time.process_time() - began, 1e-6)))


class Version:
    """An engine at a path, in a process of its own."""

    def __init__(self, root: Path) -> None:
        path = f"import sys; sys.path[:0] = {[str(root), str(HERE)]!r}; import gate; gate.serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", path],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self, case: str) -> float:
        """A call's, of one measurement.

        Raises:
            RuntimeError: this version cannot run the case.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(case + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        said = json.loads(line) if line else {"error": "its process ended"}
        if "error" in said:
            raise RuntimeError(said["error"])
        return float(said["seconds"])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A temporary worktree of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "baseline"
        _git("worktree", "add", "--detach", "--quiet", str(tree), commit)
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> None:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)} failed: {done.stderr.strip()}")


def compare(old: Version, new: Version, cases: list[str], rounds: int, ratio: float) -> list[Any]:
    """A row a case; versions take turns, and who begins changes with every round."""
    rows: list[dict[str, Any]] = []
    for case in cases:
        row: dict[str, Any] = {"case": case}
        try:
            new.seconds(case)
        except RuntimeError as failed:
            rows.append(row | {"passed": False, "skipped": f"this version: {failed}"})
            continue
        try:
            old.seconds(case)
        except RuntimeError as failed:
            rows.append(row | {"passed": True, "skipped": f"the baseline: {failed}"})
            continue
        times: list[tuple[float, float]] = []
        for number in range(rounds):
            if number % 2:
                now, then = new.seconds(case), old.seconds(case)
            else:
                then, now = old.seconds(case), new.seconds(case)
            times.append((then, now))
        found = median(now / then for then, now in times)
        rows.append(
            row
            | {
                "ratio": round(found, 4),
                "old_ms": round(median(then for then, _ in times) * 1e3, 4),
                "new_ms": round(median(now for _, now in times) * 1e3, 4),
                "rounds": rounds,
                "passed": found <= ratio,
            }
        )
    return rows


def baseline_commit() -> str:
    """The commit of the committed baseline."""
    if not BASELINE.exists():
        raise SystemExit(f"there is no {BASELINE.relative_to(ROOT)}; name a commit with --baseline")
    found = json.loads(BASELINE.read_text(encoding="utf-8"))["commit_info"]["id"]
    return str(found).removesuffix("-dirty")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--baseline", help="a commit; without it the committed baseline's")
    parser.add_argument("--ratio", type=float, default=1.15, help="new over old, at most")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="some of them")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import torch
    from hot_paths import CASES
    from measure import Report, provenance, table

    cases = args.cases or list(CASES)
    if unknown := set(cases) - set(CASES):
        parser.error(f"no case {sorted(unknown)}; there are {list(CASES)}")
    baseline = args.baseline or baseline_commit()
    with checked_out(baseline) as tree, contextlib.ExitStack() as stack:
        old, new = (stack.enter_context(contextlib.closing(Version(root))) for root in (tree, ROOT))
        rows = compare(old, new, cases, args.rounds, args.ratio)
    common = provenance(torch.device("cpu")) | {"baseline": baseline, "ratio_at_most": args.ratio}
    report = Report(args.out, common)
    for row in rows:
        report.add(**row)
    print(table(rows, COLUMNS))
    slower = [row["case"] for row in rows if not row["passed"]]
    if slower:
        sys.exit(f"slower than {baseline[:12]} by more than {args.ratio:g}: {', '.join(slower)}")
    print(f"no case is slower than {baseline[:12]} by more than {args.ratio:g}")


if __name__ == "__main__":
    main()
