"""A client of a service that remembers what it was told, and asks whether it still holds.

What was told binds the service from the answer on: a session was made, a job was taken, a turn is
finished, a session is gone. What got no answer binds nobody.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

CUT_OFF = "the connection ends"
# seconds, far beyond what anything takes
PATIENCE = 300.0
_POLL_SECONDS = 0.05


@dataclass
class Turn:
    """A finished turn. video, latents: SHA-256 of its files, None until they were seen."""

    job: str
    video: str | None = None
    latents: str | None = None


@dataclass
class Session:
    """source: SHA-256 of its upload. turns: by number."""

    source: str
    turns: dict[int, Turn] = field(default_factory=dict)


class Witness:
    """store: where the service keeps its files, to see latents, which no route gives.

    num_turns: finished turns that it was ever told of.
    """

    def __init__(self, store: Path, clip: bytes) -> None:
        self.store, self.clip = store, clip
        self.meet("")
        self.sessions: dict[str, Session] = {}
        self.jobs: dict[str, str] = {}
        self.gone: set[str] = set()
        self.num_turns = 0
        self.answers: Counter[str] = Counter()

    def meet(self, address: str) -> None:
        """Ask at this address from now on."""
        self.address = address
        # no connection is used twice: one that the server has closed meanwhile is no fault
        once = httpx.Limits(max_keepalive_connections=0)
        self.http = httpx.Client(base_url=address, timeout=PATIENCE, limits=once)

    # each of these returns what the client sees, in words; the second value is None without success

    def create(self) -> tuple[str, str | None]:
        files = {"video": ("clip.mp4", self.clip, "video/mp4")}
        seen, answer = self._send("POST", "/v1/sessions", files=files)
        if answer is None or answer.status_code != 201:
            return seen, None
        session: str = answer.json()["id"]
        self.sessions[session] = Session(_digest(self.clip))
        return seen, session

    def branch(self, session: str, number: int) -> tuple[str, str | None]:
        path = f"/v1/sessions/{session}/branches"
        seen, answer = self._send("POST", path, json={"turn": number})
        if answer is None or answer.status_code != 201:
            return seen, None
        branch: str = answer.json()["id"]
        known = self.sessions[session]
        # a branch's turns have no job, and its videos may have to be made anew
        turns = {n: Turn("", latents=t.latents) for n, t in known.turns.items() if n <= number}
        self.sessions[branch] = Session(known.source, turns)
        return seen, branch

    def ask(self, session: str, *, steps: int, seed: int = 0) -> tuple[str, str | None]:
        asked = {"camera": "arc:-20", "num_inference_steps": steps, "seed": seed}
        seen, answer = self._send("POST", f"/v1/sessions/{session}/turns", json=asked)
        if answer is None or answer.status_code != 202:
            return seen, None
        job: str = answer.json()["id"]
        self.jobs[job] = session
        return seen, job

    def delete(self, session: str) -> tuple[str, str | None]:
        # without an answer it may be gone or not: nothing is promised of it any more
        known = self.sessions.pop(session)
        for job in [job for job, place in self.jobs.items() if place == session]:
            del self.jobs[job]
        seen, answer = self._send("DELETE", f"/v1/sessions/{session}")
        if answer is None:
            return seen, None
        if answer.is_success:
            self.gone.add(session)
            return seen, session
        self.sessions[session] = known
        return seen, None

    def follow(self, job: str, on_event: Callable[[str], None] = lambda kind: None) -> str:
        """The last event of a job, or that its stream was cut off; a finished turn is noted."""
        kind, data = "", {}
        try:
            with self.http.stream("GET", f"/v1/jobs/{job}/events") as answer:
                for line in answer.iter_lines():
                    name, _, value = line.partition(": ")
                    if name == "event":
                        kind = value
                        on_event(kind)
                    elif name == "data":
                        data = json.loads(value)
        except httpx.TransportError:
            return CUT_OFF
        if kind == "finished":
            self._finished(job, data["turn"])
            return kind
        if kind == "failed":
            return f"failed ({data['error']['code']})"
        return kind if kind == "cancelled" else CUT_OFF

    def follow_all(self) -> None:
        """Every job to its end."""
        ended = {turn.job for _, _, turn in self._turns()}
        for job in [job for job in self.jobs if job not in ended]:
            self.follow(job)

    def _finished(self, job: str, number: int) -> None:
        turn = Turn(job)
        self.sessions[self.jobs[job]].turns[number] = turn
        self.num_turns += 1
        turn.latents = self._latents(self.jobs[job], number)

    def wait_published(self) -> list[str]:
        """Wait for the video of every turn; what is wrong with those that never come."""
        found: list[str] = []
        for session, number, turn in self._turns():
            found += self._check_video(session, number, turn, patience=PATIENCE)
        return found

    def lost(self) -> list[str]:
        """What the client was told that is so no more, each in words; videos may still be made."""
        found = [f"{session} is back" for session in self.gone if self._status(session) != 404]
        for session, known in self.sessions.items():
            status, source = self._get(f"/v1/sessions/{session}/source")
            if status != 200 or _digest(source) != known.source:
                found.append(f"the source of {session}: {status}")
            status, content = self._get(f"/v1/sessions/{session}/turns")
            rows = (
                {row["number"]: row for row in json.loads(content)["data"]} if status == 200 else {}
            )
            for number, turn in known.turns.items():
                if number not in rows or (turn.job and rows[number]["job"] != turn.job):
                    found.append(f"turn {number} of {session} is not listed")
                latents = self._latents(session, number)
                if latents is None or turn.latents not in (None, latents):
                    found.append(f"the latents of turn {number} of {session}")
            jobs = [row["job"] for row in rows.values() if row["job"]]
            if len(set(jobs)) < len(jobs):
                found.append(f"{session} has two turns of one job")
        for session, number, turn in self._turns():
            found += self._check_video(session, number, turn, patience=0.0)
        for job in self.jobs:
            status, _ = self._get(f"/v1/jobs/{job}")
            if status != 200:
                found.append(f"{job}: {status}")
        return found

    def _turns(self) -> Iterator[tuple[str, int, Turn]]:
        for session, known in self.sessions.items():
            for number, turn in known.turns.items():
                yield session, number, turn

    def _check_video(self, session: str, number: int, turn: Turn, *, patience: float) -> list[str]:
        deadline = time.monotonic() + patience
        while True:
            status, content = self._get(f"/v1/sessions/{session}/turns/{number}/video")
            if status == 200:
                digest = _digest(content)
                if turn.video not in (None, digest):
                    return [f"the video of turn {number} of {session} is another one"]
                turn.video = digest
                return []
            # it is made again from the latents
            if status != 409 or (patience and time.monotonic() > deadline):
                return [f"the video of turn {number} of {session}: {status}"]
            if not patience:
                return []
            time.sleep(_POLL_SECONDS)

    def _latents(self, session: str, number: int) -> str | None:
        path = self.store / "sessions" / session / "turns" / f"turn_{number:02d}.safetensors"
        return _digest(path.read_bytes()) if path.exists() else None

    def _status(self, session: str) -> int:
        return self._get(f"/v1/sessions/{session}")[0]

    def _get(self, path: str) -> tuple[int, bytes]:
        answer = self.http.get(path)
        return answer.status_code, answer.content

    def _send(self, method: str, path: str, **body: Any) -> tuple[str, httpx.Response | None]:
        try:
            answer = self.http.request(method, path, **body)
        except httpx.TransportError:
            seen, answer = CUT_OFF, None
        else:
            seen = str(answer.status_code)
            if answer.status_code >= 400:
                seen += f" {answer.json()['error']['code']}"
        self.answers[seen] += 1
        return seen, answer


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
