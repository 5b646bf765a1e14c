"""How soon a service answers while it makes a turn: /healthz and a job's status, by percentiles.

`python profiling/bench_service.py [--seconds 30] [--out profiling/results/service.jsonl]`

The real command with tiny-nvs and its worker. The clients are a process of their own, which sends
at the times of a clock: an answer's time counts from when its request was due, so that one slow
answer does not hide the waiting of those behind it. Also the same without a turn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from http_service import Served, demo_clip, finished_job, new_session, served
from measure import Report, digits, provenance, table

TARGET_MS = 50.0
COLUMNS = "while route rate requests p50_ms p90_ms p99_ms max_ms errors turns"
# of a turn's steps: more than the measuring takes, and it is cancelled then
_STEPS = 1000


async def send_at_rate(address: str, paths: list[str], rate: float, seconds: float) -> Any:
    """Send to the paths in turn; {path: seconds of each answer}, and how many were no good ones."""
    found: dict[str, list[float]] = {path: [] for path in paths}
    errors = 0

    async def send(client: httpx.AsyncClient, path: str, due: float) -> None:
        nonlocal errors
        await asyncio.sleep(due - time.perf_counter())
        try:
            answer = await client.get(path)
            errors += answer.status_code != 200
        except httpx.HTTPError:
            errors += 1
        found[path].append(time.perf_counter() - due)

    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        # connections are there before the clock runs
        await asyncio.gather(*(client.get(paths[0]) for _ in range(8)))
        began = time.perf_counter() + 0.1
        count = round(rate * seconds)
        await asyncio.gather(
            *(send(client, paths[i % len(paths)], began + i / rate) for i in range(count))
        )
    return {"seconds": found, "errors": errors}


def clients(address: str, paths: list[str], rate: float, seconds: float) -> Any:
    """`send_at_rate` in a process of its own."""
    asked = json.dumps([address, paths, rate, seconds])
    command = [sys.executable, str(Path(__file__).resolve()), "--as-clients", asked]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def percentile(values: list[float], share: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[share - 1]


def rows(state: str, found: Any, rate: float, turns: int) -> list[dict[str, Any]]:
    names = {"/healthz": "/healthz"}
    return [
        {
            "while": state,
            "route": names.get(path, "/v1/jobs/{job_id}"),
            "rate": rate,
            "requests": len(seconds),
            **{f"p{p}_ms": digits(1e3 * percentile(seconds, p)) for p in (50, 90, 99)},
            "max_ms": digits(1e3 * max(seconds)),
            "errors": found["errors"],
            "turns": turns,
        }
        for path, seconds in found["seconds"].items()
    ]


def measured(service: Served, clip: bytes, rate: float, seconds: float) -> list[dict[str, Any]]:
    """With and without a turn under way."""
    with service.client() as client:
        session = new_session(client, clip)
        done = finished_job(client, session, camera="pan:5", num_inference_steps=1)
        idle = clients(service.address, ["/healthz", f"/v1/jobs/{done}"], rate, seconds)
        asked = {"camera": "arc:-40", "num_inference_steps": _STEPS}
        job = client.post(f"/v1/sessions/{session}/turns", json=asked).json()["id"]
        path = f"/v1/jobs/{job}"
        before = _steps(client, path, at_least=2)
        busy = clients(service.address, ["/healthz", path], rate, seconds)
        state = client.get(path).json()
        steps = state["progress"]["step"] - before
        if state["state"] != "running" or steps < 2:
            raise SystemExit(f"the turn did not go on beside the requests: {state}")
        client.delete(path)
        client.get(f"{path}/events")
    return [*rows("idle", idle, rate, 0), *rows("a turn is made", busy, rate, 1)]


def _steps(client: httpx.Client, path: str, at_least: int) -> int:
    """The steps that a turn has made, once they are so many."""
    while True:
        progress = client.get(path).json()["progress"] or {}
        if progress.get("type") == "step_done" and progress["step"] >= at_least:
            steps: int = progress["step"]
            return steps
        time.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, metavar="S")
    parser.add_argument("--rate", type=float, default=50.0, metavar="N", help="requests a second")
    parser.add_argument("--device", default="cpu", metavar="D")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--commit", help="for a copy without its history")
    parser.add_argument("--as-clients", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_clients is not None:
        print(json.dumps(asyncio.run(send_at_rate(*json.loads(args.as_clients)))))
        return 0

    report = Report(
        args.out, provenance(torch.device(args.device), args.commit) | {"cores": os.cpu_count()}
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip = demo_clip(folder)
        with served(folder, "--device", args.device, "--min-free", "0") as service:
            for row in measured(service, clip, args.rate, args.seconds):
                report.add(**row, target_ms=TARGET_MS)
    print(table(report.rows, COLUMNS))
    busy = [row for row in report.rows if row["turns"]]
    is_met = all(row["p99_ms"] <= TARGET_MS and not row["errors"] for row in busy)
    print(json.dumps({"is_met": is_met, "target_ms": TARGET_MS, "rows": report.rows}))
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
