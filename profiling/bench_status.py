"""What asking after a job costs the service, alone and beside a turn that runs.

`python profiling/bench_status.py [--rate 500] [--seconds 10] [--connections 8] [--out FILE.jsonl]`

A service of `tiny-nvs` in a process of its own is asked for one job's state at a fixed rate, by a
client that does not wait for an answer before the next question is due: a request that is late
counts from when it was due. Of each situation: requests that were answered in a second, the median
and the 99th percentile of milliseconds, and microseconds of CPU that the service's own process
spent on a request, user and system, without its worker's. `finished` asks after a turn that is
made, `running` after one under way in the worker, which has a lower priority; both as a client that
remembers the answer's tag (`If-None-Match`) and as one that does not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from http_service import demo_clip, finished_job, new_session, served
from measure import Report, digits, percentile, provenance, table

COLUMNS = "job tagged asked_a_second answered_a_second p50_ms p99_ms cpu_us bytes load_average"
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(process: int) -> float:
    """Of one process, without its children."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


async def answer(reader: asyncio.StreamReader) -> tuple[int, str, int]:
    """One answer on a connection: its status, its tag, and the bytes of its body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    status = int(head.split(" ", 2)[1])
    lines = (line.partition(":") for line in head.split("\r\n")[1:])
    headers = {name.lower(): value.strip() for name, _, value in lines}
    length = int(headers.get("content-length", 0))
    await reader.readexactly(length)
    return status, headers.get("etag", ""), length


async def asked(
    address: str, path: str, rate: float, seconds: float, connections: int, *, is_tagged: bool
) -> dict[str, Any]:
    """Ask at a fixed rate. Latencies are from when a request was due."""
    host, port = urlsplit(address).hostname, urlsplit(address).port
    due: asyncio.Queue[float] = asyncio.Queue()
    took: list[float] = []
    sizes: list[int] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection(host, port)
        tag = ""
        with contextlib.closing(writer):
            while True:
                at = await due.get()
                known = f"If-None-Match: {tag}\r\n" if is_tagged and tag else ""
                writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\n{known}\r\n".encode())
                status, tag, length = await answer(reader)
                assert status in (200, 304), status
                took.append(time.perf_counter() - at)
                sizes.append(length)

    clients = [asyncio.create_task(client()) for _ in range(connections)]
    began = time.perf_counter()
    for number in range(round(rate * seconds)):
        at = began + number / rate
        if (left := at - time.perf_counter()) > 0:
            await asyncio.sleep(left)
        due.put_nowait(at)
    while len(took) < round(rate * seconds):
        await asyncio.sleep(0.01)
        for task in clients:
            if task.done():
                task.result()
    spent = time.perf_counter() - began
    for task in clients:
        task.cancel()
    return {
        "asked_a_second": rate,
        "answered_a_second": digits(len(took) / spent),
        "p50_ms": digits(1e3 * percentile(took, 0.5)),
        "p99_ms": digits(1e3 * percentile(took, 0.99)),
        "bytes": round(sum(sizes) / len(sizes)),
    }


def main() -> None:
    """Measure each situation and report it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rate", type=float, default=500)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = Report(args.out, provenance(torch.device("cpu")))
    rows = []
    with tempfile.TemporaryDirectory() as name, served(Path(name)) as found:
        with found.client() as client:
            session = new_session(client, demo_clip(Path(name)))
            camera = {"camera": "arc:-20"}
            finished = finished_job(client, session, **camera, num_inference_steps=1)
            asking = client.post(
                f"/v1/sessions/{session}/turns", json={**camera, "num_inference_steps": 1000}
            )
            jobs = {"finished": finished, "running": asking.json()["id"]}
            for state, job in reversed(jobs.items()):
                if state == "finished":
                    client.post(f"/v1/jobs/{jobs['running']}/cancel").raise_for_status()
                    client.get(f"/v1/jobs/{jobs['running']}/events")
                for is_tagged in (False, True):
                    before = cpu_seconds(found.process.pid)
                    how = (args.rate, args.seconds, args.connections)
                    row = asyncio.run(
                        asked(found.address, f"/v1/jobs/{job}", *how, is_tagged=is_tagged)
                    )
                    spent = cpu_seconds(found.process.pid) - before
                    row = {
                        "job": state,
                        "tagged": is_tagged,
                        **row,
                        "cpu_us": digits(1e6 * spent / (args.rate * args.seconds)),
                        "load_average": digits(os.getloadavg()[0]),
                    }
                    report.add(**row)
                    rows.append(row)
    print(table(rows, COLUMNS))


if __name__ == "__main__":
    main()
