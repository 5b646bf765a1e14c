"""Scheduling, cancelling, idempotency, branches, retention: the service over a fake backend."""

from __future__ import annotations

import asyncio
import json
import shutil
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from store_check import check_store

from mv2v_engine.errors import StorageError
from mv2v_engine.serving import tables
from mv2v_engine.serving.config import Limits
from mv2v_engine.serving.listener import Listener
from mv2v_engine.serving.records import JobRecord
from tests.serving.fake_backend import STEPS, FakeBackend
from tests.serving.in_process import (
    TURN,
    asked,
    ended,
    new_session,
    published,
    refused,
    serving,
    until,
)

DAY = 86_400


def test_a_turn_from_its_request_to_its_files(tmp_path: Path) -> None:
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

    async def main() -> None:
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

    asyncio.run(main())


def test_one_turn_of_a_session_at_a_time_in_the_order_asked(tmp_path: Path) -> None:
    async def main() -> None:
        backend = FakeBackend()
        backend.capacity = 2
        backend.go.clear()
        async with serving(tmp_path, backend) as (service, _):
            first, second = await new_session(service), await new_session(service)
            jobs = [await asked(service, s) for s in (first, first, second, first)]
            await until(service, jobs[0], "started")
            await until(service, jobs[2], "started")
            states = [(await service.job("", job.id)).state for job in jobs]
            assert states == ["running", "queued", "running", "queued"]
            assert (await service.job("", jobs[3].id)).position == 2
            backend.go.set()
            done = [await ended(service, job) for job in jobs]
            assert [job.number for job in done] == [1, 2, 1, 3]
            assert set(backend.made.values()) == {1}
        check_store(tmp_path)

    asyncio.run(main())


def test_a_full_queue_refuses_and_says_when_to_come_back(tmp_path: Path) -> None:
    async def main() -> None:
        backend = FakeBackend()
        backend.go.clear()
        async with serving(tmp_path, backend, max_queue=2) as (service, _):
            session = await new_session(service)
            running = await asked(service, session)
            await until(service, running, "started")
            waiting = [await asked(service, session), await asked(service, session)]
            error = await refused(service.submit("", session.id, TURN))
            assert (error.code, error.status) == ("queue_full", 429)
            assert int(error.headers["Retry-After"]) >= 1
            await service.cancel("", waiting[0].id)
            await asked(service, session)
            backend.go.set()
            await ended(service, waiting[1])

    asyncio.run(main())


def test_an_idempotency_key_asks_once(tmp_path: Path) -> None:
    async def main() -> None:
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

    asyncio.run(main())


def test_nobody_sees_what_is_anothers(tmp_path: Path) -> None:
    async def main() -> None:
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

    asyncio.run(main())


def test_lists_come_in_pages(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as (service, _):
            ids = [(await new_session(service)).id for _ in range(5)]
            page = await service.sessions("", limit=2)
            assert [s.id for s in page.items] == ids[:2:-1] and page.has_more
            page = await service.sessions("", limit=2, after=page.items[-1].id)
            assert [s.id for s in page.items] == ids[2:0:-1] and page.has_more
            page = await service.sessions("", limit=2, after=ids[2], is_newest_first=False)
            assert [s.id for s in page.items] == ids[3:] and not page.has_more
            session = await service.session("", ids[0])
            jobs = [(await asked(service, session)).id for _ in range(3)]
            page = await service.jobs("", session=ids[0], limit=2)
            assert [job.id for job in page.items] == jobs[:0:-1] and page.has_more
            assert (await service.jobs("", session=ids[1])).items == ()

    asyncio.run(main())


def test_cancelling_what_waits_runs_or_has_ended(tmp_path: Path) -> None:
    async def main() -> None:
        backend = FakeBackend()
        backend.go.clear()
        async with serving(tmp_path, backend) as (service, _):
            session = await new_session(service)
            running, waiting = await asked(service, session), await asked(service, session)
            await until(service, running, "started")
            assert (await service.cancel("", waiting.id)).state == "cancelled"
            job = await service.cancel("", running.id)
            assert (job.state, job.is_cancelling) == ("running", True)
            backend.go.set()
            job = await ended(service, running)
            assert (job.state, job.number) == ("cancelled", None)
            assert job.error is not None and job.error["code"] == "cancelled"
            # not a step more, and the session's next turn is its first
            assert backend.steps.get(running.id, 0) == 0
            again = await ended(service, await asked(service, session))
            assert (again.state, again.number) == ("finished", 1)
            assert (await service.cancel("", again.id)).state == "finished"
        assert waiting.id not in backend.order
        check_store(tmp_path)

    asyncio.run(main())


def test_a_reader_that_leaves_changes_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        backend = FakeBackend()
        backend.go.clear()
        async with serving(tmp_path, backend) as (service, _):
            session = await new_session(service)
            job = await asked(service, session)
            reader = asyncio.create_task(ended(service, job))
            await until(service, job, "started")
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            # nor does a caller whose request is cut off: the cancellation is done all the same
            caller = asyncio.create_task(service.submit("", session.id, TURN))
            await asyncio.sleep(0)
            backend.go.set()
            assert (await ended(service, job)).state == "finished"
            await caller

    asyncio.run(main())


@pytest.mark.parametrize("where", ["begun", "stored", "written"])
def test_a_crash_of_the_worker_is_one_failed_job_at_most(tmp_path: Path, where: str) -> None:
    async def main() -> None:
        backend = FakeBackend()
        backend.go.clear()
        async with serving(tmp_path, backend) as (service, _):
            session = await new_session(service)
            first, second = await asked(service, session), await asked(service, session)
            await until(service, first, "started")
            folder = service.store.session(session.id)
            (folder / ".session-abcdefgh.json").write_text("half")
            backend.crash[first.id] = where
            backend.go.set()
            first, second = await ended(service, first), await ended(service, second)
            is_kept = where != "begun"
            assert first.state == ("finished" if is_kept else "failed")
            assert second.number == (2 if is_kept else 1)
            assert (first.error or {}).get("code") == (None if is_kept else "worker_crashed")
            assert set(backend.made.values()) == {1}
            for turn in await service.turns("", session.id):
                await published(service, session, turn.number)
        check_store(tmp_path)

    asyncio.run(main())


def test_a_failed_turn_leaves_the_session_as_it_was(tmp_path: Path) -> None:
    async def main() -> None:
        backend = FakeBackend()
        backend.go.clear()
        async with serving(tmp_path, backend) as (service, _):
            session = await new_session(service)
            job = await asked(service, session)
            backend.fails[job.id] = "out_of_memory"
            backend.go.set()
            job = await ended(service, job)
            assert job.error == {"code": "out_of_memory", "message": "as asked"}
            assert (await ended(service, await asked(service, session))).number == 1
        check_store(tmp_path)

    asyncio.run(main())


@pytest.mark.parametrize("where", ["waiting", "running"])
def test_a_deleted_session_is_gone_at_once_and_whole(tmp_path: Path, where: str) -> None:
    async def main() -> None:
        backend = FakeBackend()
        backend.go.clear()
        async with serving(tmp_path, backend) as (service, _):
            session, other = await new_session(service), await new_session(service)
            before = await asked(service, other if where == "waiting" else session)
            await until(service, before, "started")
            job = await asked(service, session)
            stream = await service.events("", job.id)
            deleting = asyncio.create_task(service.delete_session("", session.id))
            last = [event async for event in stream][-1]
            assert last.kind == "cancelled"
            assert (await refused(service.session("", session.id))).code == "not_found"
            assert (await refused(service.job("", job.id))).code == "not_found"
            backend.go.set()
            await deleting
            assert backend.released == [session.id]
            assert not service.store.session(session.id).exists()
            if where == "waiting":
                assert (await ended(service, before)).state == "finished"
            assert len(service._scheduler.memory) == (1 if where == "waiting" else 0)
        check_store(tmp_path)

    asyncio.run(main())


def test_a_branch_goes_its_own_way(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as (service, _):
            parent = await new_session(service)
            for _ in range(3):
                await ended(service, await asked(service, parent))
            branch = await service.branch("", parent.id, 2)
            assert (branch.parent, branch.parent_turn, branch.num_turns) == (parent.id, 2, 2)
            assert branch.id != parent.id and branch.name == parent.name
            assert [turn.job for turn in await service.turns("", branch.id)] == [None, None]
            assert (await ended(service, await asked(service, branch))).number == 3
            manifest = json.loads((service.store.session(branch.id) / "session.json").read_text())
            assert manifest["id"] == branch.id and len(manifest["turns"]) == 3
            await service.delete_session("", parent.id)
            video = await service.turn_file("", branch.id, 2, "video")
            assert video.read_bytes() == b"frames of turn 2"
            empty = await service.branch("", branch.id, 0)
            assert (await ended(service, await asked(service, empty))).number == 1
            assert (await refused(service.branch("", branch.id, 4))).code == "not_found"
        check_store(tmp_path)

    asyncio.run(main())


def test_an_export_holds_what_the_session_is(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as (service, _):
            session = await new_session(service, "anna")
            await ended(service, await asked(service, session))
            path = await service.export("anna", session.id)
            with zipfile.ZipFile(path) as file:
                assert sorted(file.namelist()) == [
                    "session.json",
                    "turn_0001.jpg",
                    "turn_0001.mp4",
                ]
                about = json.loads(file.read("session.json"))
            assert about["turns"][0]["request"] == TURN and "owner" not in about
            path.unlink()

    asyncio.run(main())


def test_a_lost_video_is_made_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as (service, _):
            session = await new_session(service)
            await ended(service, await asked(service, session))
            (await service.turn_file("", session.id, 1, "video")).unlink()
            error = await refused(service.turn_file("", session.id, 1, "video"))
            assert error.code == "not_finished" and "Retry-After" in error.headers
            assert (await published(service, session, 1)).exists()
            assert (
                await refused(service.turn_file("", session.id, 2, "video"))
            ).code == "not_found"

    asyncio.run(main())


def test_what_the_model_cannot_do_is_refused_at_the_door(tmp_path: Path) -> None:
    async def main() -> None:
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

    asyncio.run(main())


def test_a_full_disk_refuses_what_it_cannot_take(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as (service, _):
            session = await new_session(service)
            await ended(service, await asked(service, session))
            upload = await service.upload_path()
            upload.write_bytes(b"a video")
            free = shutil.disk_usage(tmp_path).free
            for holder in (service, service._sessions):
                holder.config = replace(service.config, min_free_bytes=2 * free)
            for call in (
                service.upload_path(),
                service.create_session("", upload, "clip.mp4"),
                service.branch("", session.id, 1),
                service.export("", session.id),
            ):
                assert (await refused(call)).code == "disk_full"
            assert (await service.turn_file("", session.id, 1, "video")).exists()
        check_store(tmp_path)

    asyncio.run(main())


def test_retention_by_age_and_bytes_spares_what_is_in_use(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as (service, backend):
            sessions = [await new_session(service) for _ in range(5)]
            old = sessions[:2]
            backend.go.clear()
            job = await asked(service, old[1])
            for session in old:
                before = partial(
                    tables.touch, session_id=session.id, now=session.created - 10 * DAY
                )
                await service._write(before)
            retention = service._retention
            retention.config = replace(service.config, keep_days=5)
            assert await retention.sweep() == [old[0].id]
            # each has 7 bytes: two of the three idle ones must go, in the order of their use
            retention.config = replace(service.config, keep_bytes=14)
            assert await retention.sweep() == [sessions[2].id, sessions[3].id]
            backend.go.set()
            await ended(service, job)
        check_store(tmp_path)

    asyncio.run(main())


def test_a_store_has_one_service(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as (service, _):
            with pytest.raises(StorageError, match=r"served by process \d+"):
                async with serving(tmp_path):
                    pass
            await new_session(service)
        (tmp_path / "service.sqlite3").rename(tmp_path / "kept")
        with pytest.raises(StorageError, match=r"has sessions and no service\.sqlite3"):
            async with serving(tmp_path):
                pass

    asyncio.run(main())
