"""What a service makes of requests that are none, and of videos that are broken.

`python profiling/fuzz_service.py [--requests 2000] [--videos 100] [--out profiling/results/...]`

The real command, with its worker. Requests are made by schemathesis of its OpenAPI, by damaging
good bodies, and as raw bytes on a socket. It fails, exit code 1, if one is answered with a server
error or not at all, if the service has logged a fault or kept a file, or makes no turn afterwards.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import requests
import torch
from broken_videos import broken_videos
from http_service import Served, demo_clip, finished_job, new_session, served
from measure import Report, digits, provenance, table
from schema_fuzz import fuzz_schema
from schemathesis import GenerationMode
from schemathesis.core.failures import FailureGroup

# an answer that takes longer is a hang; decoding a broken video has its own, shorter, limit
HANG_SECONDS = 90.0
COLUMNS = "phase requests answered by_status slowest_ms server_errors hangs failures"
# shares of all requests
_OF_SCHEMA, _DAMAGED = 0.6, 0.25


class Phase:
    """What a kind of requests came to."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.statuses: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.hangs = 0
        self.failures: list[str] = []

    def note(self, status: int | None, seconds: float) -> None:
        """status: None for a connection that was closed without an answer."""
        self.statuses["closed" if status is None else str(status)] += 1
        self.seconds.append(seconds)

    def timed(self, send: Callable[[], int | None]) -> None:
        """Send one request."""
        began = time.perf_counter()
        try:
            status = send()
        except (httpx.TimeoutException, TimeoutError):
            self.hangs += 1
            return
        self.note(status, time.perf_counter() - began)

    @property
    def server_errors(self) -> int:
        return sum(count for status, count in self.statuses.items() if status[0] == "5")

    @property
    def is_good(self) -> bool:
        return not (self.server_errors or self.hangs or self.failures)

    def row(self) -> dict[str, Any]:
        return {
            "phase": self.name,
            "requests": len(self.seconds) + self.hangs,
            "answered": self.statuses.total() - self.statuses["closed"],
            "by_status": " ".join(f"{s}:{n}" for s, n in sorted(self.statuses.items())),
            "slowest_ms": digits(1e3 * max(self.seconds, default=0.0)),
            "server_errors": self.server_errors,
            "hangs": self.hangs,
            "failures": len(self.failures),
        }


def of_schema(service: Served, known: dict[str, Any], count: int, seed: int) -> Phase:
    """Requests that the schema forbids; a few that it allows."""
    phase = Phase("schema")
    # twenty-odd operations have something that can be wrong, and three have nothing
    malformed = max(1, round(count / 23))
    start = seed
    while len(phase.seconds) < count:
        try:
            fuzz_schema(
                service.address,
                known,
                lambda case, answer: phase.note(answer.status_code, answer.elapsed),
                modes={GenerationMode.NEGATIVE: malformed},
                timeout=HANG_SECONDS,
                start=start,
            )
        except FailureGroup as failures:
            phase.failures += [str(failure) for failure in failures.exceptions]
            return phase
        except requests.Timeout:
            phase.hangs += 1
            return phase
        start += 1
        malformed = max(1, round((count - len(phase.seconds)) / 23))
    return phase


def damaged(data: bytes, pick: random.Random) -> bytes:
    """A body with something wrong somewhere."""
    at = pick.randrange(len(data))
    end = at + pick.randrange(1, 9)
    kind = pick.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + pick.randbytes(end - at) + data[end:]
    if kind == 2:
        return data[:at] + data[end:]
    if kind == 3:
        return data[:at] + data[at : at + 64] * pick.choice((2, 50)) + data[at:]
    if kind == 4:
        other = pick.choice((b"null", b"[]", b"{}", b"1e999", b"-1", b'"\\ud800"', b"\0", b"NaN"))
        return data[:at] + other + data[end:]
    return pick.choice((b"[", b'{"a":', b'"')) * pick.choice((3, 5000)) + data


def of_bodies(client: httpx.Client, session: str, clip: bytes, count: int, seed: int) -> Phase:
    """Damaged JSON and forms, with the type of a good one."""
    phase, pick = Phase("bodies"), random.Random(seed)
    poses = [[[1, 0, 0, 0.0], [0, 1, 0, 0], [0, 0, 1, 0]]] * 17
    camera = {"format": "mv2v-camera", "version": 1, "size": [96, 160], "poses": poses}
    turn = {"seed": 3, "num_inference_steps": 1, "guidance_scale": 1.0, "memory": "none"}
    form = httpx.Request(
        "POST", "http://host", files={"video": ("a.mp4", clip, "video/mp4")}, data={"name": "a"}
    )
    forms = {"Content-Type": form.headers["content-type"]}
    texts = {"Content-Type": "application/json"}
    turns = f"/v1/sessions/{session}/turns"
    targets = [
        (turns, texts, json.dumps({"camera": "pan:5", **turn}).encode()),
        (turns, texts, json.dumps({"camera": camera, **turn}).encode()),
        (f"/v1/sessions/{session}/branches", texts, b'{"turn": 1}'),
        ("/v1/videos", texts, json.dumps({"prompt": "pan:5", "session_id": session}).encode()),
        ("/v1/sessions", forms, form.read()),
        ("/v1/videos", forms, form.read()),
    ]
    for number in range(count):
        path, headers, body = targets[number % len(targets)]
        sent = damaged(body, pick)
        phase.timed(partial(_post, client, path, sent, headers))
        if number % 50 == 49:
            _empty(client, session)
    _empty(client, session)
    return phase


def _post(client: httpx.Client, path: str, body: bytes, headers: dict[str, str]) -> int:
    return client.post(path, content=body, headers=headers).status_code


def _empty(client: httpx.Client, keep: str) -> None:
    """What was damaged and was good all the same: no turn is waited for."""
    for job in client.get("/v1/jobs", params={"limit": 100}).json()["data"]:
        client.delete(f"/v1/jobs/{job['id']}")
    for session in client.get("/v1/sessions", params={"limit": 100}).json()["data"]:
        if session["id"] != keep:
            client.delete(f"/v1/sessions/{session['id']}")


def raw_requests(session: str, host: str, pick: random.Random) -> Iterator[bytes]:
    """Requests whose HTTP itself is wrong, without end."""
    head = f"Host: {host}\r\nConnection: close\r\n"
    body = '{"camera": "pan:5"}'
    whole = (
        f"POST /v1/sessions/{session}/turns HTTP/1.1\r\n{head}Content-Type: application/json\r\n"
    )
    while True:
        kind = pick.randrange(9)
        if kind == 0:
            yield pick.randbytes(pick.choice((1, 40, 4000)))
        elif kind == 1:
            yield f"GET /{'a' * pick.choice((9000, 70_000))} HTTP/1.1\r\n{head}\r\n".encode()
        elif kind == 2:
            yield f"GET / HTTP/1.1\r\n{head}{'X: y' * 30_000}\r\n\r\n".encode()
        elif kind == 3:
            length = pick.choice(("-1", "abc", "9" * 30, "3", "500", "1e3", "0x10"))
            yield f"{whole}Content-Length: {length}\r\n\r\n{body}".encode()
        elif kind == 4:
            size = pick.choice(("zz", "-5", "ffffffffffffffff", "13", ""))
            yield f"{whole}Transfer-Encoding: chunked\r\n\r\n{size}\r\n{body}\r\n0\r\n\r\n".encode()
        elif kind == 5:
            path = pick.choice(
                ("/%00", "/%ff%fe", "/v1/sessions/%2e%2e", "//", "*", "/page/%2e%2e")
            )
            yield f"GET {path} HTTP/1.1\r\n{head}\r\n".encode()
        elif kind == 6:
            method = pick.choice(("TRACE", "CONNECT", "get", "\x00", "A" * 500, "PROPFIND"))
            yield f"{method} /v1/sessions HTTP/1.1\r\n{head}\r\n".encode()
        elif kind == 7:
            range_ = pick.choice(
                ("bytes=9-", "bytes=--1", "bytes=1-1,2-2", "bytes=" + "0-1," * 999)
            )
            where = f"/v1/sessions/{session}/source"
            yield f"GET {where} HTTP/1.1\r\n{head}Range: {range_}\r\n\r\n".encode()
        else:
            good = f"{whole}Content-Length: {len(body)}\r\n\r\n{body}".encode()
            yield damaged(good, pick)


def of_bytes(service: Served, session: str, count: int, seed: int) -> Phase:
    """Bytes on a socket. A connection that is closed at once is an answer, too."""
    phase, pick = Phase("bytes"), random.Random(seed)
    place = urlsplit(service.address)
    assert place.hostname is not None and place.port is not None
    coming = raw_requests(session, place.netloc, pick)

    def send() -> int | None:
        data = next(coming)
        with socket.create_connection((place.hostname, place.port), HANG_SECONDS) as connection:
            try:
                connection.sendall(data)
                # whoever waits for more learns that there is none
                connection.shutdown(socket.SHUT_WR)
                said = connection.makefile("rb").readline(100)
            except ConnectionError:
                return None
        return int(said.split()[1]) if said.startswith(b"HTTP/") else None

    for _ in range(count):
        phase.timed(send)
    return phase


def of_videos(client: httpx.Client, clip: bytes, count: int, seed: int) -> Phase:
    """Broken videos. One that decodes to its end all the same is taken, and removed."""
    phase = Phase("videos")
    for _, data in broken_videos(clip, count, seed):
        phase.timed(partial(_upload, client, data))
    return phase


def _upload(client: httpx.Client, data: bytes) -> int:
    answer = client.post("/v1/sessions", files={"video": ("a.mp4", data, "video/mp4")})
    if answer.status_code == 201:
        client.delete(f"/v1/sessions/{answer.json()['id']}")
    return answer.status_code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000, metavar="N")
    parser.add_argument("--videos", type=int, default=100, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--commit", help="for a copy without its history")
    args = parser.parse_args()

    report = Report(args.out, provenance(torch.device("cpu"), args.commit))
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip = demo_clip(folder)
        words = ("--device", "cpu", "--max-queue", "4", "--max-upload", "4MiB", "--min-free", "0")
        with served(folder, *words) as service, service.client() as client:
            client.timeout = httpx.Timeout(HANG_SECONDS)
            session = new_session(client, clip)
            job = finished_job(client, session, camera="pan:5", num_inference_steps=1)
            known = {"session_id": session, "job_id": job, "video_id": job, "number": 1}
            first, second = (round(share * args.requests) for share in (_OF_SCHEMA, _DAMAGED))
            phases = []
            for run in (
                lambda: of_schema(service, known, first, args.seed),
                lambda: of_bodies(client, session, clip, second, args.seed),
                lambda: of_bytes(service, session, args.requests - first - second, args.seed),
                lambda: of_videos(client, clip, args.videos, args.seed),
            ):
                phases.append(run())
                report.add(**phases[-1].row(), seed=args.seed)
                problems += phases[-1].failures
            _empty(client, session)
            finished_job(client, session, camera="pan:6", num_inference_steps=1)
            left = list((folder / "store" / "uploads").iterdir())
        problems += [f"{phase.name}: not all is well" for phase in phases if not phase.is_good]
        if left:
            problems.append(f"{len(left)} uploads were left behind")
        if service.faults():
            problems.append(f"{service.faults()} faults in the log")
        if service.exit_code:
            problems.append(f"the service ended with {service.exit_code}")
    print(table(report.rows, COLUMNS))
    print(*problems, sep="\n", file=sys.stderr)
    print(json.dumps({"is_good": not problems, "phases": report.rows}))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
