"""Turns of several sessions in one worker: shared forwards, and nobody's turn is another's."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from mv2v_engine import CancelToken, Engine, EngineConfig
from mv2v_engine.config import ConditioningMode
from mv2v_engine.engine.batch import TOKENS
from mv2v_engine.engine.folder import SessionFolder
from mv2v_engine.errors import KernelUnavailableError
from mv2v_engine.models.sample import Sample
from mv2v_engine.serving.work.host import Host
from mv2v_engine.testing import relative_error
from tests.serving.conftest import until

Json = dict[str, Any]
TURN = {"camera": "pan_right", "num_inference_steps": 4}
OTHER = {"camera": "arc_left", "num_inference_steps": 4, "seed": 3}
# float32 sums in another order, through the blocks and four steps
ROUNDING = 1e-4
_END = object()


@pytest.fixture
def folders(tmp_path: Path, source_clip: Path) -> list[Path]:
    found = []
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "source").write_bytes(source_clip.read_bytes())
        found.append(tmp_path / name)
    return found


def host_of(checkpoint: Path, max_open: int = 4, **settings: Any) -> Host:
    config = EngineConfig(**settings)
    host = Host(Engine.from_pretrained(checkpoint, device="cpu", config=config), max_open=max_open)
    host.warm_up()
    return host


class Asked:
    """A job of a session's first turn, and what is told of it."""

    def __init__(self, host: Host, folder: Path, request: Json, number: int | None = 1) -> None:
        self.events: list[Json] = []
        self.cancel = CancelToken()
        session = {"id": folder.name, "frames": 9, "window": None}
        job = {"id": folder.name, "number": number, "request": request}
        self.work = host.run(job, session, folder, self.cancel, self.events.append)

    @property
    def last(self) -> Json:
        return self.events[-1]

    def steps(self) -> list[int]:
        return [event["step"] for event in self.events if event["type"] == "step_done"]


def go_on(host: Host, *jobs: Asked) -> Iterator[None]:
    """Make all of them, as a worker does; comes back after every tick."""
    left = list(jobs)
    while left:
        left = [job for job in left if next(job.work, _END) is not _END]
        host.tick()
        yield


def latents(host: Host, folder: Path) -> Tensor:
    return host._open[folder.name].turns[0].latents


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Host], list[int]]:
    """Watches a host: how many samples each forward has had."""

    def watch(host: Host) -> list[int]:
        sizes: list[int] = []
        forward = host.engine.transformer.forward_samples

        def counted(samples: list[Sample]) -> list[Tensor]:
            sizes.append(len(samples))
            return forward(samples)

        monkeypatch.setattr(host.engine.transformer, "forward_samples", counted)
        return sizes

    return watch


@pytest.mark.parametrize("conditioning", ["joint", "static"])
def test_turns_of_two_sessions_share_their_forwards(
    conditioning: ConditioningMode,
    tiny_checkpoint: Path,
    folders: list[Path],
    packs: Callable[[Host], list[int]],
) -> None:
    host = host_of(tiny_checkpoint, conditioning=conditioning, batch_tokens=TOKENS)
    assert host.capacity == 4  # the most that may be open
    sizes = packs(host)
    jobs = [Asked(host, folders[0], TURN), Asked(host, folders[1], OTHER)]
    for _ in go_on(host, *jobs):
        pass
    # a first static step keeps what later ones read, and runs alone
    shared = 4 if conditioning == "joint" else 3
    assert sizes == [1, 1] * (4 - shared) + [2] * shared
    for job in jobs:
        assert (job.last["type"], job.last["published"]) == ("done", True)
        assert job.last["report"]["packed_steps"] == shared
        assert job.steps() == [1, 2, 3, 4]
    alone = host_of(tiny_checkpoint, conditioning=conditioning)
    assert alone.capacity == 1
    sizes = packs(alone)
    for folder, request in zip(folders, (TURN, OTHER), strict=False):
        own = folder.with_name(f"{folder.name}_alone")
        own.mkdir()
        (own / "source").write_bytes((folder / "source").read_bytes())
        job = Asked(alone, own, request)
        for _ in go_on(alone, job):
            pass
        assert job.last["report"]["packed_steps"] == 0
        assert relative_error(latents(host, folder), latents(alone, own)) < ROUNDING
    assert sizes == [1] * 8


def test_what_ends_one_turn_leaves_the_other(tiny_checkpoint: Path, folders: list[Path]) -> None:
    host = host_of(tiny_checkpoint, batch_tokens=TOKENS)
    cancelled, strange, whole = (
        Asked(host, folders[0], TURN),
        Asked(host, folders[1], TURN, None),  # a turn of views has a number
        Asked(host, folders[2], TURN),
    )
    for _ in go_on(host, cancelled, strange, whole):
        if cancelled.steps() == [1]:
            cancelled.cancel.cancel()
    assert cancelled.last == {"type": "cancelled"} and cancelled.steps() == [1]
    assert SessionFolder(folders[0]).read()["turns"] == []
    assert (strange.last["type"], strange.last["code"]) == ("failed", "internal")
    assert whole.last["type"] == "done" and whole.last["report"]["packed_steps"] == 1


def test_a_fault_that_nobody_foresaw_is_one_turns_own(
    tiny_checkpoint: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = host_of(tiny_checkpoint, batch_tokens=TOKENS)
    jobs = [Asked(host, folder, TURN) for folder in folders[:2]]
    steps = go_on(host, *jobs)
    next(steps)
    first = next(iter(host._batch._due.values()))
    monkeypatch.setattr(first, "advance", lambda velocities: {}["no such key"])
    for _ in steps:
        pass
    assert (jobs[0].last["type"], jobs[0].last["code"]) == ("failed", "internal")
    assert "KeyError" in jobs[0].last["message"]
    assert jobs[1].last["type"] == "done"


def test_sessions_that_turns_are_made_of_stay_open(
    tiny_checkpoint: Path, folders: list[Path]
) -> None:
    host = host_of(tiny_checkpoint, max_open=1, batch_tokens=TOKENS)
    assert host.capacity == 1
    jobs = [Asked(host, folder, TURN) for folder in folders[:2]]
    for _ in go_on(host, *jobs):
        pass
    assert [job.last["type"] for job in jobs] == ["done", "done"]
    third = Asked(host, folders[2], TURN)
    for _ in go_on(host, third):
        pass
    assert third.last["type"] == "done" and list(host._open) == ["c"]


def test_a_pack_that_cannot_run_costs_no_turn(
    tiny_checkpoint: Path,
    folders: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    host = host_of(tiny_checkpoint, batch_tokens=TOKENS)
    forward = host.engine.transformer.forward_samples

    def refused(samples: list[Sample]) -> list[Tensor]:
        if len(samples) > 1:
            raise KernelUnavailableError("no packs here")
        return forward(samples)

    monkeypatch.setattr(host.engine.transformer, "forward_samples", refused)
    jobs = [Asked(host, folder, TURN) for folder in folders[:2]]
    for _ in go_on(host, *jobs):
        pass
    assert [job.last["report"]["packed_steps"] for job in jobs] == [0, 0]
    assert "at most 1 tokens from now on: no packs here" in caplog.text


def test_editors_make_one_edit_at_a_time(editor_folder: Path) -> None:
    assert host_of(editor_folder, batch_tokens=TOKENS).capacity == 1


@pytest.mark.slow
def test_a_worker_that_is_killed_fails_all_its_turns(
    serving_engine: Callable[..., Any],
    upload: Callable[..., Any],
    tmp_path: Path,
    tiny_checkpoint: Path,
    events_of: Callable[..., Any],
) -> None:
    settings = {"checkpoint": str(tiny_checkpoint), "engine": EngineConfig(batch_tokens=TOKENS)}
    with serving_engine(tmp_path / "store", **settings) as service, service.client() as client:
        until(lambda: client.get("/readyz").status_code == 200)
        ids = [upload(client)["id"] for _ in range(2)]

        def ask(session: str, steps: int) -> str:
            request = {"camera": "pan_right", "num_inference_steps": steps}
            answer = client.post(f"/v1/sessions/{session}/turns", json=request)
            assert answer.status_code == 202, answer.text
            job: str = answer.json()["id"]
            return job

        # both are made at once, and share their steps
        jobs = [ask(session, 60) for session in ids]
        for job in jobs:
            assert events_of(client, job)[-1][1] == "finished"
        turn = client.get(f"/v1/sessions/{ids[0]}/turns/1").json()
        assert turn["report"]["packed_steps"] > 0
        assert 'mv2v_steps_total{how="packed"}' in client.get("/metrics").text
        # one waits behind the other of its own session
        jobs = [ask(session, 900) for session in (*ids, ids[0])]

        def states() -> list[str]:
            return [client.get(f"/v1/jobs/{job}").json()["state"] for job in jobs]

        until(lambda: states()[:2] == ["running", "running"])
        assert states()[2] == "queued"
        assert client.post(f"/v1/jobs/{jobs[2]}/cancel").status_code == 200
        os.kill(service.backend.pid, signal.SIGKILL)
        for job in jobs[:2]:
            _, kind, data = events_of(client, job)[-1]
            assert (kind, data["error"]["code"]) == ("failed", "worker_crashed")
        assert events_of(client, ask(ids[1], 2))[-1][1] == "finished"
