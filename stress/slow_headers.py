"""Whether connections that never finish their headers keep others from being answered.

`python stress/slow_headers.py [--connections 1100] [--descriptors 1024] [--seconds 60]
    [--out profiling/results/slow_headers.jsonl]`

The real command, which may open so many files. An attacker opens connections, sends the beginning
of a header on each and then a byte now and then, and opens another one for each that is closed.
Meanwhile `/healthz` is asked, every time on a new connection. Exit code 1 if an answer takes longer
than a second, or does not come.
"""

from __future__ import annotations

import argparse
import json
import resource
import selectors
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# what a result says of its machine, and how `run serve` is started, is the benchmarks'
sys.path.append(str(Path(__file__).resolve().parents[1] / "profiling"))

import httpx
import torch
from http_service import served
from measure import Report, digits, provenance, table

LIMIT_SECONDS = 1.0
BEGINNING = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "
# between two bytes of one connection, and between two questions
DRIP_SECONDS, ASK_SECONDS = 2.0, 0.25
# connections that follow closed ones, in each twentieth of a second
REOPENED = 2
COLUMNS = "connections descriptors opened held requests p50_ms max_ms errors"


class Attacker(threading.Thread):
    """Holds as many connections as it gets. opened: in all. held: the most at once."""

    def __init__(self, address: str, count: int) -> None:
        super().__init__(name="attacker")
        place = urlsplit(address)
        self.place, self.count = (place.hostname, place.port), count
        self.opened = self.held = 0
        self.is_over = threading.Event()
        self.is_full = threading.Event()

    def run(self) -> None:
        with selectors.DefaultSelector() as selector:
            drip = time.monotonic()
            while not self.is_over.is_set():
                self._open(selector)
                time.sleep(0.05)
                for key, _ in selector.select(0):
                    self._close(selector, key.fileobj)
                if time.monotonic() >= drip + DRIP_SECONDS:
                    drip = time.monotonic()
                    for key in list(selector.get_map().values()):
                        self._send(selector, key.fileobj, b"a")
            for key in list(selector.get_map().values()):
                self._close(selector, key.fileobj)

    def _open(self, selector: selectors.BaseSelector) -> None:
        # some at a time, so that those that are closed are seen; once all are there, no flood
        most = REOPENED if self.is_full.is_set() else 50
        for _ in range(min(most, self.count - len(selector.get_map()))):
            connection = socket.socket()
            connection.settimeout(1.0)
            try:
                connection.connect(self.place)
            except OSError:
                connection.close()
                return
            self.opened += 1
            selector.register(connection, selectors.EVENT_READ)
            self._send(selector, connection, BEGINNING)
        self.held = max(self.held, len(selector.get_map()))
        if self.opened >= self.count:
            self.is_full.set()

    def _send(self, selector: selectors.BaseSelector, connection: Any, data: bytes) -> None:
        try:
            connection.send(data)
        except OSError:
            self._close(selector, connection)

    def _close(self, selector: selectors.BaseSelector, connection: Any) -> None:
        # whatever the service said, it has said its last
        selector.unregister(connection)
        with suppress(OSError):
            connection.close()


def measured(address: str, seconds: float) -> tuple[list[float], int]:
    """Seconds of each answer of /healthz, and how many questions got none."""
    found, errors, end = [], 0, time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.perf_counter()
        try:
            errors += httpx.get(f"{address}/healthz", timeout=30.0).status_code != 200
        except httpx.HTTPError:
            errors += 1
        found.append(time.perf_counter() - began)
        time.sleep(ASK_SECONDS)
    return found, errors


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--connections", type=int, default=1100, metavar="N")
    add("--descriptors", type=int, default=1024, metavar="N", help="that the service may have open")
    add("--seconds", type=float, default=60.0, metavar="S")
    add("--out", type=Path, metavar="FILE")
    args = parser.parse_args(argv)

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (args.descriptors, most))
    with (
        tempfile.TemporaryDirectory() as name,
        served(Path(name), "--device", "cpu", "--min-free", "0") as service,
    ):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        attacker = Attacker(service.address, args.connections)
        attacker.start()
        attacker.is_full.wait(args.seconds)
        seconds, errors = measured(service.address, args.seconds)
        attacker.is_over.set()
        attacker.join()
    ordered = sorted(seconds)
    report = Report(args.out, provenance(torch.device("cpu")))
    report.add(
        connections=args.connections,
        descriptors=args.descriptors,
        opened=attacker.opened,
        held=attacker.held,
        requests=len(seconds),
        p50_ms=digits(1e3 * ordered[len(ordered) // 2]),
        max_ms=digits(1e3 * ordered[-1]),
        errors=errors,
        limit_ms=1e3 * LIMIT_SECONDS,
    )
    print(table(report.rows, COLUMNS))
    is_met = not errors and ordered[-1] <= LIMIT_SECONDS and attacker.opened >= args.connections
    print(json.dumps({"is_met": is_met, **report.rows[0]}))
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
