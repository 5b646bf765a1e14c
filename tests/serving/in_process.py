"""A service over a fake backend, and what its tests do with it again and again."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ParamSpec

import pytest

from mv2v_engine.serving.config import Limits, ServingConfig
from mv2v_engine.serving.errors import ApiError
from mv2v_engine.serving.service import Service
from mv2v_engine.serving.store.records import JobRecord, ProbedVideo, SessionRecord
from mv2v_engine.serving.watch.listener import Listener
from tests.serving.fake_backend import FakeBackend

VIDEO = ProbedVideo(frames=20, width=64, height=48, fps=8.0, seconds=2.5)
TURN = {"camera": "pan_right", "seed": 1}
Given = ParamSpec("Given")


def in_loop(test: Callable[Given, Coroutine[Any, Any, None]]) -> Callable[Given, None]:
    """A test that is a coroutine, in an event loop of its own."""

    @functools.wraps(test)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


async def probe(
    owner: str, path: Path, limits: Limits, alpha: str, name: str = "source"
) -> ProbedVideo:
    assert path.exists()
    return VIDEO


@asynccontextmanager
async def serving(
    store: Path, backend: FakeBackend | None = None, *listeners: Listener, **settings: Any
) -> AsyncIterator[tuple[Service, FakeBackend]]:
    backend = backend or FakeBackend()
    service = await started(store, backend, *listeners, **settings)
    try:
        yield service, backend
    finally:
        await service.stop()


async def started(
    store: Path, backend: FakeBackend, *listeners: Listener, **settings: Any
) -> Service:
    config = ServingConfig(store=store, min_free_bytes=0, **settings)
    service = Service(config, backend, probe, listeners)
    await service.start()
    return service


async def abandon(service: Service) -> None:
    """What a kill leaves of a service: nothing is written any more, and the lock is free."""
    scheduler = service._scheduler
    tasks = [scheduler._loop, service._publisher._task, *scheduler._turns.values()]
    for task in tasks:
        if task is not None:
            task.cancel()
    await asyncio.gather(*(task for task in tasks if task), return_exceptions=True)
    service._database.close()
    service.store.unlock()


async def new_session(service: Service, owner: str = "", **more: Any) -> SessionRecord:
    upload = await service.upload_path()
    upload.write_bytes(b"a video")
    session = await service.create_session(owner, upload, "clip.mp4", **more)
    assert not upload.exists()
    return session


async def asked(service: Service, session: SessionRecord, **more: Any) -> JobRecord:
    job, is_new = await service.submit(session.owner, session.id, TURN | more)
    assert is_new
    return job


async def ended(service: Service, job: JobRecord) -> JobRecord:
    async for _ in await service.events(job.owner, job.id):
        pass
    return await service.job(job.owner, job.id)


async def until(service: Service, job: JobRecord, kind: str) -> None:
    """Wait for an event."""
    async for event in await service.events(job.owner, job.id):
        if event.kind == kind:
            return
    raise AssertionError(f"{job.id} ended without {kind}")


async def finished(service: Service, owner: str = "", turns: int = 1, **more: Any) -> SessionRecord:
    """A session with finished turns."""
    session = await new_session(service, owner, **more)
    for _ in range(turns):
        assert (await ended(service, await asked(service, session))).state == "finished"
    return session


async def begun(service: Service, turns: int = 1) -> tuple[SessionRecord, list[JobRecord]]:
    """A session of which turns were asked, once the first of them has started."""
    session = await new_session(service)
    jobs = [await asked(service, session) for _ in range(turns)]
    await until(service, jobs[0], "started")
    return session, jobs


async def refused(work: Awaitable[Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await work
    return caught.value


async def published(service: Service, session: SessionRecord, number: int) -> Path:
    """A turn's video, once it is there."""
    while not (await service.turn(session.owner, session.id, number)).is_published:
        await asyncio.sleep(0.005)
    return await service.turn_file(session.owner, session.id, number, "video")
