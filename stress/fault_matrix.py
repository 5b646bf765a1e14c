"""What a client sees of every fault at every moment, and what is lost: nothing may be.

`python stress/fault_matrix.py [--out profiling/results/fault_matrix.jsonl] [--only WORDS ...]
    [--kills 100] [--minutes M]`

The real command with tiny-nvs, its worker and its prober, on a small disk of its own. A client
makes sessions, branches and turns and remembers what it was told; then a moment is reached, the
fault comes, the service is started again if it has ended, and everything that the client was told
is asked for, byte by byte. Moments between two file operations are held by a preloaded library
(`faults.c`), which also knows what a power cut leaves; nothing in the service knows of it.

Rows that `--out` has already are not made again, so that a long run can be cut in parts; its table
is the guide's (`python profiling/readme_numbers.py`). Exit code 1 if anything was lost, or the
service did not go on.
"""

from __future__ import annotations

import argparse
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, get_args

# what a result says of its machine is the benchmarks'
sys.path.append(str(Path(__file__).resolve().parents[1] / "profiling"))

import torch
from faults import OUTCOMES, Outcome
from http_service import NotServed
from measure import ROOT, Report, provenance, read_rows
from trial import Lost, Moment, Space, Trial, Which

from mv2v_engine.video.io import write_video

MOMENTS: tuple[Moment, ...] = get_args(Moment)
# while the database is locked: shorter, and longer, than the service waits for it
LOCKED_SECONDS = (3.0, 40.0)
# while the disk is full
FULL_SECONDS = 5.0
# kills in one row, and how long after the start one comes at most
KILLS_A_ROW, KILL_SECONDS = 10, 6.0
_OF = {"uploading": "the upload", "deleting": "the deletion", "idle": "", "loading": ""}

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One fault at one moment, or so many kills at random ones.

    run: brings it about; what a client sees, in words.
    """

    fault: str
    process: str
    moment: str
    run: Callable[[Trial], str]
    kills: int = 0

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.fault, self.process, self.moment)))


def cases(kills: int, seed: int) -> Iterator[Case]:
    """All of them, those first that may lose most. kills: at random, in rows of some."""
    yield from _signals(signal.SIGKILL)
    for moment, outcome in product(MOMENTS, OUTCOMES):
        run = partial(_power_cut, moment=moment, outcome=outcome, seed=seed)
        yield Case(f"power cut ({outcome})", "all", moment, run)
    for first in range(0, kills, KILLS_A_ROW):
        some = min(KILLS_A_ROW, kills - first)
        run = partial(_random_kills, count=some, choose=random.Random(f"{seed} {first}"))
        moment = f"at random, {first + 1} to {first + some}"
        yield Case("SIGKILL, power cut", "any, all", moment, run, kills=some)
    for what in get_args(Space):
        for moment in ("idle", "sampling", "publishing", "deleting", "starting"):
            yield Case(what, "", moment, partial(_no_space, what=what, moment=moment))
    for seconds, moment in product(LOCKED_SECONDS, ("idle", "sampling", "deleting", "starting")):
        name = f"database locked for {seconds:g} s"
        yield Case(name, "", moment, partial(_locked, seconds=seconds, moment=moment))
    for which in ("worker", "server"):
        run = partial(_no_memory, which=which)
        yield Case("memory taken by others", which, "sampling", run)
    for sig in (signal.SIGTERM, signal.SIGSTOP, signal.SIGINT):
        yield from _signals(sig)


def _signals(sig: signal.Signals) -> Iterator[Case]:
    for which, moment in product(get_args(Which), MOMENTS):
        # the prober works while a video is uploaded, and is idle at any other moment
        if which != "prober" or moment in ("idle", "uploading"):
            name = "SIGSTOP, then SIGCONT" if sig == signal.SIGSTOP else sig.name
            run = partial(_signal, sig=sig, which=which, moment=moment)
            yield Case(name, which, moment, run)


def _seen(moment: str, *words: str) -> str:
    subject = _OF.get(moment, "the turn")
    return "; ".join(filter(None, [f"{subject}: {words[0]}" if subject else "", *words[1:]]))


def _signal(trial: Trial, sig: signal.Signals, which: Which, moment: Moment) -> str:
    under_way = trial.reach(moment, which)
    seen = trial.signal(sig, which)
    return _seen(moment, under_way.result(), seen)


def _power_cut(trial: Trial, moment: Moment, outcome: Outcome, seed: int) -> str:
    under_way = trial.reach(moment)
    trial.kill()
    seen = _seen(moment, under_way.result())
    trial.power_cut(outcome, random.Random(f"{seed} {moment}"))
    return seen


def _no_space(trial: Trial, what: Space, moment: str) -> str:
    """The disk takes no more bytes, or no more names, for some seconds."""
    if moment == "idle":
        trial.ready()
        session, spare = trial.disposable(), trial.some_session()
        with trial.full(what):
            upload, turn = trial.witness.create()[0], trial.witness.ask(spare, steps=1)[0]
            deletion = trial.witness.delete(session)[0]
        return f"an upload: {upload}; a turn: {turn}; a deletion: {deletion}"
    under_way = trial.reach("sampling" if moment == "starting" else moment)  # type: ignore[arg-type]
    with trial.full(what):
        if moment == "starting":
            # a turn is under way when it is killed, and the start finds the disk full
            trial.signal(signal.SIGKILL, "server")
            return _seen("sampling", under_way.result(), _started(trial))
        trial.faults.release()
        is_soon = under_way in wait([under_way], FULL_SECONDS).done
    return _seen(moment, under_way.result() + ("" if is_soon else ", once there is room"))


def _started(trial: Trial) -> str:
    try:
        trial.begin()
    except NotServed:
        return "the service does not start"
    return "the service starts"


def _locked(trial: Trial, seconds: float, moment: str) -> str:
    """Another process writes to the database for so long."""
    if moment in ("idle", "starting"):
        trial.ready()
        session = trial.some_session()
        if moment == "starting":
            trial.stop()
        free = trial.locked(seconds)
        seen = _started(trial) if moment == "starting" else f"a turn: {trial.turn(session)}"
    else:
        under_way = trial.reach(moment)  # type: ignore[arg-type]
        free = trial.locked(seconds)
        trial.faults.release()
        seen = _seen(moment, under_way.result())
    free.join()
    return seen


def _no_memory(trial: Trial, which: Which) -> str:
    """A process gets no more memory, until the client has seen it."""
    under_way = trial.reach("sampling")
    with trial.short_of_memory(which):
        return _seen(
            "sampling", under_way.result(), f"the next: {trial.turn(trial.some_session())}"
        )


def _random_kills(trial: Trial, count: int, choose: random.Random) -> str:
    """Kills while clients work, each at any time after a start; some are power cuts."""
    trial.ready()
    trial.some_session()
    for _ in range(count):
        trial.begin()
        wrong = trial.witness.lost()
        if wrong:
            raise Lost(wrong)
        if choose.random() < 0.5:
            # or it would mostly meet a worker that loads
            trial.ready()
        kind = choose.random()
        with trial.busy(choose):
            time.sleep(choose.uniform(0.0, KILL_SECONDS))
            if kind < 0.3:
                trial.kill()
            else:
                trial.signal(signal.SIGKILL, "worker" if kind < 0.5 else "server")
        if kind < 0.3:
            trial.power_cut(choose.choice(OUTCOMES), choose)
    return ""


class Matrix:
    """Cases one after the other, on one store as long as it holds. make: another trial."""

    def __init__(self, make: Callable[[], Trial], report: Report, about: Row) -> None:
        self.make, self.report, self.about = make, report, about
        self.trial: Trial | None = None

    def run(self, case: Case) -> None:
        """One row. What comes after it does not suffer from what it lost."""
        began, seen, wrong = time.monotonic(), "", list[str]()
        before = self.trial.witness.num_turns if self.trial is not None else 0
        try:
            if self.trial is None:
                self.trial = self.make()
            seen = case.run(self.trial)
            wrong = self.trial.settled()
        except Lost as error:
            wrong = error.what
        except (NotServed, RuntimeError, TimeoutError, OSError) as error:
            wrong = [f"{type(error).__name__}: {_last_line(error)}"]
        seconds = round(time.monotonic() - began, 1)
        turns = self.trial.witness.num_turns if self.trial is not None else 0
        fields: Row = {"fault": case.fault, "process": case.process, "moment": case.moment}
        found: Row = {"seen": seen, "lost": wrong, "turns": turns, "seconds": seconds}
        if case.kills:
            found |= {"kills": case.kills, "finished": turns - before}
        self.report.add(name=case.name, **fields, **found, **self.about)
        print(f"{case.name}: {seen}; lost: {wrong or 'nothing'} ({seconds} s)", flush=True)
        if wrong:
            self.close()

    def close(self) -> None:
        if self.trial is not None:
            self.trial.close()
            self.trial = None


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[-1][:300]


def write_clip(path: Path, seed: int = 0) -> bytes:
    """A clip that the embedded model and those of the tests take."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (20, 12, 16, 3), dtype=torch.uint8, generator=generator)
    write_video(path, small.repeat_interleave(8, 1).repeat_interleave(8, 2), 8)
    return path.read_bytes()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", default=[""], metavar="WORDS", help="cases whose name has any of them")
    add("--kills", type=int, default=100, help="at random")
    add("--minutes", type=float, default=60.0, help="no case is begun after so many")
    add("--seed", type=int, default=0)
    add("--list", action="store_true", help="the cases' names alone")
    add("--small", action="store_true", help="weights of the tests")
    add("--out", type=Path)
    args = parser.parse_args(argv)
    chosen = [
        case
        for case in cases(args.kills, args.seed)
        if any(words in case.name for words in args.only)
    ]
    if args.list:
        print(*(case.name for case in chosen), sep="\n")
        return 0
    deadline = time.monotonic() + 60 * args.minutes
    # every row says of which commit it is
    report = Report(args.out, {})
    if args.out is not None and args.out.exists():
        report.rows = read_rows(args.out)
    known = {row["name"] for row in report.rows}
    with tempfile.TemporaryDirectory() as name:
        words = ["--device", "cpu", "--min-free", "0", "--grace", "30"]
        if args.small:
            sys.path.append(str(ROOT))  # where the tests' own modules are found
            make = runpy.run_path(str(ROOT / "tests" / "conftest.py"))["save_tiny"]
            words += ["--checkpoint", str(make(Path(name) / "small"))]
        clip, about = write_clip(Path(name) / "clip.mp4"), provenance(torch.device("cpu"))

        def trial() -> Trial:
            return Trial(Path(tempfile.mkdtemp(dir=name)), clip, *words)

        matrix = Matrix(trial, report, about)
        try:
            for case in chosen:
                if case.name not in known and time.monotonic() < deadline:
                    matrix.run(case)
        finally:
            matrix.close()
    missing = {case.name for case in chosen} - {row["name"] for row in report.rows}
    lost = [row["name"] for row in report.rows if row["lost"]]
    left = f"{len(report.rows)} rows, {len(missing)} still to be made"
    print(f"{left}; lost: {lost or 'nothing'}")
    return 1 if lost else 0


def in_own_namespace() -> None:
    """Go on in this process where file systems may be mounted, which are gone with it."""
    if os.environ.get("FAULT_MATRIX") is None:
        os.environ["FAULT_MATRIX"] = "1"
        os.execvp("unshare", ["unshare", "-rm", sys.executable, *sys.argv])


if __name__ == "__main__":
    in_own_namespace()
    # so that nothing that was started outlives it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
