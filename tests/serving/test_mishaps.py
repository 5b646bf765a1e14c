"""Workers that hang or never come up, listeners that raise, reports that lack something."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mv2v_engine.engine.folder import SessionFolder
from mv2v_engine.engine.request import Request
from mv2v_engine.engine.turn import Draft, KeptWindow
from mv2v_engine.errors import StorageError
from mv2v_engine.serving.config import ServingConfig
from mv2v_engine.serving.service import Service
from mv2v_engine.serving.store.folders import manifest_row
from mv2v_engine.serving.store.records import JobRecord
from mv2v_engine.serving.watch.listener import Listener
from mv2v_engine.serving.watch.metrics import Metrics
from mv2v_engine.serving.work import local
from mv2v_engine.serving.work.local import LocalBackend
from tests.serving.fake_backend import ABOUT
from tests.serving.in_process import (
    TURN,
    asked,
    ended,
    finished,
    in_loop,
    new_session,
    probe,
    refused,
    serving,
)

HANGS, DIES = 13, 14
# speaks as a worker does, and makes no turn; it does not come up again where it has died once
WORKER = f"""
import json, pathlib, sys

def say(message):
    print(json.dumps(message), flush=True)

store = pathlib.Path(json.loads(sys.stdin.readline())["store"])
if (store / "died").exists():
    sys.exit(3)
say({{"type": "ready", "about": {ABOUT!r}, "capacity": 1}})
for line in sys.stdin:
    order = json.loads(line)
    if order["type"] != "run":
        continue
    job, seed = order["job"]["id"], order["job"]["request"]["seed"]
    say({{"type": "event", "job": job, "event": {{"type": "started", "number": 1}}}})
    if seed == {DIES}:
        (store / "died").touch()
        sys.exit(3)
    if seed != {HANGS}:
        failed = {{"type": "failed", "code": "unprocessable_turn", "message": "as asked"}}
        say({{"type": "event", "job": job, "event": failed}})
"""


@asynccontextmanager
async def working(store: Path, **settings: Any) -> AsyncIterator[Service]:
    """A service whose worker is the one above, once it is ready."""
    config = ServingConfig(store=store, min_free_bytes=0, grace=0.0, **settings)
    backend = LocalBackend(config, command=(sys.executable, "-S", "-c", WORKER))
    service = Service(config, backend, probe)
    await service.start()
    try:
        while not service.ready:
            await asyncio.sleep(0.01)
        yield service
    finally:
        await service.stop()


@in_loop
async def test_a_turn_that_hangs_is_ended_and_the_next_is_made(tmp_path: Path) -> None:
    async with working(tmp_path, stall_seconds=3.0) as service:
        session = await new_session(service)
        hung = await asked(service, session, seed=HANGS)
        behind = await asked(service, session)
        first, second = await ended(service, hung), await ended(service, behind)
        assert first.error is not None and second.error is not None
        assert (first.state, first.error["code"]) == ("failed", "timeout")
        assert "said nothing for 3 s" in first.error["message"]
        # made by a new worker
        assert second.error["message"] == "as asked"
        assert service.backend.restarts == 1


@in_loop
async def test_a_worker_that_never_comes_up_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_PAUSES", (0.0, 0.0))

    async with working(tmp_path) as service:
        session = await new_session(service)
        last = await asked(service, session, seed=DIES)
        waiting = await asked(service, session)
        for job, words in ((last, "with code 3"), (waiting, "no worker became ready in 3")):
            job = await ended(service, job)
            assert job.error is not None and job.error["code"] == "worker_crashed"
            assert words in job.error["message"]
        assert not service.ready and "start the service again" in service.reason
        error = await refused(service.submit("", session.id, TURN))
        assert error.code == "not_ready" and "no worker became ready" in error.message
        # what there is can be read
        assert (await service.session("", session.id)).id == session.id


@in_loop
async def test_a_listener_that_raises_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []

    class Broken(Listener):
        def job_queued(self, job: JobRecord) -> None:
            raise RuntimeError("queued")

        def job_event(self, job: JobRecord, event: dict[str, Any]) -> None:
            raise RuntimeError("event")

        def job_ended(self, job: JobRecord, report: dict[str, Any] | None) -> None:
            raise RuntimeError("ended")

    class Told(Listener):
        def job_ended(self, job: JobRecord, report: dict[str, Any] | None) -> None:
            told.append(job.state)

    with caplog.at_level(logging.ERROR, logger="mv2v_engine.serving"):
        async with serving(tmp_path, None, Broken(), Told()) as (service, _):
            session = await new_session(service)
            for _ in range(2):
                assert (await ended(service, await asked(service, session))).state == "finished"
    assert told == ["finished"] * 2
    assert "Broken failed at what it was told" in caplog.text


@in_loop
async def test_a_report_that_lacks_something_is_counted_as_far_as_it_goes(tmp_path: Path) -> None:
    metrics = Metrics(queue_capacity=1, store=tmp_path)

    # the turns of this backend have no plan, no bytes and no counters
    async with serving(tmp_path / "store", None, metrics) as (service, _):
        await finished(service)
    said = metrics.render().decode()
    assert 'mv2v_jobs_total{code="",outcome="finished"} 1.0' in said
    assert "mv2v_merged_fraction_count 0.0" in said


def test_a_recovered_edit_has_its_windows(tmp_path: Path) -> None:
    store = SessionFolder(tmp_path)
    store.create("session", {"source": "x"})
    request = Request(
        prompt="a ball", seed=0, num_inference_steps=2, guidance_scale=1.0, memory="none"
    )
    rows = [{"window": 1, "plan": {"tokens": 5}}, {"window": 2, "plan": {"tokens": 7}}]
    latents = torch.zeros(1, 1, 2, 2)
    edit = Draft(1, request, {}, [KeptWindow(row, latents, torch.zeros(3)) for row in rows])
    for number in (1, 2):
        store.append(edit, number, latents)
    assert manifest_row(tmp_path, 1) is None
    edit.report = {"turn": 1, "num_windows": 2}
    store.finish(edit)
    found = (manifest_row(tmp_path, 1) or {})["report"]
    assert found == {"turn": 1, "num_windows": 2, "windows": rows}
    assert json.loads(json.dumps(found)) == found
    store.window_path({"number": 1, "camera": None}, 2).write_bytes(b"damaged")
    with pytest.raises(StorageError, match="cannot be read again"):
        manifest_row(tmp_path, 1)
