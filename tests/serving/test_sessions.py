"""Sessions over a fake backend: lists, branches, exports, deletion, retention, the disk."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from store_check import check_store

from mv2v_engine.errors import StorageError
from mv2v_engine.serving.store import tables
from tests.serving.fake_backend import FakeBackend
from tests.serving.in_process import (
    TURN,
    abandon,
    asked,
    ended,
    finished,
    in_loop,
    new_session,
    refused,
    serving,
    started,
    until,
)

DAY = 86_400


@in_loop
async def test_lists_come_in_pages(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("where", ["waiting", "running"])
@in_loop
async def test_a_deleted_session_is_gone_at_once_and_whole(
    tmp_path: Path, held: FakeBackend, where: str
) -> None:
    async with serving(tmp_path, held) as (service, _):
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
        held.go.set()
        await deleting
        assert held.released == [session.id]
        assert not service.store.session(session.id).exists()
        if where == "waiting":
            assert (await ended(service, before)).state == "finished"
        assert len(service._scheduler.memory) == (1 if where == "waiting" else 0)
    check_store(tmp_path)


@in_loop
async def test_a_branch_goes_its_own_way(tmp_path: Path) -> None:
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


@in_loop
async def test_an_export_holds_what_the_session_is(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, _):
        session = await finished(service, "anna")
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


@in_loop
async def test_a_full_disk_refuses_what_it_cannot_take(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, _):
        session = await finished(service)
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


@in_loop
async def test_retention_by_age_and_bytes_spares_what_is_in_use(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, backend):
        sessions = [await new_session(service) for _ in range(5)]
        old = sessions[:2]
        backend.go.clear()
        job = await asked(service, old[1])
        await service._database.write(partial(tables.advance_clock, seconds=10 * DAY))
        for session in sessions[2:]:
            await service._database.write(
                partial(tables.touch, session_id=session.id, now=session.created)
            )
        retention = service._retention
        retention.config = replace(service.config, keep_days=5)
        assert await retention.sweep() == [old[0].id]
        # each has 7 bytes: two of the three idle ones must go, in the order of their use
        retention.config = replace(service.config, keep_bytes=14)
        assert await retention.sweep() == [sessions[2].id, sessions[3].id]
        backend.go.set()
        await ended(service, job)
    check_store(tmp_path)


@pytest.mark.parametrize("jump", [40 * DAY, -40 * DAY])
@in_loop
async def test_a_jump_of_the_clock_makes_no_session_older(
    tmp_path: Path, jump: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither while the service runs nor while it is off; only its own running does."""
    real = time.time
    async with serving(tmp_path, keep_days=30) as (service, _):
        sessions = [await new_session(service) for _ in range(2)]
        monkeypatch.setattr(time, "time", lambda: real() + jump)
        assert await service._retention.sweep() == []
        late = await new_session(service)
    monkeypatch.setattr(time, "time", lambda: real() - jump)
    for _ in range(3):
        async with serving(tmp_path, keep_days=30) as (service, _):
            assert await service._retention.sweep() == []
            assert len((await service.sessions("")).items) == 3
    async with serving(tmp_path, keep_days=30) as (service, _):
        await service._database.write(partial(tables.advance_clock, seconds=29 * DAY))
        await service._database.write(partial(tables.touch, session_id=late.id, now=real()))
        assert await service._retention.sweep() == []
    async with serving(tmp_path, keep_days=30) as (service, _):
        await service._database.write(partial(tables.advance_clock, seconds=2 * DAY))
        # the service's first sweep may be faster
        await service._retention.sweep()
        assert [s.id for s in (await service.sessions("")).items] == [late.id]
        assert late.id not in [session.id for session in sessions]


@in_loop
async def test_a_jump_of_the_clock_hides_no_event_and_promises_no_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a reader that comes back after kills, the clock being another one each time."""
    real, last, job = time.time, 0, None
    for jump in (0.0, 40 * DAY, -40 * DAY):
        monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
        backend = FakeBackend()
        backend.go.clear()
        service = await started(tmp_path, backend, max_attempts=9)
        job = job or await asked(service, await new_session(service))
        seen = []
        async for event in await service.events("", job.id, after=last):
            last = event.number
            seen.append(event.kind)
            if event.kind == "started" and jump >= 0:
                break
            backend.go.set()
        assert seen[:2] == ["queued", "started"]
        if jump >= 0:
            await abandon(service)
    assert seen[-1] == "finished"
    assert 0 < service._scheduler.turn_seconds < 60
    await service.stop()


@in_loop
async def test_a_store_has_one_service(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, _):
        with pytest.raises(StorageError, match=r"served by process \d+"):
            async with serving(tmp_path):
                pass
        await new_session(service)
    (tmp_path / "service.sqlite3").rename(tmp_path / "kept")
    with pytest.raises(StorageError, match=r"has sessions and no service\.sqlite3"):
        async with serving(tmp_path):
            pass
