"""What a start makes of a store whose service was killed, for every moment of the kill."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from store_check import check_store

from mv2v_engine.locks import Lock
from mv2v_engine.serving.sessions import _place_uploads
from mv2v_engine.serving.store import jobs
from mv2v_engine.serving.store.folders import worker_lock
from mv2v_engine.serving.store.records import Uploads
from tests.serving.fake_backend import FakeBackend, store_turn, write_results
from tests.serving.in_process import (
    abandon,
    asked,
    begun,
    ended,
    finished,
    in_loop,
    new_session,
    published,
    refused,
    serving,
    started,
    until,
)


@pytest.mark.parametrize("moment", ["begun", "half", "unlisted", "stored", "written"])
@in_loop
async def test_a_kill_while_a_turn_is_made(tmp_path: Path, held: FakeBackend, moment: str) -> None:
    """Its turn is finished if the folder has it, else made again; the one behind it comes once."""
    service = await started(tmp_path, held)
    session = await new_session(service)
    held.go.set()
    await ended(service, await asked(service, session))
    held.go.clear()
    running, waiting = await asked(service, session), await asked(service, session)
    await until(service, running, "started")
    await abandon(service)
    # how far the worker came
    folder = service.store.session(session.id)
    if moment == "half":
        (folder / "turns" / ".turn_02-abcdefgh.safetensors").write_text("half")
        (folder / "results" / ".turn_0002-abcdefgh.mp4").write_text("half")
    if moment == "unlisted":
        (folder / "turns" / "turn_02.safetensors").write_text("not in the manifest")
    if moment in ("stored", "written"):
        store_turn(folder, session.id, 2)
    if moment == "written":
        write_results(folder, 2)

    again = FakeBackend()
    again.ready = False
    async with serving(tmp_path, again) as (service, _):
        is_kept = moment in ("stored", "written")
        # before any worker is ready
        numbers = [turn.number for turn in await service.turns("", session.id)]
        assert numbers == ([1, 2] if is_kept else [1])
        states = [(await service.job("", job.id)).state for job in (running, waiting)]
        assert states == ["finished" if is_kept else "queued", "queued"]
        again.ready = True
        again.changed()
        both = [await ended(service, job) for job in (running, waiting)]
        assert [(job.state, job.number) for job in both] == [("finished", 2), ("finished", 3)]
        assert both[0].attempts == (1 if is_kept else 2)
        expected = {(session.id, 3): 1} | ({} if is_kept else {(session.id, 2): 1})
        assert again.made == expected
        for number in (1, 2, 3):
            await published(service, session, number)
    check_store(tmp_path)


@in_loop
async def test_a_kill_while_a_video_is_made_again(tmp_path: Path) -> None:
    backend = FakeBackend()
    service = await started(tmp_path, backend)
    session = await finished(service)
    video = await service.turn_file("", session.id, 1, "video")
    video.unlink()
    backend.ready = False
    assert (await refused(service.turn_file("", session.id, 1, "video"))).code == "not_finished"
    video.with_name(".turn_0001-abcdefgh.mp4").write_text("half")
    await abandon(service)
    async with serving(tmp_path) as (service, _):
        await published(service, session, 1)
    check_store(tmp_path)


@in_loop
async def test_a_turn_that_kills_the_service_each_time_is_given_up(tmp_path: Path) -> None:
    job = None
    for attempt in (1, 2):
        backend = FakeBackend()
        backend.go.clear()
        service = await started(tmp_path, backend)
        if job is None:
            job = await asked(service, await new_session(service))
        await until(service, job, "started")
        assert (await service.job("", job.id)).attempts == attempt
        await abandon(service)
    assert job is not None
    async with serving(tmp_path) as (service, backend):
        job = await service.job("", job.id)
        assert job.state == "failed" and job.error is not None
        assert job.error["code"] == "worker_crashed" and backend.order == []
    check_store(tmp_path)


@in_loop
async def test_what_was_cancelled_stays_so(tmp_path: Path, held: FakeBackend) -> None:
    service = await started(tmp_path, held)
    _, (running, waiting) = await begun(service, 2)
    await service.cancel("", running.id)
    await service.cancel("", waiting.id)
    await abandon(service)
    async with serving(tmp_path) as (service, again):
        for job in (running, waiting):
            assert (await service.job("", job.id)).state == "cancelled"
        assert again.order == []


@in_loop
async def test_uploads_and_deletions_that_were_cut_off(tmp_path: Path) -> None:
    service = await started(tmp_path, FakeBackend())
    kept, deleted = await new_session(service), await new_session(service)
    await ended(service, await asked(service, deleted))
    # an upload under way, one whose session has its folder and no row, a branch half built
    (await service.upload_path()).write_bytes(b"half")
    upload = await service.upload_path()
    upload.write_bytes(b"whole")
    _place_uploads(service.store, Uploads(upload), "session_" + "0" * 24)
    (service.store.uploads / "branch").mkdir()
    begin = partial(jobs.delete_session, owner="", session_id=deleted.id, now=0.0, is_idle=True)
    await service._database.write(begin)
    await abandon(service)
    async with serving(tmp_path) as (service, _):
        assert [s.id for s in (await service.sessions("")).items] == [kept.id]
        assert (await service.jobs("")).items == ()
    check_store(tmp_path)


async def go_on(held: FakeBackend, when: Callable[[], bool]) -> None:
    """Let its steps be made from a moment on."""
    while not when():
        await asyncio.sleep(0.005)
    held.go.set()


@in_loop
async def test_a_stop_puts_the_turn_back_uncounted(tmp_path: Path, held: FakeBackend) -> None:
    async with serving(tmp_path, held, grace=0.0) as (service, _):
        _, (job, behind) = await begun(service, 2)
        # the step under way ends once the stop has asked for it
        going = asyncio.create_task(go_on(held, lambda: job.id in held._cancelled))
    await going
    async with serving(tmp_path) as (service, again):
        assert (await ended(service, behind)).number == 2
        job = await service.job("", job.id)
        assert (job.state, job.number, job.attempts) == ("finished", 1, 1)
        assert set(again.made.values()) == {1}
    check_store(tmp_path)


@in_loop
async def test_a_stop_lets_the_turn_finish_within_its_grace(
    tmp_path: Path, held: FakeBackend
) -> None:
    async with serving(tmp_path, held, grace=30.0) as (service, _):
        _, (job, behind) = await begun(service, 2)
        going = asyncio.create_task(go_on(held, lambda: not service.ready))
    await going
    async with serving(tmp_path, again := FakeBackend()) as (service, _):
        assert (await service.job("", job.id)).state == "finished"
        await ended(service, behind)
        assert again.order == [behind.id]


@in_loop
async def test_events_go_on_with_higher_numbers(tmp_path: Path, held: FakeBackend) -> None:
    service = await started(tmp_path, held)
    _, (job,) = await begun(service)
    seen = service._logs.find(job.id).last.number
    await abandon(service)
    async with serving(tmp_path) as (service, _):
        numbers = [e.number async for e in await service.events("", job.id, after=seen)]
        assert numbers == sorted(numbers) and numbers[0] > seen
    assert len(numbers) > 3


@in_loop
async def test_a_worker_that_outlives_its_server_is_waited_for(tmp_path: Path) -> None:
    async with serving(tmp_path):
        pass
    orphan = Lock(worker_lock(tmp_path))
    assert orphan.acquire()
    asyncio.get_running_loop().call_later(0.2, orphan.release)
    async with serving(tmp_path):
        assert not orphan.is_held
