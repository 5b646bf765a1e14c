"""One token's share of the queue, of uploads and of the processes that decode them."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from mv2v_engine.serving.config import Limits, ServingConfig
from mv2v_engine.serving.errors import ApiError
from mv2v_engine.serving.http.bodies import BodyLimit
from mv2v_engine.serving.service import Service
from mv2v_engine.serving.work.prober import Prober
from tests.serving.fake_backend import FakeBackend
from tests.serving.in_process import TURN, ended, in_loop, new_session, refused, serving, until


async def sessions_of(service: Service, *owners: str) -> dict[str, str]:
    return {owner: (await new_session(service, owner)).id for owner in owners}


@in_loop
async def test_tokens_take_turns_however_many_one_asks_for(
    tmp_path: Path, held: FakeBackend
) -> None:
    async with serving(tmp_path, held) as (service, _):
        sessions = await sessions_of(service, "a", "b", "c")

        async def ask(owner: str) -> Any:
            return (await service.submit(owner, sessions[owner], TURN))[0]

        jobs = [await ask("a") for _ in range(4)]
        await until(service, jobs[0], "started")
        jobs += [await ask("b"), await ask("b"), await ask("c")]
        names = dict(
            zip([job.id for job in jobs], ["a1", "a2", "a3", "a4", "b1", "b2", "c1"], strict=True)
        )
        positions = {
            names[job.id]: (await service.job(job.owner, job.id)).position for job in jobs[1:]
        }
        # b and c have had no turn; then whoever's last one is the longest ago
        assert sorted(positions, key=lambda name: positions[name] or 0) == [
            *("b1", "c1", "a2"),
            *("b2", "a3"),
            "a4",
        ]
        # the stream of one that waits has heard of it
        seen = await service.events("a", jobs[3].id)
        assert [(await anext(seen)).data["position"] for _ in range(2)] == [3, 4]
        held.go.set()
        for job in jobs:
            await ended(service, job)
        assert [names[job] for job in held.order] == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]


@in_loop
async def test_a_token_has_its_share_of_the_queue_and_a_first_turn_always(
    tmp_path: Path, held: FakeBackend
) -> None:
    settings: dict[str, Any] = {"tokens": ("one", "two", "three"), "max_queue": 4}
    async with serving(tmp_path, held, **settings) as (service, _):
        sessions = await sessions_of(service, "a", "b", "c")
        running, _ = await service.submit("a", sessions["a"], TURN)
        await until(service, running, "started")
        for owner in ("a", "a", "b", "b"):
            await service.submit(owner, sessions[owner], TURN)
        error = await refused(service.submit("a", sessions["a"], TURN))
        assert error.code == "queue_full" and "2 turns of this token" in error.message
        assert int(error.headers["Retry-After"]) >= 1 and error.status == 429
        # four wait, and who has none of them is not made to wait for a place
        await service.submit("c", sessions["c"], TURN)
        error = await refused(service.submit("c", sessions["c"], TURN))
        assert error.code == "queue_full" and "5 turns are waiting" in error.message
        held.go.set()


def test_the_share_of_the_queue_is_half_where_there_are_others() -> None:
    def share(**settings: Any) -> int:
        return ServingConfig(store=Path("s"), **settings).queue_share

    assert share(max_queue=8) == share(max_queue=8, tokens=("one",)) == 8
    assert share(max_queue=8, tokens=("one", "two")) == 4
    assert share(max_queue=8, max_queue_per_token=2) == 2


@in_loop
async def test_who_sends_what_takes_long_holds_up_nobody_else(
    tmp_path: Path, source_clip: Path
) -> None:
    limits = Limits(probe_seconds=120.0)
    pipes = [tmp_path / f"endless{number}" for number in range(3)]
    for pipe in pipes:
        os.mkfifo(pipe)
    prober = Prober(at_once=2)
    await prober.start()
    try:
        slow = [asyncio.create_task(prober.probe("a", pipe, limits)) for pipe in pipes]
        await asyncio.sleep(0)
        assert (await prober.probe("b", source_clip, limits)).frames == 9
        assert not any(task.done() for task in slow)
        # each of them has its turn, and ends when its file does
        for pipe, task in zip(pipes, slow, strict=True):
            (await asyncio.to_thread(pipe.open, "wb")).close()
            with pytest.raises(ApiError):
                await task
        assert not prober._owners
    finally:
        await prober.stop()


@in_loop
async def test_a_token_has_so_many_uploads_under_way(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def slow(request: Request) -> PlainTextResponse:
        await request.body()
        await go.wait()
        return PlainTextResponse("made")

    limits = replace(Limits(), uploads=2, probe_seconds=10.0)
    app = BodyLimit(Starlette(routes=[Route("/v1/sessions", slow, methods=["POST"])]), limits)

    async def post(owner: str) -> list[Any]:
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"a form", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/sessions", "query_string": b""}
        await app(scope | {"headers": [], "state": {"owner": owner}}, receive, send)
        return sent

    under_way = [asyncio.create_task(post(owner)) for owner in ("a", "a", "b")]
    await asyncio.sleep(0.01)
    start, body = await post("a")
    headers = dict(start["headers"])
    assert start["status"] == 429 and headers[b"retry-after"] == b"5"
    assert b"too_many_uploads" in body["body"]
    go.set()
    for task in under_way:
        assert (await task)[0]["status"] == 200
    assert (await post("a"))[0]["status"] == 200
    assert not app._uploads
