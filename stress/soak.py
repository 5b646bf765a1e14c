"""Whether an engine stays as it is: hundreds of turns of sessions that come and go.

`python stress/soak.py [--turns 500] [--small] [--out profiling/results/soak.json]`

Sessions with and without a folder are opened, continued, resumed, cancelled at any moment, closed
and dropped, on an engine without tiers and on one with a small device arena; disks run full and
get room again. Every few turns all sessions are let go of and what is left is measured. It fails,
exit code 1, if any of it grows. Turns are short (`--steps`): their number counts, not their work;
`--small` takes the tests' random weights for 9 frames of 48x64, ten times as quick as `tiny-nvs`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import random
import runpy
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# what a result says of its machine, and how `run serve` is started, is the benchmarks'
sys.path.append(str(Path(__file__).resolve().parents[1] / "profiling"))

import torch
from measure import ROOT, provenance, table
from torch import Tensor

from mv2v_engine import CancelToken, Engine
from mv2v_engine.engine.request import Request
from mv2v_engine.engine.results import ViewResults
from mv2v_engine.engine.session import Session
from mv2v_engine.errors import CancelledError
from mv2v_engine.files import save_json
from mv2v_engine.models import rope
from mv2v_engine.testing import largest_file

MOVES = ("pan", "tilt", "arc")
MOST_SESSIONS, MOST_FOLDERS, MOST_TURNS = 4, 4, 12
# what is left may not grow: per measure, by how much it may between the first and the last samples
ALLOWED = {
    "open_files": 0,
    "threads": 0,
    "cache_entries": 0,
    "cache_bytes": 0,
    "frames_bytes": 0,
    "unfinished_files": 0,
    "device_bytes": 0,
    "tensors": 8,
}
# host memory is a matter of the allocator too
ALLOWED_HOST_BYTES = 16 << 20
COLUMNS = (
    "turns rss_mib objects tensors open_files threads cache_entries cache_bytes frames_bytes "
    "rotary_tables graphs unfinished_files"
)


class Countdown(CancelToken):
    """Cancels at its n-th check, wherever that is."""

    def __init__(self, checks: int) -> None:
        super().__init__()
        self._left = checks

    def check(self) -> None:
        self._left -= 1
        if self._left <= 0:
            self.cancel()
        super().check()


class Soak:
    """The sessions of one run. steps: of a turn, at most."""

    def __init__(self, engine: Engine, source: Tensor, folder: Path, *, steps: int, seed: int):
        video, config = engine.video_bytes, engine.config
        frames = 3 * source.nbytes
        loose = replace(config, cache_bytes=12 * video, frames_bytes=frames)
        tiers = replace(loose, cache_bytes=6 * video, device_cache_bytes=3 * video)
        static = replace(tiers, conditioning="static")
        self.engines = [engine.reconfigured(one) for one in (loose, tiers, static)]
        self.source, self.folder, self.steps = source, folder, steps
        self.random = random.Random(seed)
        self.open: list[tuple[Session, ViewResults | None]] = []
        self.done: Counter[str] = Counter()
        self.num_folders = 0

    def step(self) -> None:
        """One turn, and now and then something else."""
        pick = self.random.random
        if (len(self.open) < MOST_SESSIONS and pick() < 0.4) or not self.open:
            self._begin()
        index = self.random.randrange(len(self.open))
        session, results = self.open[index]
        if pick() < 0.2:
            self._cancelled(session)
        if results is not None and pick() < 0.1:
            with largest_file(self.random.choice((100, 5_000, 50_000))):
                self._turn(session)
                self.done["without room"] += 1
        else:
            self._turn(session)
        if results is not None and pick() < 0.3:
            results.publish(session, version="soak")
            self.done["published"] += 1
        if pick() < 0.2:
            # those of long ago too: read from the folder and decoded again
            turn = self.random.choice(session.turns)
            assert turn.frames.shape == self.source.shape and turn.latents.isfinite().all()
        if len(session.turns) >= MOST_TURNS or pick() < 0.1:
            del self.open[index]
            self._end(session)

    def warm_up(self) -> None:
        """Everything once: libraries load and pools fill on first use."""
        for engine in self.engines:
            for folder in (None, self.folder / f"warm{self.engines.index(engine)}"):
                session = engine.session(self.source, store=folder)
                self._turn(session)
                self._turn(session)
                if folder is not None:
                    ViewResults(folder).publish(session, version="soak")
                    session.close()
                    session = engine.session(self.source, store=folder, resume=True)
                    with largest_file(100):
                        self._turn(session)
                    self._cancelled(session)
                    shutil.rmtree(folder)
        self.done.clear()

    def rest(self) -> None:
        """Let go of every session."""
        while self.open:
            self._end(self.open.pop()[0])

    def _begin(self) -> None:
        engine = self.random.choice(self.engines)
        if self.random.random() < 0.4:
            self.open.append((engine.session(self.source), None))
            self.done["opened"] += 1
            return
        kept = sorted(self.folder.iterdir())
        in_use = {results.folder for _, results in self.open if results}
        free = [path for path in kept if path not in in_use]
        if free and self.random.random() < 0.5:
            folder, resume = self.random.choice(free), True
        else:
            for old in free[: max(len(kept) + 1 - MOST_FOLDERS, 0)]:
                shutil.rmtree(old)
            self.num_folders += 1
            folder, resume = self.folder / f"{self.num_folders:05d}", False
        session = engine.session(self.source, store=folder, resume=resume)
        self.open.append((session, ViewResults(folder)))
        self.done["resumed" if resume else "opened with a folder"] += 1

    def _end(self, session: Session) -> None:
        if self.random.random() < 0.5:
            session.close()
            self.done["closed"] += 1
        else:
            self.done["dropped"] += 1

    def _request(self, session: Session) -> Request:
        pick = self.random
        memory = pick.choices(("retrieved", "none", "previous", "alone"), (8, 1, 1, 1))[0]
        return Request.view(
            f"{pick.choice(MOVES)}:{pick.choice((-20, -12, -5, 5, 12, 20))}",
            session.parts.sampling,
            seed=pick.randrange(1000),
            num_inference_steps=pick.randint(1, self.steps),
            memory=memory,
        )

    def _turn(self, session: Session) -> None:
        turn = session.ask(self._request(session))
        self.done["turns"] += 1
        self.done["memory videos"] += len(turn.report["memory"]["retrieved"])
        self.done["not stored at first"] += "storage_error" in turn.report

    def _cancelled(self, session: Session) -> None:
        num_turns = len(session.turns)
        turn = session.events(self._request(session), Countdown(self.random.randint(1, 20)))
        try:
            for number, _ in enumerate(turn):
                if number == 6 and self.random.random() < 0.3:
                    turn.close()  # a client that goes away does this
                    self.done["abandoned"] += 1
                    return
            # it had fewer checks than that
            self.done["turns"] += 1
        except CancelledError:
            assert len(session.turns) == num_turns
            self.done["cancelled"] += 1

    def unfinished(self) -> int:
        """Temporary files that should have been renamed or removed."""
        return sum(path.name.startswith(".") for path in self.folder.rglob("*"))


def measured(soak: Soak) -> dict[str, int]:
    """What is left when no session is open."""
    soak.rest()
    engines = soak.engines
    rotary_tables = rope.table_on.cache_info().currsize
    graphs = sum(len(engine.graphs) for engine in engines)
    graph_bytes = sum(sum(engine.graphs.bytes().values()) for engine in engines)
    # these it may keep; what else is left shows without them
    rope.table_on.cache_clear()
    for engine in engines:
        engine.graphs.clear()
    gc.collect()
    gc.collect()  # what finalizers let go of
    found = {
        "turns": soak.done["turns"],
        "cache_entries": sum(len(engine.cache.ids()) for engine in engines),
        "cache_bytes": sum(engine.cache.bytes_used for engine in engines),
        "frames_bytes": sum(engine.recent_frames.bytes_used for engine in engines),
        "rotary_tables": rotary_tables,
        "graphs": graphs,
        "graph_bytes": graph_bytes,
        "unfinished_files": soak.unfinished(),
        "threads": _status("Threads"),
        "open_files": len(os.listdir("/proc/self/fd")),
        "device_bytes": torch.cuda.memory_allocated() if torch.cuda.is_available() else 0,
    }
    objects = gc.get_objects()
    found["objects"] = len(objects)
    found["tensors"] = sum(issubclass(type(one), Tensor) for one in objects)
    del objects
    with_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if with_trim is not None:
        with_trim(0)
    found["rss_bytes"] = _status("VmRSS") * 1024
    return found


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def growth(samples: list[dict[str, int]], *, graph_bytes: int = 0) -> dict[str, Any]:
    """How far the last third of the samples lies above the first, by median.

    graph_bytes: what captured steps of all engines may hold.

    Each with what is allowed; one of the collector's objects for every fourth turn would be a leak.
    """
    third = max(len(samples) // 3, 1)
    early, late = samples[:third], samples[-third:]
    turns = statistics.median(s["turns"] for s in late) - statistics.median(
        s["turns"] for s in early
    )
    allowed = {**ALLOWED, "objects": turns / 4 + 100, "rss_bytes": ALLOWED_HOST_BYTES}
    rows = {}
    for name, most in allowed.items():
        low, high = (statistics.median(s[name] for s in part) for part in (early, late))
        rows[name] = {"early": low, "late": high, "allowed": most, "grows": high - low > most}
    # these fill up to what they are allowed
    caps = {
        "rotary_tables": rope.table_on.cache_info().maxsize or 0,
        "graph_bytes": graph_bytes,
    }
    for name, cap in caps.items():
        most = max(sample[name] for sample in samples)
        rows[name] = {"late": most, "allowed": cap, "grows": most > cap}
    return rows


def soaked(
    soak: Soak, *, turns: int, every: int, show: Callable[[str], None] = print
) -> dict[str, Any]:
    """Run until `turns` are done and say what grew."""
    soak.warm_up()
    began, samples = time.monotonic(), []
    while soak.done["turns"] < turns:
        soak.step()
        if soak.done["turns"] >= every * (len(samples) + 1) or soak.done["turns"] >= turns:
            samples.append(measured(soak))
            show(table([shown(samples[-1])], COLUMNS).splitlines()[-1])
    rows = growth(samples, graph_bytes=sum(one.config.graph_bytes for one in soak.engines))
    return {
        "turns": soak.done["turns"],
        "seconds": round(time.monotonic() - began, 1),
        "done": dict(sorted(soak.done.items())),
        "growth": rows,
        "grows": sorted(name for name, row in rows.items() if row["grows"]),
        "samples": samples,
    }


def shown(sample: dict[str, int]) -> dict[str, Any]:
    return {**sample, "rss_mib": sample["rss_bytes"] >> 20}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=500)
    parser.add_argument("--every", type=int, default=25, help="turns between two samples")
    parser.add_argument("--steps", type=int, default=2, help="denoising steps of a turn, at most")
    parser.add_argument("--seed", type=int, default=0)
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", default="tiny-nvs")
    weights.add_argument("--small", action="store_true", help="weights of the tests")
    parser.add_argument("--device")
    parser.add_argument("--commit", help="of a copy without its history")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.checkpoint
        if args.small:
            path = runpy.run_path(str(ROOT / "tests" / "conftest.py"))["save_tiny"](Path(folder))
        engine = Engine.from_pretrained(path, device=args.device)
    size, frames = engine.sampling.size, engine.sampling.num_frames
    generator = torch.Generator().manual_seed(args.seed)
    source = torch.randint(0, 256, (frames, *size, 3), dtype=torch.uint8, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(engine, source, Path(folder), steps=args.steps, seed=args.seed)
        result = soaked(soak, turns=args.turns, every=args.every)
    print()
    print(table([shown(sample) for sample in result["samples"]], COLUMNS))
    print(f"{result['turns']} turns in {result['seconds']} s: {result['done']}")
    print("grows: " + (", ".join(result["grows"]) or "nothing"))
    if args.out:
        name = "the tests' own" if args.small else args.checkpoint
        checkpoint = {"checkpoint": name, "steps": args.steps, "seed": args.seed}
        save_json(args.out, checkpoint | provenance(engine.device, args.commit) | result)
    return 1 if result["grows"] else 0


if __name__ == "__main__":
    sys.exit(main())
