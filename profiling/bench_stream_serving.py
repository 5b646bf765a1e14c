"""What the service adds to a block of a stream, on loopback: the ratio within one run.

`python profiling/bench_stream_serving.py --checkpoint CAUSAL [--blocks 200] [--out FILE.jsonl]`

A service of the checkpoint in a process of its own makes one stream; a client reads its video while
it grows. Of the same blocks: the median and the 99th percentile of seconds from the server's order
to the worker's answer, those that the model and the VAE take of it, and those between two fragments
at the client. What is added is an encoder's work on the frames, flushes of the video, and a message
each way; it was measured of the smallest model alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import httpx
import torch
from measure import Report, digits, provenance, table

COLUMNS = (
    "checkpoint blocks frames added_ms order_ms order_p99_ms engine_ms client_ms ratio load_average"
)
# blocks at the beginning, in which memory and caches fill
SKIPPED = 10


@contextmanager
def service(checkpoint: str, store: Path) -> Iterator[str]:
    """The address of a service that is ready, until the block ends."""
    command = [sys.executable, "-m", "mv2v_engine.run", "serve", "--port", "0", "--device", "cpu"]
    command += ["--store", str(store), "--checkpoint", checkpoint, "--min-free", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = next(line for line in process.stdout if line.startswith("ready: "))
            yield ready.split()[-1]
        finally:
            process.terminate()


def arrivals(client: httpx.Client, path: str) -> list[float]:
    """When each fragment began to arrive, in seconds."""
    seen, rest = [], b""
    with client.stream("GET", path, params={"first": 1}) as answer:
        for part in answer.iter_raw():
            found = (rest + part).count(b"moof")
            rest = (rest + part)[-3:]
            seen += [time.perf_counter()] * found
    return seen


def main() -> None:
    """Make the stream and report it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", required=True, help="a causal one, small enough for a CPU")
    parser.add_argument("--blocks", type=int, default=200)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = Report(args.out, provenance(torch.device("cpu")))
    with (
        tempfile.TemporaryDirectory() as folder,
        service(args.checkpoint, Path(folder)) as address,
        httpx.Client(base_url=address, timeout=None) as client,
    ):
        asked = {"prompt": "a red ball", "blocks": args.blocks}
        stream = client.post("/v1/streams", json=asked).raise_for_status().json()
        path = f"/v1/streams/{stream['id']}"
        times = arrivals(client, f"{path}/video")[SKIPPED:]
        now = client.get(path).raise_for_status().json()
    latency = now["latency"]
    order, engine = latency["block_seconds_median"], latency["engine_seconds_median"]
    between = [later - earlier for earlier, later in pairwise(times)]
    row = {
        "checkpoint": now["checkpoint"],
        "blocks": now["blocks"],
        "frames": now["frames"],
        "size": [now["height"], now["width"]],
        "order_ms": digits(1e3 * order),
        "order_p99_ms": digits(1e3 * latency["block_seconds_p99"]),
        "engine_ms": digits(1e3 * engine),
        "added_ms": digits(1e3 * (order - engine)),
        "client_ms": digits(1e3 * statistics.median(between)),
        "ratio": digits(order / engine),
        "command": f"python profiling/bench_stream_serving.py --checkpoint {now['checkpoint']} "
        f"--blocks {args.blocks}",
        "load_average": digits(os.getloadavg()[0]),
    }
    report.add(**row)
    print(table([row], COLUMNS))


if __name__ == "__main__":
    main()
