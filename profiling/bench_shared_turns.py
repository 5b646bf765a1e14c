"""Turns of several sessions that wait together in the service's worker: in packs, or one by one.

`python profiling/bench_shared_turns.py [--device cuda] [--out profiling/results/cuda_turns.jsonl]`

Whole turns of the embedded model, from the request to the mp4, as a worker makes them. Every
session asks for a turn at once, round after round; the first round, which encodes the sources, is
not counted. The two ways run turn about, and ratios are within a round. On a CPU one thread
computes, and seconds are the process's own, so that what else the machine does is left out.
`mean_*` is until a turn is ready, on average.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from http_service import demo_clip
from measure import Report, digits, provenance, table

from mv2v_engine import Engine, EngineConfig
from mv2v_engine.camera.trajectories import PRESETS
from mv2v_engine.config import ConditioningMode
from mv2v_engine.engine.batch import TOKENS
from mv2v_engine.progress import CancelToken
from mv2v_engine.serving.store.folders import source_path
from mv2v_engine.serving.work.host import Host

COLUMNS = "conditioning turns alone_s packed_s speedup mean_alone_s mean_packed_s packed_steps"
MODES: tuple[ConditioningMode, ...] = ("joint", "static")
_END = object()


class Sessions:
    """A worker's host, and so many sessions of one clip."""

    def __init__(self, host: Host, root: Path, clip: bytes, count: int) -> None:
        self.host = host
        is_cpu = host.engine.device.type == "cpu"
        self._clock = time.process_time if is_cpu else time.perf_counter
        self.folders = [root / str(number) for number in range(count)]
        for folder in self.folders:
            folder.mkdir(parents=True)
            source_path(folder).write_bytes(clip)

    def ask(self, number: int, steps: int | None) -> tuple[list[float], list[dict[str, Any]]]:
        """The next turn of every session: when each was ready, in seconds, and their reports."""
        request = {"camera": list(PRESETS)[number % len(PRESETS)]}
        asked: dict[str, Any] = (
            request if steps is None else {**request, "num_inference_steps": steps}
        )
        ready, reports, began = list[float](), list[dict[str, Any]](), self._clock()
        frames = self.host.engine.sampling.num_frames

        def tell(event: dict[str, Any]) -> None:
            if event["type"] == "done":
                ready.append(self._clock() - began)
                reports.append(event["report"])
            assert event["type"] not in ("failed", "cancelled"), event

        left = [
            self.host.run(
                {"id": folder.name, "number": number, "request": asked},
                {"id": str(folder), "frames": frames, "window": "first"},
                folder,
                CancelToken(),
                tell,
            )
            for folder in self.folders
        ]
        while left:
            left = [turn for turn in left if next(turn, _END) is not _END]
            self.host.tick()
        return ready, reports


def compare(
    engine: Engine, conditioning: ConditioningMode, count: int, rounds: int, steps: int | None
) -> dict[str, Any]:
    """A row's figures."""
    with tempfile.TemporaryDirectory() as name:
        root, ways = Path(name), []
        clip = demo_clip(root)
        for label, tokens in (("alone", 1), ("packed", TOKENS)):
            config = EngineConfig(conditioning=conditioning, batch_tokens=tokens)
            host = Host(engine.reconfigured(config), max_open=count)
            ways.append(Sessions(host, root / label, clip, count))
        ratios, times, means = [], [], []
        for number in range(1, rounds + 2):
            found = [way.ask(number, steps) for way in ways]
            (alone, _), (packed, reports) = found
            if number > 1:
                ratios.append(alone[-1] / packed[-1])
                times.append((alone[-1], packed[-1]))
                means.append((sum(alone) / count, sum(packed) / count))
        for way in ways:
            way.host.close()
    return {
        "alone_s": digits(median(row[0] for row in times)),
        "packed_s": digits(median(row[1] for row in times)),
        "speedup": digits(median(ratios)),
        "speedups": [digits(ratio) for ratio in ratios],
        "mean_alone_s": digits(median(row[0] for row in means)),
        "mean_packed_s": digits(median(row[1] for row in means)),
        "steps": reports[0]["num_inference_steps"],
        "packed_steps": reports[0]["packed_steps"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="the checkpoint's if not given")
    parser.add_argument("--checkpoint", default="tiny-nvs", help="of novel views; %(default)s")
    parser.add_argument("--commit", help="of a copy without its git history")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if min(args.turns) < 1 or args.rounds < 1:
        parser.error("--turns and --rounds count from 1")
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    engine = Engine.from_pretrained(args.checkpoint, device=device)
    report = Report(args.out, provenance(device, args.commit))
    for mode in MODES:
        for count in args.turns:
            figures = compare(engine, mode, count, args.rounds, args.steps)
            report.add(model=engine.checkpoint.name, conditioning=mode, turns=count, **figures)
    print(table(report.rows, COLUMNS))


if __name__ == "__main__":
    main()
