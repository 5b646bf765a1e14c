"""Scheduling, cancelling, idempotency, owners: the service over a fake backend."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from store_check import check_store

from mv2v_engine.serving.config import Limits
from mv2v_engine.serving.store.records import JobRecord
from mv2v_engine.serving.watch.listener import Listener
from tests.serving.fake_backend import STEPS, FakeBackend
from tests.serving.in_process import (
    TURN,
    asked,
    begun,
    ended,
    in_loop,
    new_session,
    published,
    refused,
    serving,
    until,
)


@in_loop
async def test_a_turn_from_its_request_to_its_files(tmp_path: Path) -> None:
    told: list[str] = []

    class Told(Listener):
        def job_queued(self, job: JobRecord) -> None:
            told.append(f"queued {job.position}")

        def job_started(self, job: JobRecord) -> None:
            told.append(f"started {job.number}")

        def job_event(self, job: JobRecord, event: dict[str, Any]) -> None:
            told.append(event["type"])

        def job_ended(self, job: JobRecord, report: dict[str, Any] | None) -> None:
            told.append(f"{job.state} {report}")

    async with serving(tmp_path, None, Told()) as (service, _):
        session = await new_session(service)
        assert session.warnings == ("the model takes 9 frames: frames 0 to 8 of 20",)
        job = await asked(service, session)
        events = [event async for event in await service.events("", job.id)]
        assert [event.kind for event in events] == [
            "queued",
            "started",
            *["step_done"] * STEPS,
            "finished",
        ]
        numbers = [event.number for event in events]
        assert numbers == list(range(1, len(events) + 1))
        # a reader that comes back gets what it lacks, and one that has all gets nothing
        assert [e.number async for e in await service.events("", job.id, after=3)] == [4, 5, 6]
        assert [e async for e in await service.events("", job.id, after=6)] == []
        job = await service.job("", job.id)
        assert (job.state, job.number, job.attempts) == ("finished", 1, 1)
        (turn,) = await service.turns("", session.id)
        assert (turn.number, turn.job, turn.request) == (1, job.id, TURN)
        video = await service.turn_file("", session.id, 1, "video")
        assert video.read_bytes() == b"frames of turn 1"
        footprint = await service.footprint("", session.id)
        assert footprint.next_turn_tokens == {"target": 3}
        assert footprint.disk_bytes == 7 + turn.bytes
    assert told == ["queued 1", "started 1", *["step_done"] * STEPS, "finished {'turn': 1}"]
    # what a job came to outlives the process that kept its events
    async with serving(tmp_path) as (service, _):
        (last,) = [e async for e in await service.events("", job.id, after=6)]
        assert last.data == {"type": "finished", "turn": 1}
        assert [e async for e in await service.events("", job.id, after=last.number)] == []
    check_store(tmp_path)


@in_loop
async def test_one_turn_of_a_session_at_a_time_in_the_order_asked(
    tmp_path: Path, held: FakeBackend
) -> None:
    held.capacity = 2
    async with serving(tmp_path, held, max_sessions_open=1) as (service, _):
        first, second = await new_session(service), await new_session(service)
        jobs = [await asked(service, s) for s in (first, first, second, first)]
        await until(service, jobs[0], "started")
        await until(service, jobs[2], "started")
        states = [(await service.job("", job.id)).state for job in jobs]
        assert states == ["running", "queued", "running", "queued"]
        assert (await service.job("", jobs[3].id)).position == 2
        held.go.set()
        done = [await ended(service, job) for job in jobs]
        assert [job.number for job in done] == [1, 2, 1, 3]
        # as many are remembered as sessions are open
        known = [(await service.footprint("", s.id)).next_turn_tokens for s in (first, second)]
        assert sorted(bool(tokens) for tokens in known) == [False, True]
        assert set(held.made.values()) == {1}
    check_store(tmp_path)


@in_loop
async def test_an_idempotency_key_asks_once(tmp_path: Path) -> None:
    async with serving(tmp_path, max_queue=1) as (service, backend):
        session = await new_session(service, key="k")
        assert (await new_session(service, key="k")).id == session.id
        other = await service.upload_path()
        other.write_bytes(b"another video")
        error = await refused(service.create_session("", other, "clip.mp4", key="k"))
        assert error.code == "idempotency_conflict"
        backend.go.clear()
        both = await asyncio.gather(
            *(service.submit("", session.id, TURN, key="turn") for _ in range(2))
        )
        assert both[0][0].id == both[1][0].id
        assert sorted(is_new for _, is_new in both) == [False, True]
        error = await refused(service.submit("", session.id, TURN | {"seed": 2}, key="turn"))
        assert error.code == "idempotency_conflict"
        backend.go.set()
        await ended(service, both[0][0])
        again, is_new = await service.submit("", session.id, TURN, key="turn")
        assert (again.state, is_new) == ("finished", False)
    check_store(tmp_path)


@in_loop
async def test_nobody_sees_what_is_anothers(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=Limits(sessions=1)) as (service, _):
        session = await new_session(service, "anna")
        job = await asked(service, session)
        await ended(service, job)
        calls = [
            service.session("ben", session.id),
            service.source("ben", session.id),
            service.turns("ben", session.id),
            service.turn_file("ben", session.id, 1, "video"),
            service.footprint("ben", session.id),
            service.submit("ben", session.id, TURN),
            service.branch("ben", session.id, 1),
            service.export("ben", session.id),
            service.delete_session("ben", session.id),
            service.job("ben", job.id),
            service.events("ben", job.id),
            service.cancel("ben", job.id),
            service.sessions("ben", after=session.id),
            service.jobs("ben", session=session.id),
            service.jobs("ben", after=job.id),
        ]
        for call in calls:
            assert (await refused(call)).code == "not_found"
        assert (await service.sessions("ben")).items == ()
        assert (await service.jobs("ben")).items == ()
        assert (await refused(new_session(service, "anna"))).code == "too_many_sessions"
        await new_session(service, "ben")
    check_store(tmp_path)


@in_loop
async def test_cancelling_what_waits_runs_or_has_ended(tmp_path: Path, held: FakeBackend) -> None:
    async with serving(tmp_path, held) as (service, _):
        session, (running, waiting) = await begun(service, 2)
        assert (await service.cancel("", waiting.id)).state == "cancelled"
        job = await service.cancel("", running.id)
        assert (job.state, job.is_cancelling) == ("running", True)
        held.go.set()
        job = await ended(service, running)
        assert (job.state, job.number) == ("cancelled", None)
        assert job.error is not None and job.error["code"] == "cancelled"
        # not a step more, and the session's next turn is its first
        assert held.steps.get(running.id, 0) == 0
        again = await ended(service, await asked(service, session))
        assert (again.state, again.number) == ("finished", 1)
        assert (await service.cancel("", again.id)).state == "finished"
    assert waiting.id not in held.order
    check_store(tmp_path)


@in_loop
async def test_a_reader_that_leaves_changes_nothing(tmp_path: Path, held: FakeBackend) -> None:
    async with serving(tmp_path, held) as (service, _):
        session = await new_session(service)
        job = await asked(service, session)
        reader = asyncio.create_task(ended(service, job))
        await until(service, job, "started")
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        # nor does a caller whose request is cut off: the cancellation is done all the same
        caller = asyncio.create_task(service.submit("", session.id, TURN))
        await asyncio.sleep(0)
        held.go.set()
        assert (await ended(service, job)).state == "finished"
        await caller


@pytest.mark.parametrize("where", ["begun", "stored", "written"])
@in_loop
async def test_a_crash_of_the_worker_is_one_failed_job_at_most(
    tmp_path: Path, held: FakeBackend, where: str
) -> None:
    async with serving(tmp_path, held) as (service, _):
        session, (first, second) = await begun(service, 2)
        folder = service.store.session(session.id)
        (folder / ".session-abcdefgh.json").write_text("half")
        held.crash[first.id] = where
        held.go.set()
        first, second = await ended(service, first), await ended(service, second)
        is_kept = where != "begun"
        assert first.state == ("finished" if is_kept else "failed")
        assert second.number == (2 if is_kept else 1)
        assert (first.error or {}).get("code") == (None if is_kept else "worker_crashed")
        assert set(held.made.values()) == {1}
        for turn in await service.turns("", session.id):
            await published(service, session, turn.number)
    check_store(tmp_path)


@in_loop
async def test_a_failed_turn_leaves_the_session_as_it_was(
    tmp_path: Path, held: FakeBackend
) -> None:
    async with serving(tmp_path, held) as (service, _):
        session = await new_session(service)
        job = await asked(service, session)
        held.fails[job.id] = "out_of_memory"
        held.go.set()
        job = await ended(service, job)
        assert job.error == {"code": "out_of_memory", "message": "as asked"}
        assert (await ended(service, await asked(service, session))).number == 1
    check_store(tmp_path)


@in_loop
async def test_what_the_model_cannot_do_is_refused_at_the_door(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, backend):
        session = await new_session(service)
        bad: list[dict[str, Any]] = [
            {},
            {"camera": "nowhere"},
            {"camera": "/etc/passwd.json"},
            {"camera": "x.json#cam01"},
            {"camera": {"poses": [[1]]}},
            {"camera": "pan_right" * 100},
            TURN | {"prompt": "a red ball"},
            TURN | {"guidance_scale": 3.0},
            TURN | {"num_inference_steps": 0},
            TURN | {"memory": "all"},
            TURN | {"steps": 3},
        ]
        for request in bad:
            error = await refused(service.submit("", session.id, request))
            assert error.code == "unprocessable_turn", request
        assert error.message.startswith("a turn has no steps")
        backend.about = None
        assert (await refused(service.submit("", session.id, TURN))).code == "not_ready"
        backend.about = FakeBackend(engine={"checkpoint": "other"}).about
        error = await refused(service.submit("", session.id, TURN))
        assert error.code == "unprocessable_turn" and "made for fake" in error.message
    assert (await refused(service.submit("", session.id, TURN))).code == "not_ready"
