"""Whether the service keeps its promises: sessions, cancels, deletes, and kills at any moment.

`python stress/soak_service.py [--sessions 100] [--turns 3] [--kills 5] [--small]
    [--out profiling/results/soak_service.jsonl]`

Clients make sessions and ask for turns; some are cancelled, some sessions deleted while they work.
Meanwhile the service is killed, half of the times at any moment, half of the times between the
worker's last word of a turn and its row; so is the worker. After each start, and in the end: every
turn that a client was told of is listed, no turn was made twice, no file is an orphan. The kills
come in the first half, so that the memory of a long life is measured after them. Exit code 1 if
any of it fails.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import runpy
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# what a result says of its machine, and how `run serve` is started, is the benchmarks'
sys.path.append(str(Path(__file__).resolve().parents[1] / "profiling"))

import torch
from measure import ROOT, Report, provenance
from service_process import Gone, Refused, ServiceProcess
from store_check import check_store

from mv2v_engine.video.io import write_video

CAMERAS = ("pan_right", "arc_left", "tilt_up", "zoom_in", "pan:-12", "arc:25")
# share of sessions deleted in the middle of their work; share of turns cancelled
DELETED, CANCELLED = 0.15, 0.2
# what a process may hold more at the end of its life than early in it
ALLOWED_BYTES = 24 << 20
# samples of one life without which nothing is said of its memory
MIN_SAMPLES = 12


@dataclass
class Known:
    """What a client was told of its session. turns: job by number."""

    turns: dict[int, str] = field(default_factory=dict)
    is_deleted: bool = False


class Soak:
    """Clients and a killer against one store. counts: what came of the jobs."""

    def __init__(self, args: argparse.Namespace, store: Path, checkpoint: str, clip: Path) -> None:
        self.args, self.store, self.clip = args, store, clip
        self.settings = {"store": store, "checkpoint": checkpoint, "device": "cpu"}
        self.settings |= {"max_queue": 4 * args.clients, "grace": 60.0, "min_free_bytes": 0}
        self.choose = random.Random(args.seed)
        self.server = ServiceProcess(**self.settings)
        self.up = asyncio.Event()
        self.known: dict[str, Known] = {}
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.samples: list[tuple[int, int]] = []
        self.num_ended = 0
        self.ended = asyncio.Event()

    async def run(self) -> None:
        await self.begin()
        waiting = asyncio.Queue[int]()
        for number in range(self.args.sessions):
            waiting.put_nowait(number)
        killer = asyncio.create_task(self.kill())
        await asyncio.gather(*(self.client(waiting) for _ in range(self.args.clients)))
        await killer
        await self.verify(is_last=True)
        if await self.server.stop() != 0:
            self.failures.append("the service did not stop as it should")
        check_store(self.store)

    async def begin(self) -> None:
        """Start the service; whatever was finished must be listed before its worker is ready."""
        self.server = ServiceProcess(**self.settings)
        await self.server.start()
        await self.verify(is_last=False)
        await self.server.call("ready")
        self.samples.clear()
        self.up.set()

    async def call(self, name: str, **arguments: Any) -> Any:
        """Ask until there is an answer: every call may be made twice."""
        while True:
            await self.up.wait()
            server = self.server
            try:
                return await server.call(name, **arguments)
            except Gone:
                if server is self.server:
                    self.up.clear()
                    self.ended.set()
            except Refused as error:
                if error.code not in ("queue_full", "not_ready"):
                    raise
                await asyncio.sleep(0.2)

    async def client(self, waiting: asyncio.Queue[int]) -> None:
        while not waiting.empty():
            await self.session(waiting.get_nowait())

    async def session(self, number: int) -> None:
        """One session's life."""
        key = f"session {number}"
        session = await self.call("create", clip=self.clip, key=key)
        known = self.known.setdefault(session, Known())
        is_to_go = self.choose.random() < DELETED
        turns = [
            asyncio.create_task(self.turn(session, f"{key} turn {turn}", number * 100 + turn))
            for turn in range(self.args.turns)
        ]
        if is_to_go:
            await asyncio.wait(turns[: self.choose.randint(1, len(turns))])
            known.is_deleted = True
            try:
                await self.call("delete", session=session)
            except Refused as error:
                # a kill came between its end and its answer
                if error.code != "not_found":
                    raise
            self.counts["deleted sessions"] += 1
        for result in await asyncio.gather(*turns, return_exceptions=True):
            is_gone = isinstance(result, Refused) and result.code == "not_found"
            if isinstance(result, BaseException) and not (is_gone and is_to_go):
                raise result

    async def turn(self, session: str, key: str, seed: int) -> None:
        """One turn, which may be cancelled, to its end."""
        request = {
            "camera": CAMERAS[seed % len(CAMERAS)],
            "seed": seed,
            "num_inference_steps": self.args.steps,
        }
        job = await self.call("submit", session=session, key=key, request=request)
        is_cancelled = self.choose.random() < CANCELLED
        if is_cancelled:
            await self.call("reach", job=job, kind=self.choose.choice(("queued", "step_done")))
            await self.call("cancel", job=job)
        found = await self.call("wait", job=job)
        state = found["state"]
        self.counts[state] += 1
        if state == "finished":
            self.known[session].turns[found["number"]] = job
        elif state == "failed":
            code = found["error"]["code"]
            self.counts[code] += 1
            if code != "worker_crashed":
                self.failures.append(f"{job} failed: {found['error']}")
        elif not is_cancelled and not self.known[session].is_deleted:
            self.failures.append(f"{job} was cancelled by nobody")
        await self.sample()

    async def sample(self) -> None:
        about = await self.call("about")
        if about["worker_bytes"] is not None:
            self.samples.append((about["server_bytes"], about["worker_bytes"]))
        self.num_ended += 1
        self.ended.set()

    async def kill(self) -> None:
        """Kill the service and the worker, evenly spread over the first half of the turns."""
        half = self.args.sessions * self.args.turns // 2
        kills = ["service"] * self.args.kills + ["worker"] * self.args.worker_kills
        self.choose.shuffle(kills)
        service_kills = 0
        for place, which in enumerate(kills):
            await self.until_ended(half * (place + 1) // (len(kills) + 1))
            if which == "worker":
                worker = (await self.call("about"))["worker"]
                if worker is not None:
                    os.kill(worker, signal.SIGKILL)
                    self.counts["worker kills"] += 1
                continue
            service_kills += 1
            if service_kills % 2:
                await self.call("kill_at_done")
            else:
                await asyncio.sleep(self.choose.uniform(0.0, 2.0))
                self.server.kill()
            await self.server.ended()
            self.counts["service kills"] += 1
            self.up.clear()
            await self.begin()

    async def until_ended(self, count: int) -> None:
        while self.num_ended < count:
            self.ended.clear()
            await self.ended.wait()

    async def verify(self, *, is_last: bool) -> None:
        """Every turn that was told of is there, once, and no request was answered twice."""
        for session, known in list(self.known.items()):
            if known.is_deleted:
                continue
            turns = {
                turn["number"]: turn for turn in await self.server.call("turns", session=session)
            }
            for number, job in known.turns.items():
                if turns.get(number, {}).get("job") != job:
                    self.failures.append(f"turn {number} of {session}, made by {job}, is lost")
            for name in ("job", "request"):
                values = [str(turn[name]) for turn in turns.values()]
                if len(set(values)) < len(values):
                    self.failures.append(f"{session} has two turns of one {name}")
            if is_last:
                for number in turns:
                    await self.server.call("published", session=session, number=number)

    def growth(self) -> dict[str, int] | None:
        """Bytes by which the processes of the last life grew, early samples apart."""
        if len(self.samples) < MIN_SAMPLES:
            return None
        quarter = len(self.samples) // 4
        early, late = self.samples[quarter : 2 * quarter], self.samples[-quarter:]
        found = {}
        for place, name in enumerate(("server", "worker")):
            middles = [statistics.median(row[place] for row in part) for part in (early, late)]
            found[name] = int(middles[1] - middles[0])
        return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--sessions", type=int, default=100)
    add("--turns", type=int, default=3, help="of a session")
    add("--clients", type=int, default=4, help="sessions at work at once")
    add("--kills", type=int, default=5, help="of the service")
    add("--worker-kills", type=int, default=2)
    add("--steps", type=int, default=2, help="denoising steps of a turn")
    add("--seed", type=int, default=0)
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", default="tiny-nvs")
    weights.add_argument("--small", action="store_true", help="weights of the tests")
    add("--out", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = args.checkpoint
        if args.small:
            make = runpy.run_path(str(ROOT / "tests" / "conftest.py"))["save_tiny"]
            checkpoint = str(make(folder / "small"))
        clip = folder / "clip.mp4"
        generator = torch.Generator().manual_seed(args.seed)
        small = torch.randint(0, 256, (20, 12, 16, 3), dtype=torch.uint8, generator=generator)
        write_video(clip, small.repeat_interleave(8, 1).repeat_interleave(8, 2), 8)
        soak = Soak(args, folder / "store", checkpoint, clip)
        began = time.monotonic()
        asyncio.run(soak.run())
    seconds, growth = round(time.monotonic() - began, 1), soak.growth()
    grows = [name for name, more in (growth or {}).items() if more > ALLOWED_BYTES]
    row = {
        "sessions": args.sessions,
        "turns": args.turns,
        "checkpoint": "small" if args.small else args.checkpoint,
        "steps": args.steps,
        "counts": dict(sorted(soak.counts.items())),
        "growth_bytes": growth,
        "failures": soak.failures,
        "seconds": seconds,
    }
    Report(args.out, provenance(torch.device("cpu"))).add(**row)
    print(f"{args.sessions} sessions of {args.turns} turns in {seconds} s: {row['counts']}")
    print("memory: " + ("too few samples" if growth is None else f"grew by {growth} bytes"))
    print(
        *(soak.failures or ["no turn was lost, none was made twice, no file is an orphan"]),
        sep="\n",
    )
    return 1 if soak.failures or grows else 0


if __name__ == "__main__":
    sys.exit(main())
