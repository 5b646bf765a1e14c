"""A service over two replicas on Ray Serve: where turns go, and what a replica's death costs."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("ray", reason="the extra [distributed] is not installed")
pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
# read when ray.serve is imported: the replica that has a session is asked whether it is free, and
# a loaded machine must not keep it from answering, or another makes the turn
os.environ["RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S"] = "20"
os.environ["RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S"] = "20"
import ray
from ray.exceptions import RayActorError

from mv2v_engine.engine.folder import SessionFolder
from mv2v_engine.locks import WriterLock
from mv2v_engine.serving.config import Cluster, ServingConfig
from mv2v_engine.serving.store.claims import issue
from mv2v_engine.serving.store.records import JobRecord, SessionRecord
from mv2v_engine.serving.work.ray_backend import RayBackend

ROOT = Path(__file__).resolve().parents[2]
# seconds, far beyond what anything takes: a loaded machine starts processes slowly
PATIENCE = 600.0
STARTING = 60.0
SLOW = {
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_gcs_server_request_timeout_seconds": "600",
    "RAY_health_check_timeout_ms": "120000",
}
# more steps than a replica makes before it is told to stop, or is killed
LONG, KILLED, SHORT = 1000, 100, 2


class WatchedBackend(RayBackend):
    """That remembers where turns were begun, and every other event of theirs."""

    def __init__(self, config: ServingConfig, cluster: Cluster) -> None:
        super().__init__(config, cluster)
        self.places: dict[str, list[dict[str, Any]]] = {}
        self.steps: dict[str, int] = {}
        self.stepped = threading.Condition()

    async def run(
        self, job: JobRecord, session: SessionRecord, folder: Path
    ) -> AsyncIterator[dict[str, Any]]:
        async for event in super().run(job, session, folder):
            with self.stepped:
                if event["type"] == "started":
                    self.places.setdefault(job.id, []).append(event)
                elif event["type"] == "step_done":
                    self.steps[job.id] = self.steps.get(job.id, 0) + 1
                self.stepped.notify_all()
            yield event

    def reach_step(self, job: str, patience: float) -> None:
        """Wait until a replica has made a step of a turn."""
        with self.stepped:
            assert self.stepped.wait_for(lambda: self.steps.get(job), patience), self.reason

    def reach_capacity(self, replicas: int, patience: float, *, restarts: int = 0) -> None:
        """Wait until so many replicas run, and so many dead ones have had a successor."""
        deadline = time.monotonic() + patience
        while self.capacity != replicas or self.restarts < restarts:
            assert not self.is_lost, self.reason
            assert time.monotonic() < deadline, f"{self.capacity} replicas run; {self.reason}"
            time.sleep(0.1)

    def replicas(self, job: str) -> list[str]:
        """Where a turn was begun, in order."""
        return [place["replica"] for place in self.places[job]]


class Client:
    """A user of a service, who waits as long as a test may take and no longer."""

    def __init__(self, http: httpx.Client, backend: WatchedBackend) -> None:
        self.http, self.backend = http, backend
        self._deadline = time.monotonic() + PATIENCE

    def left(self) -> float:
        """Seconds that the test still has."""
        seconds = self._deadline - time.monotonic()
        assert seconds > 0, f"not done within {PATIENCE:g} s"
        return seconds

    def session(self, clip: Path) -> str:
        files = {"video": ("clip.mp4", clip.read_bytes(), "video/mp4")}
        answer = self.http.post("/v1/sessions", files=files)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def cancel(self, job: str) -> None:
        """Cancel a job that runs; where it was so quick that it is past its last step, skip."""
        self.http.post(f"/v1/jobs/{job}/cancel")
        state = self.ended(job)["state"]
        if state == "finished":
            pytest.skip(f"{LONG} steps ended before they could be cancelled")
        assert state == "cancelled"

    def under_way(self, session: str, steps: int, camera: str = "pan_right") -> str:
        """A job of which a replica has made a step."""
        job = self.ask(session, steps, camera)
        self.backend.reach_step(job, self.left())
        return job

    def settled(self, session: str, replica: str) -> None:
        """Wait until Serve has heard where a session is; a replica does not tell at once."""
        handle = self.backend._handle.options(multiplexed_model_id=session)
        in_row = 0
        while in_row < 10:
            found = handle.describe.remote().result(timeout_s=self.left())["replica"]
            in_row = in_row + 1 if found == replica else 0

    def ask(self, session: str, steps: int, camera: str = "pan_right") -> str:
        body = {"camera": camera, "num_inference_steps": steps}
        answer = self.http.post(f"/v1/sessions/{session}/turns", json=body)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def ended(self, job: str) -> dict[str, Any]:
        """A job once it has ended."""
        # its stream says something every few seconds, if only that there is nothing new
        with self.http.stream("GET", f"/v1/jobs/{job}/events") as events:
            for _ in events.iter_lines():
                self.left()
        found: dict[str, Any] = self.http.get(f"/v1/jobs/{job}").json()
        return found

    def made(self, session: str, steps: int, camera: str = "pan_right") -> str:
        job = self.ask(session, steps, camera)
        found = self.ended(job)
        assert found["state"] == "finished", found
        return job

    def turns(self, session: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.http.get(f"/v1/sessions/{session}/turns").json()["data"]
        return rows


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray cluster in this machine, of nothing but what two replicas take.

    Skips where none comes up.
    """
    # sockets lie in it, whose paths must be short
    folder = tempfile.mkdtemp(prefix="ray")
    with pytest.MonkeyPatch.context() as patch:
        # of the processes themselves: a runtime environment would take another one to set it up,
        # and leave the workers that Ray starts beforehand without use
        path = os.pathsep.join([str(ROOT), *sys.path])
        quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
        for name, value in {**SLOW, **quiet, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}.items():
            patch.setenv(name, value)
        try:
            is_over = start_ray(folder)
            yield
            ray.shutdown()
            is_over.set()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def start_ray(folder: str) -> threading.Event:
    """Returns what has to be set behind Ray's end, for its processes end with the thread that began
    them. Ray itself waits for half a minute, but for each answer as long as `SLOW` lets it."""
    failures: list[Exception] = []
    is_up, is_over = threading.Event(), threading.Event()

    def start() -> None:
        try:
            ray.init(
                "local",
                num_cpus=2,
                object_store_memory=80 << 20,
                include_dashboard=False,
                log_to_driver=False,
                _temp_dir=folder,
                _node_ip_address="127.0.0.1",
            )
        except Exception as error:
            failures.append(error)
        is_up.set()
        is_over.wait()

    threading.Thread(target=start, daemon=True).start()
    if not is_up.wait(STARTING):
        pytest.skip(f"no cluster comes up in this machine within {STARTING:g} s")
    for error in failures:
        is_over.set()
        if "timed out during startup" not in str(error):
            raise error
        pytest.skip(f"no cluster comes up in this machine: {error}")
    return is_over


@pytest.fixture(scope="module")
def service(
    cluster: None,
    serving: Callable[..., Any],
    tiny_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    store = tmp_path_factory.mktemp("shared") / "store"
    settings: dict[str, Any] = {"checkpoint": str(tiny_checkpoint), "device": "cpu"}
    backend = WatchedBackend(ServingConfig(store=store, **settings), Cluster(replicas=2))
    with serving(store, backend, **settings) as live:
        backend.reach_capacity(2, PATIENCE)
        yield live


@pytest.fixture
def client(service: Any) -> Iterator[Client]:
    with httpx.Client(base_url=service.address, timeout=PATIENCE) as http:
        yield Client(http, service.backend)


def test_turns_of_two_sessions_stay_with_their_replicas(
    service: Any, client: Client, source_clip: Path
) -> None:
    backend = service.backend
    first, second = client.session(source_clip), client.session(source_clip)
    # one turn occupies a replica until it is cancelled; the other session's is made meanwhile
    long = client.under_way(first, LONG)
    short = client.made(second, SHORT)
    assert client.http.get(f"/v1/jobs/{long}").json()["state"] == "running"
    client.cancel(long)
    assert backend.steps[long] < LONG
    assert client.turns(first) == []
    (home,), (other,) = backend.replicas(long), backend.replicas(short)
    assert home != other

    for session, replica in ((first, home), (second, other)):
        client.settled(session, replica)
        for number in (1, 2):
            if len(client.turns(session)) < number:
                job = client.made(session, SHORT, "pan_right" if number == 1 else "arc_left")
                assert backend.replicas(job) == [replica]
        retrieved = client.turns(session)[1]["report"]["memory"]["retrieved"]
        assert [row["turn"] for row in retrieved] == [1]


def test_another_replica_makes_the_turn_of_one_that_is_killed(
    service: Any, client: Client, source_clip: Path
) -> None:
    backend = service.backend
    session = client.session(source_clip)
    client.made(session, SHORT)
    job = client.under_way(session, KILLED, "arc_left")
    os.kill(backend.places[job][0]["process"], signal.SIGKILL)
    found = client.ended(job)
    assert (found["state"], found["attempts"]) == ("finished", 1), found
    killed, home = backend.replicas(job)
    assert killed != home

    first, second = client.turns(session)
    assert (first["number"], second["number"], second["job"]) == (1, 2, job)
    assert [row["turn"] for row in second["report"]["memory"]["retrieved"]] == [1]
    video = client.http.get(f"/v1/sessions/{session}/turns/2/video")
    assert video.status_code == 200 and b"ftyp" in video.content[:16]
    folder = service.config.store / "sessions" / session
    assert [row["number"] for row in SessionFolder(folder).read()["turns"]] == [1, 2]
    left = {path.name for path in folder.rglob("*") if path.name.startswith(".")}
    assert left == set()
    # the next one remembers both, and the dead replica has a successor
    client.made(session, SHORT, "tilt_up")
    retrieved = client.turns(session)[2]["report"]["memory"]["retrieved"]
    assert sorted(row["turn"] for row in retrieved) == [1, 2]
    backend.reach_capacity(2, client.left(), restarts=1)


def test_a_session_that_another_has_gone_on_with_is_opened_again(
    service: Any, client: Client, source_clip: Path
) -> None:
    backend = service.backend
    here, elsewhere, mine = (client.session(source_clip) for _ in range(3))
    there = client.under_way(elsewhere, LONG)
    (away,) = backend.replicas(there)
    (home,) = backend.replicas(client.made(mine, SHORT))
    assert home != away
    # its home is busy, so the session goes on where it is free
    busy = client.under_way(here, LONG)
    client.cancel(there)
    assert backend.replicas(client.made(mine, SHORT, "arc_left")) == [away]
    # and comes back to a home that knows nothing of that
    client.settled(elsewhere, away)
    there = client.under_way(elsewhere, LONG)
    assert backend.replicas(there) == [away]
    # a right to write that is gone ends a turn, whoever took it
    issue(service.config.store / "sessions" / here)
    assert client.ended(busy)["state"] == "cancelled"
    assert backend.replicas(client.made(mine, SHORT, "tilt_up")) == [home]
    client.cancel(there)
    remembered = [
        sorted(row["turn"] for row in turn["report"]["memory"]["retrieved"])
        for turn in client.turns(mine)
    ]
    assert remembered == [[], [1], [1, 2]]


def test_a_replica_that_hangs_ends_itself(service: Any, client: Client, source_clip: Path) -> None:
    backend, session = service.backend, client.session(source_clip)
    client.made(session, SHORT)
    folder = service.config.store / "sessions" / session
    order: dict[str, Any] = {
        "session": {"id": session, "frames": 9, "window": None},
        "folder": str(folder),
    }
    order |= {"number": 1, "claim": issue(folder), "stall_seconds": 0.5}
    lock = WriterLock(folder, "a test")
    assert lock.acquire(PATIENCE)
    try:
        with pytest.raises(RayActorError):
            backend._handle.publish.remote(order).result(timeout_s=client.left())
    finally:
        lock.release()
    # the other one goes on meanwhile
    client.made(session, SHORT, "arc_left")
