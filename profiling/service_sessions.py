"""The service under many sessions at once: what a turn waits, and what a session takes.

`OMP_NUM_THREADS=1 python profiling/service_sessions.py [--sessions 1 10 100] [--steps 2]
[--out profiling/results/service_sessions.jsonl]`

A service of `tiny-nvs` in a process of its own makes one turn of each session, all asked for at
once. Of each number of sessions: turns an hour, the median and the 99th percentile of seconds in
the queue and from asking to the end, and bytes of a session on the disk. All three numbers of
sessions take five minutes of a core.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from http_service import served
from measure import Report, digits, percentile, provenance, table

from mv2v_engine.client import Client
from mv2v_engine.synthetic.demo_clip import write_demo_clip

COLUMNS = (
    "sessions turns_an_hour waiting_p50_s waiting_p99_s whole_p50_s whole_p99_s session_bytes "
    "load_average"
)


def measured(client: Client, clip: Path, sessions: int, steps: int) -> dict[str, Any]:
    """One turn of each of so many sessions."""
    made = [client.create_session(clip) for _ in range(sessions)]
    began = time.perf_counter()
    how: dict[str, Any] = {"camera": "arc:-20", "num_inference_steps": steps}
    jobs = [client.submit(session, **how) for session in made]
    ended = []
    for job in jobs:
        client.wait(job)
        ended.append(client.job(job))
    seconds = time.perf_counter() - began
    waiting = [(job.started or 0) - job.created for job in ended]
    whole = [(job.ended or 0) - job.created for job in ended]
    sizes = [client.session(session).bytes for session in made]
    for session in made:
        client.delete_session(session)
    return {
        "sessions": sessions,
        "steps": steps,
        "turns_an_hour": digits(3600 * sessions / seconds),
        "waiting_p50_s": digits(percentile(waiting, 0.5)),
        "waiting_p99_s": digits(percentile(waiting, 0.99)),
        "whole_p50_s": digits(percentile(whole, 0.5)),
        "whole_p99_s": digits(percentile(whole, 0.99)),
        "session_bytes": round(statistics.fmean(sizes)),
    }


def main() -> None:
    """Measure each number of sessions and report it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = Report(args.out, provenance(torch.device("cpu")))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        write_demo_clip(clip)
        queue = ("--max-queue", str(max(args.sessions) + 1))
        with (
            served(Path(folder), *queue) as found,
            Client(found.address, timeout=600) as client,
        ):
            for sessions in args.sessions:
                row = measured(client, clip, sessions, args.steps)
                row["command"] = f"python profiling/{Path(sys.argv[0]).name} " + " ".join(
                    ["--sessions", *map(str, args.sessions), "--steps", str(args.steps)]
                )
                row |= {"load_average": digits(os.getloadavg()[0]), "cores": os.cpu_count()}
                report.add(**row)
                rows.append(row)
    print(table(rows, COLUMNS))


if __name__ == "__main__":
    main()
