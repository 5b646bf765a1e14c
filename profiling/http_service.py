"""The command `run serve` in a process of its own, for whoever measures or attacks it over HTTP."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from measure import ROOT

from mv2v_engine.synthetic.demo_clip import write_demo_clip

PATIENCE = 600.0


@dataclass
class Served:
    """A service that listens. log: what it wrote to stderr. exit_code: once it has ended."""

    address: str
    process: subprocess.Popen[str]
    log: Path
    exit_code: int | None = None

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.address, timeout=PATIENCE)

    def faults(self) -> int:
        """Errors that nobody expected, of which a trace is logged."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return text.count("Traceback") + text.count("Exception in ASGI")


@contextmanager
def served(folder: Path, *words: str) -> Iterator[Served]:
    """Serve a store in `folder` until the block ends; words: more of the command line.

    It ends as SIGTERM ends it.
    """
    log = folder / "service.log"
    command = [sys.executable, "-m", "mv2v_engine.run", "serve", "--store", str(folder / "store")]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*command, "--port", "0", *words],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("listening on "):
            raise SystemExit(f"the service did not start: {log.read_text(encoding='utf-8')}")
        found = Served(line.split()[-1], process, log)
        wait_until_ready(found)
        yield found
        process.send_signal(signal.SIGTERM)
        found.exit_code = process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait()


def wait_until_ready(service: Served) -> None:
    """Until turns are made."""
    with service.client() as client:
        while client.get("/readyz").status_code != 200:
            if service.process.poll() is not None:
                raise SystemExit(f"the service ended: {service.log.read_text(encoding='utf-8')}")
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
