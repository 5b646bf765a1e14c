"""The command `run serve` in a process of its own, for whoever measures or attacks it over HTTP."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from measure import ROOT

from mv2v_engine.synthetic.demo_clip import write_demo_clip

PATIENCE = 600.0


class NotServed(SystemExit):
    """The service did not start, or ended before it was ready; says what it wrote."""


@dataclass
class Served:
    """A service that listens. log: what it wrote to stderr. exit_code: once it has ended."""

    address: str
    process: subprocess.Popen[str]
    log: Path
    exit_code: int | None = None

    def client(self, patience: float = PATIENCE) -> httpx.Client:
        return httpx.Client(base_url=self.address, timeout=patience)

    def cpu_seconds(self) -> float:
        """What its process has spent, user and system, without its children's."""
        # Linux's number of a process's own clock
        return time.clock_gettime((~self.process.pid << 3) | 2)

    def faults(self) -> int:
        """Errors that nobody expected, of which a trace is logged."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return text.count("Traceback") + text.count("Exception in ASGI")

    def stop(self) -> int:
        """End it as SIGTERM ends it; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.ended()

    def ended(self) -> int:
        """Its exit code, once it has ended by itself."""
        self.exit_code = self.process.wait(PATIENCE)
        return self.exit_code


def start(
    store: Path,
    log: Path,
    *words: str,
    environment: Mapping[str, str] | None = None,
    root: Path = ROOT,
) -> Served:
    """Serve a store; returns once it listens. What it writes to stderr is added to `log`.

    words: more of the command line. environment: variables that it has beside this process's own.
    root: the checkout that is served.

    Raises:
        NotServed: it ended before.
    """
    command = [sys.executable, "-m", "mv2v_engine.run", "serve", "--store", str(store)]
    with log.open("a") as errors:
        process = subprocess.Popen(
            [*command, "--port", "0", *words],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": f"{root}:{root / 'kernels'}", **(environment or {})},
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith("listening on "):
        process.kill()
        process.wait()
        raise NotServed(f"the service did not start: {log.read_text(encoding='utf-8')}")
    return Served(line.split()[-1], process, log)


@contextmanager
def served(folder: Path, *words: str, root: Path = ROOT) -> Iterator[Served]:
    """Serve a store in `folder` from when turns are made until the block ends, then stop it."""
    found = start(folder / "store", folder / "service.log", *words, root=root)
    try:
        wait_until_ready(found)
        yield found
        found.stop()
    finally:
        found.process.kill()
        found.process.wait()


def wait_until_ready(service: Served) -> None:
    """Wait until turns are made.

    Raises:
        NotServed: it ended before.
    """
    with service.client() as client:
        while True:
            try:
                if client.get("/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                if service.process.poll() is None:
                    raise
            if service.process.poll() is not None:
                raise NotServed(f"the service ended: {service.log.read_text(encoding='utf-8')}")
            time.sleep(0.1)


def new_session(client: httpx.Client, clip: bytes) -> str:
    """A session of a clip; its id."""
    answer = client.post("/v1/sessions", files={"video": ("clip.mp4", clip, "video/mp4")})
    answer.raise_for_status()
    session: str = answer.json()["id"]
    return session


def finished_job(client: httpx.Client, session: str, **asked: Any) -> str:
    """A turn, made; its job's id."""
    answer = client.post(f"/v1/sessions/{session}/turns", json=asked)
    answer.raise_for_status()
    job: str = answer.json()["id"]
    stream = client.get(f"/v1/jobs/{job}/events").text
    if "event: finished" not in stream:
        raise SystemExit(f"the turn was not made: {stream[-500:]}")
    return job


def demo_clip(folder: Path) -> bytes:
    """A clip of the embedded model's length and size, as mp4."""
    path = folder / "clip.mp4"
    write_demo_clip(path)
    return path.read_bytes()
