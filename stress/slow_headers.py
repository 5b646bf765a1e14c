"""Whether connections that never finish their headers keep others from being answered.

`python stress/slow_headers.py [--attack held flood] [--connections 1100] [--descriptors 1024]
    [--seconds 60] [--out profiling/results/slow_headers.jsonl]`

The real command, which may open so many files. An attacker, a process of its own, opens
connections and sends the beginning of a header on each. *held*: then a byte now and then, and
another connection for each that is closed. *flood*: new connections as fast as one process opens
them, each left alone until it is the oldest of so many. Meanwhile `/healthz` is asked, every time
on a new connection. Exit code 1 if an answer takes longer than a second, or does not come.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import selectors
import socket
import sys
import tempfile
import time
from collections import deque
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
COLUMNS = "attack connections descriptors opened opened_a_second held requests p50_ms max_ms errors"


class Attacker:
    """A process that attacks an address in one of the ways in `ATTACKS` until it is stopped."""

    def __init__(self, attack: str, address: str, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._opened, self._held = context.Value("q", 0), context.Value("q", 0)
        self._is_over, self._is_full = context.Event(), context.Event()
        place = urlsplit(address)
        self._process = context.Process(
            target=ATTACKS[attack],
            args=((place.hostname, place.port), count, self),
            name=f"attacker-{attack}",
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_process"}

    @property
    def opened(self) -> int:
        """Connections in all."""
        return int(self._opened.value)

    @property
    def held(self) -> int:
        """Connections at once, at most."""
        return int(self._held.value)

    def start(self, patience: float) -> None:
        """Attack; returns once all connections were opened, or after so many seconds."""
        self._process.start()
        self._is_full.wait(patience)

    def stop(self) -> None:
        self._is_over.set()
        self._process.join()

    @property
    def is_over(self) -> bool:
        return bool(self._is_over.is_set())

    def has_opened(self, count: int, held: int) -> None:
        """Called by the process."""
        self._opened.value += 1
        self._held.value = max(self._held.value, held)
        if self._opened.value >= count:
            self._is_full.set()


def hold(place: tuple[str, int], count: int, attacker: Attacker) -> None:
    """Open connections, drip on them, and open others for those that are closed."""
    with selectors.DefaultSelector() as selector:
        drip = time.monotonic()
        while not attacker.is_over:
            # some at a time, so that those that are closed are seen; once all are there, no flood
            most = 50 if attacker.opened < count else REOPENED
            for _ in range(min(most, count - len(selector.get_map()))):
                connection = begun(place)
                if connection is None:
                    break
                selector.register(connection, selectors.EVENT_READ)
                attacker.has_opened(count, len(selector.get_map()))
            time.sleep(0.05)
            # whatever the service said, it has said its last
            for key, _ in selector.select(0):
                close(selector, key.fileobj)
            if time.monotonic() >= drip + DRIP_SECONDS:
                drip = time.monotonic()
                for key in list(selector.get_map().values()):
                    try:
                        key.fileobj.send(b"a")  # type: ignore[union-attr]
                    except OSError:
                        close(selector, key.fileobj)
        for key in list(selector.get_map().values()):
            close(selector, key.fileobj)


def flood(place: tuple[str, int], count: int, attacker: Attacker) -> None:
    """Open connections as fast as can be, and leave each alone until so many are newer."""
    held: deque[socket.socket] = deque()
    while not attacker.is_over:
        connection = begun(place)
        if connection is None:
            continue
        held.append(connection)
        if len(held) > count:
            held.popleft().close()
        attacker.has_opened(count, len(held))
    for connection in held:
        connection.close()


ATTACKS = {"held": hold, "flood": flood}


def begun(place: tuple[str, int]) -> socket.socket | None:
    """A connection with the beginning of a header; None if there was none to be had."""
    connection = socket.socket()
    connection.settimeout(1.0)
    try:
        connection.connect(place)
        connection.send(BEGINNING)
    except OSError:
        connection.close()
        return None
    return connection


def close(selector: selectors.BaseSelector, connection: Any) -> None:
    selector.unregister(connection)
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
    add("--attack", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    add("--connections", type=int, default=1100, metavar="N")
    add("--descriptors", type=int, default=1024, metavar="N", help="that the service may have open")
    add("--seconds", type=float, default=60.0, metavar="S")
    add("--out", type=Path, metavar="FILE")
    args = parser.parse_args(argv)

    report = Report(args.out, provenance(torch.device("cpu")))
    is_met = [met(report, attack, args) for attack in args.attack]
    print(table(report.rows, COLUMNS))
    print(json.dumps({"is_met": all(is_met)}))
    return 0 if all(is_met) else 1


def met(report: Report, attack: str, args: argparse.Namespace) -> bool:
    """Attack a service of its own; whether everybody else was answered in time."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (args.descriptors, most))
    with (
        tempfile.TemporaryDirectory() as name,
        served(Path(name), "--device", "cpu", "--min-free", "0") as service,
    ):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        attacker = Attacker(attack, service.address, args.connections)
        try:
            attacker.start(args.seconds)
            opened, began = attacker.opened, time.monotonic()
            seconds, errors = measured(service.address, args.seconds)
            rate = (attacker.opened - opened) / (time.monotonic() - began)
        finally:
            attacker.stop()
    ordered = sorted(seconds)
    report.add(
        attack=attack,
        connections=args.connections,
        descriptors=args.descriptors,
        opened=attacker.opened,
        opened_a_second=digits(rate),
        held=attacker.held,
        requests=len(seconds),
        p50_ms=digits(1e3 * ordered[len(ordered) // 2]),
        max_ms=digits(1e3 * ordered[-1]),
        errors=errors,
        limit_ms=1e3 * LIMIT_SECONDS,
    )
    return not errors and ordered[-1] <= LIMIT_SECONDS and attacker.opened >= args.connections


if __name__ == "__main__":
    sys.exit(main())
