"""What a job's status costs a service, and how soon it comes, alone and while a turn is made.

`python profiling/bench_service.py [--rate 500] [--seconds 30] [--against CHECKOUT]
[--out profiling/results/service.jsonl]`

The real command with tiny-nvs and its worker, which has a lower priority. The clients are a process
of their own, which sends at the times of a clock: an answer's time counts from when its request was
due, so that one slow answer does not hide the waiting of those behind it. `tagged` clients send
the answer's tag back (`If-None-Match`) and get no body while it holds. `cpu_us`: microseconds, user
and system, that the service's own process spent on a request, without its worker's. --against:
another checkout, measured before this one, in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch
from http_service import Served, demo_clip, finished_job, new_session, served
from measure import ROOT, Report, digits, percentile, provenance, table

TARGET_MS = 50.0
COLUMNS = (
    "checkout while tagged rate answered_a_second p50_ms p90_ms p99_ms max_ms cpu_us bytes steps "
    "load_average"
)
# steps of a turn: more than the measuring takes, and it is cancelled then
_STEPS = 1000
_CONNECTIONS = 8


async def answer(reader: asyncio.StreamReader) -> tuple[int, str, int]:
    """One answer on a connection: its status, its tag, and the bytes of its body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    lines = (line.partition(":") for line in head.split("\r\n")[1:])
    headers = {name.lower(): value.strip() for name, _, value in lines}
    length = int(headers.get("content-length", 0))
    await reader.readexactly(length)
    return int(head.split(" ", 2)[1]), headers.get("etag", ""), length


async def send_at_rate(
    address: str, path: str, rate: float, seconds: float, is_tagged: bool
) -> dict[str, Any]:
    """Seconds from when each request was due to its answer, and what came."""
    url = urlsplit(address)
    due: asyncio.Queue[float] = asyncio.Queue()
    took: list[float] = []
    sizes: list[int] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        tag = ""
        with closing(writer):
            while True:
                at = await due.get()
                known = f"If-None-Match: {tag}\r\n" if is_tagged and tag else ""
                writer.write(f"GET {path} HTTP/1.1\r\nHost: {url.netloc}\r\n{known}\r\n".encode())
                status, tag, length = await answer(reader)
                if status not in (200, 304):
                    raise SystemExit(f"{path} was answered with {status}")
                took.append(time.perf_counter() - at)
                sizes.append(length)

    count = round(rate * seconds)
    clients = asyncio.gather(*(client() for _ in range(_CONNECTIONS)))
    began = time.perf_counter()
    for number in range(count):
        at = began + number / rate
        if (left := at - time.perf_counter()) > 0:
            await asyncio.sleep(left)
        due.put_nowait(at)
    while len(took) < count and not clients.done():
        await asyncio.sleep(0.01)
    spent = time.perf_counter() - began
    if not clients.done():
        clients.cancel()
    with suppress(asyncio.CancelledError):
        await clients
    return {"seconds": took, "spent": spent, "bytes": sum(sizes) / count}


def row_of(
    service: Served, path: str, rate: float, seconds: float, *, is_tagged: bool
) -> dict[str, Any]:
    """`send_at_rate` in a process of its own, and what the service spent meanwhile."""
    before = service.cpu_seconds()
    asked = json.dumps([service.address, path, rate, seconds, is_tagged])
    command = [sys.executable, str(Path(__file__).resolve()), "--as-clients", asked]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    cpu, took = service.cpu_seconds() - before, found["seconds"]
    return {
        "tagged": is_tagged,
        "rate": rate,
        "answered_a_second": digits(len(took) / found["spent"]),
        **{f"p{p}_ms": digits(1e3 * percentile(took, p / 100)) for p in (50, 90, 99)},
        "max_ms": digits(1e3 * max(took)),
        "cpu_us": digits(1e6 * cpu / len(took)),
        "bytes": round(found["bytes"]),
        "load_average": digits(os.getloadavg()[0]),
    }


def measured(service: Served, clip: bytes, rate: float, seconds: float) -> list[dict[str, Any]]:
    """The rows of a service with a turn under way, and without one."""
    how = rate, seconds
    with service.client() as client:
        session = new_session(client, clip)
        done = finished_job(client, session, camera="pan:5", num_inference_steps=1)
        rows = [
            {"while": "idle", "steps": 0}
            | row_of(service, f"/v1/jobs/{done}", *how, is_tagged=is_tagged)
            for is_tagged in (False, True)
        ]
        asked = {"camera": "arc:-40", "num_inference_steps": _STEPS}
        job = client.post(f"/v1/sessions/{session}/turns", json=asked).json()["id"]
        path = f"/v1/jobs/{job}"
        for is_tagged in (False, True):
            before = _steps(client, path, at_least=2)
            row = row_of(service, path, *how, is_tagged=is_tagged)
            state = client.get(path).json()
            steps = state["progress"].get("step", 0) - before
            if state["state"] != "running" or steps < 1:
                raise SystemExit(f"the turn did not go on beside the requests: {state}")
            rows.append({"while": "a turn is made", "steps": steps} | row)
        client.delete(path)
        client.get(f"{path}/events")
    return rows


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
    parser.add_argument("--rate", type=float, default=500.0, metavar="N", help="requests a second")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT")
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
    checkouts = {"this one": ROOT}
    if args.against is not None:
        checkouts = {"the other one": args.against.resolve(), **checkouts}
    for name, root in checkouts.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            clip = demo_clip(folder)
            words = ("--device", args.device, "--min-free", "0")
            with served(folder, *words, root=root) as service:
                for row in measured(service, clip, args.rate, args.seconds):
                    report.add(checkout=name, **row, target_ms=TARGET_MS)
    print(table(report.rows, COLUMNS))
    busy = [row for row in report.rows if row["steps"] and row["checkout"] == "this one"]
    is_met = all(row["p99_ms"] <= TARGET_MS for row in busy)
    print(json.dumps({"is_met": is_met, "target_ms": TARGET_MS, "rows": report.rows}))
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
