"""What a service makes of requests that are none, and of videos that are broken.

`python stress/fuzz_service.py [--requests 2000] [--videos 100] [--out profiling/results/...]`

The real command, with its worker. Requests are made by schemathesis of its OpenAPI, by damaging
good bodies, and as raw bytes on a socket, until there are so many that the OpenAPI does not allow;
those that it allows all the same are rows of their own (`_allowed`). So are files whose damage
reached no picture (`videos_unharmed`) or left a valid stream (`videos_valid`).

It fails, exit code 1, if a request is answered with a server error or not at all, if a malformed
one or a broken video is taken, if the service has logged a fault or kept a file, or makes no turn
afterwards.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# what a result says of its machine, and how `run serve` is started, is the benchmarks'
sys.path.append(str(Path(__file__).resolve().parents[1] / "profiling"))

import httpx
import requests
import torch
from broken_videos import SILENT, broken_videos, is_unharmed
from contract import Contract, allows_sent, body_of, whole_request
from http_service import Served, demo_clip, finished_job, new_session, served
from malformed_requests import damaged, raw_requests
from measure import Report, digits, provenance, table
from schema_fuzz import fuzz_schema
from schemathesis import Case, GenerationMode, Response
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


class Sorted:
    """Requests that the OpenAPI does not allow, and those that it does."""

    def __init__(self, name: str, contract: Contract) -> None:
        self.contract = contract
        self.malformed, self.allowed = Phase(name), Phase(f"{name}_allowed")

    @property
    def num_malformed(self) -> int:
        return len(self.malformed.seconds) + self.malformed.hangs

    @property
    def phases(self) -> list[Phase]:
        return [self.malformed, self.allowed]

    def note(self, is_allowed: bool, status: int | None, seconds: float, sent: bytes) -> None:
        phase = self.allowed if is_allowed else self.malformed
        phase.note(status, seconds)
        if status is not None and status < 300 and not is_allowed:
            phase.failures.append(f"{status} for what the schema does not allow: {sent[:200]!r}")

    def timed(self, is_allowed: bool, sent: bytes, send: Callable[[], int | None]) -> None:
        """Send one request."""
        began = time.perf_counter()
        try:
            status = send()
        except (httpx.TimeoutException, TimeoutError):
            (self.allowed if is_allowed else self.malformed).hangs += 1
            return
        self.note(is_allowed, status, time.perf_counter() - began, sent)


def of_schema(
    service: Served, contract: Contract, known: dict[str, Any], count: int, seed: int
) -> list[Phase]:
    """Requests that schemathesis means the schema to forbid."""
    found, start = Sorted("schema", contract), seed

    def answered(case: Case, answer: Response) -> None:
        sent = answer.request
        found.note(allows_sent(contract, sent), answer.status_code, answer.elapsed, said(sent))

    while found.num_malformed < count:
        # a good half of them is, by twenty-odd operations that have something to spoil
        share = max(1, round((count - found.num_malformed) / 12))
        try:
            fuzz_schema(
                service.address,
                known,
                answered,
                modes={GenerationMode.NEGATIVE: share},
                timeout=HANG_SECONDS,
                start=start,
            )
        except FailureGroup as failures:
            found.malformed.failures += [str(failure) for failure in failures.exceptions]
            break
        except requests.Timeout:
            found.malformed.hangs += 1
            break
        start += 1
    return found.phases


def said(sent: requests.PreparedRequest) -> bytes:
    return f"{sent.method} {sent.url} ".encode() + body_of(sent)


def of_bodies(
    client: httpx.Client, contract: Contract, session: str, clip: bytes, count: int, seed: int
) -> list[Phase]:
    """Damaged JSON and forms, with the type of a good one."""
    found, pick = Sorted("bodies", contract), random.Random(seed)
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
    for path, headers, body in itertools.cycle(targets):
        sent = damaged(body, pick)
        kind = {"content-type": headers["Content-Type"]}
        is_allowed = contract.allows("POST", path, kind, sent)
        found.timed(is_allowed, sent, partial(_post, client, path, sent, headers))
        if sum(len(phase.seconds) for phase in found.phases) % 50 == 0:
            _empty(client, session)
        if found.num_malformed == count:
            break
    _empty(client, session)
    return found.phases


def _post(client: httpx.Client, path: str, body: bytes, headers: dict[str, str]) -> int:
    return client.post(path, content=body, headers=headers).status_code


def _empty(client: httpx.Client, keep: str) -> None:
    """What was damaged and was good all the same: no turn is waited for."""
    for job in client.get("/v1/jobs", params={"limit": 100}).json()["data"]:
        client.delete(f"/v1/jobs/{job['id']}")
    for session in client.get("/v1/sessions", params={"limit": 100}).json()["data"]:
        if session["id"] != keep:
            client.delete(f"/v1/sessions/{session['id']}")


def of_bytes(
    service: Served, contract: Contract, session: str, count: int, seed: int
) -> list[Phase]:
    """Bytes on a socket. A connection that is closed at once is an answer, too."""
    found, pick = Sorted("bytes", contract), random.Random(seed)
    place = urlsplit(service.address)
    assert place.hostname is not None and place.port is not None

    def send(data: bytes, is_whole: bool) -> int | None:
        with socket.create_connection((place.hostname, place.port), HANG_SECONDS) as connection:
            try:
                connection.sendall(data)
                if not is_whole:
                    # whoever waits for more learns that there is none
                    connection.shutdown(socket.SHUT_WR)
                line = connection.makefile("rb").readline(100)
            except ConnectionError:
                return None
        return int(line.split()[1]) if line.startswith(b"HTTP/") else None

    for data in raw_requests(session, place.netloc, pick):
        request = whole_request(data)
        is_allowed = request is not None and contract.allows(*request)
        found.timed(is_allowed, data, partial(send, data, request is not None))
        if found.num_malformed == count:
            break
    return found.phases


def of_videos(
    client: httpx.Client, folder: Path, clip: bytes, count: int, seed: int
) -> list[Phase]:
    """Broken videos, until there are so many; and what turned out to be none."""
    broken, unharmed, valid = (Phase(f"videos{end}") for end in ("", "_unharmed", "_valid"))
    whole, path = folder / "whole.mp4", folder / "damaged.mp4"
    whole.write_bytes(clip)
    for what, data in broken_videos(clip, 9 * count, seed):
        if len(broken.seconds) + broken.hangs == count:
            break
        began = time.perf_counter()
        try:
            status = _upload(client, data)
        except httpx.TimeoutException:
            broken.hangs += 1
            continue
        phase, seconds = broken, time.perf_counter() - began
        if status == 201:
            path.write_bytes(data)
            if is_unharmed(path, whole):
                phase = unharmed
            elif what in SILENT:
                phase = valid
            else:
                broken.failures.append(f"{what}: taken, and shows something else")
        phase.note(status, seconds)
    if len(broken.seconds) + broken.hangs < count:
        broken.failures.append(f"only {len(broken.seconds)} broken videos were made")
    return [broken, unharmed, valid]


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
            third = args.requests - first - second
            contract = Contract(client.get("/openapi.json").json())
            phases = []
            for run in (
                lambda: of_schema(service, contract, known, first, args.seed),
                lambda: of_bodies(client, contract, session, clip, second, args.seed),
                lambda: of_bytes(service, contract, session, third, args.seed),
                lambda: of_videos(client, folder, clip, args.videos, args.seed),
            ):
                for phase in run():
                    phases.append(phase)
                    report.add(**phase.row(), seed=args.seed)
                    problems += phase.failures
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
