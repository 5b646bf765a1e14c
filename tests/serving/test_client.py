"""`mv2v_engine.client` against a service that listens."""

from __future__ import annotations

import asyncio
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

from mv2v_engine import client as api
from mv2v_engine.client import AsyncClient, Client, ServiceError, UnreachableError
from mv2v_engine.client.connection import Connection
from mv2v_engine.serving.http import schemas, stream_schemas


@pytest.fixture(scope="module")
def service(serving: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    with serving(tmp_path_factory.mktemp("store")) as service:
        yield service


def test_a_turn_from_a_file_to_a_file(service: Any, source_clip: Path, tmp_path: Path) -> None:
    with Client(service.address) as client:
        assert client.model().id == "fake"
        session = client.create_session(source_clip, name="mine", window="last")
        assert session.name == "mine" and session.num_turns == 0
        kinds: list[str] = []
        job = client.submit(session, camera="pan_right", seed=3)
        turn = client.wait(job, lambda event: kinds.append(event.kind))
        assert kinds[0] == "queued" and kinds[-1] == "finished" and "step_done" in kinds
        assert turn.request == {"camera": "pan_right", "seed": 3}
        assert client.download(turn, tmp_path / "turn.mp4").read_bytes() == b"frames of turn 1"
        assert client.content(turn, which="thumbnail") == b"frames of turn 1"
        assert [path.name for path in tmp_path.iterdir()] == ["turn.mp4"]
        assert client.export(session, tmp_path / "all.zip").read_bytes()[:2] == b"PK"
        now = client.session(session.id)
        assert now.num_turns == 1 and now.footprint is not None
        assert client.turns(session) == [turn]
        branch = client.branch(session, 1)
        assert branch.parent == session.id
        assert {found.id for found in client.sessions()} >= {session.id, branch.id}
        assert [found.id for found in client.jobs(session)] == [job.id]
        client.delete_session(branch)
        with pytest.raises(ServiceError) as gone:
            client.session(branch)
        assert (gone.value.code, gone.value.status) == ("not_found", 404)


def test_the_same_in_an_event_loop(service: Any, source_clip: Path, tmp_path: Path) -> None:
    async def all_of_it() -> list[str]:
        async with AsyncClient(service.address) as client:
            with open(source_clip, "rb") as file:
                session = await client.create_session(file)
            job = await client.submit(session, camera="pan_right")
            kinds = [event.kind async for event in client.events(job)]
            turn = await client.wait(job)
            await client.download(turn, tmp_path / "turn.mp4")
            assert session.id in [found.id async for found in client.sessions()]
            return kinds

    kinds = asyncio.run(all_of_it())
    assert kinds[0] == "queued" and kinds[-1] == "finished"
    assert (tmp_path / "turn.mp4").read_bytes() == b"frames of turn 1"


def test_a_job_that_is_cancelled(service: Any, source_clip: Path) -> None:
    service.backend.hold()
    try:
        with Client(service.address) as client:
            session = client.create_session(source_clip.read_bytes())
            job = client.submit(session, camera="pan_right")
            events = client.events(job)
            assert next(events).kind == "queued"
            events.close()  # type: ignore[attr-defined]
            client.cancel(job)
            service.backend.let_go()
            with pytest.raises(ServiceError, match="cancelled") as ended:
                client.wait(job)
            assert ended.value.code == "cancelled"
            # the numbers go on behind the one that was seen
            assert next(event.number for event in client.events(job, after=1)) > 1
    finally:
        service.backend.let_go()


def test_refusals_are_the_services(service: Any, source_clip: Path) -> None:
    with Client(service.address) as client:
        session = client.create_session(source_clip)
        with pytest.raises(ServiceError) as refused:
            client.submit(session, camera="pan_right", guidance_scale=-1.0)
        assert refused.value.code == "invalid_request"
        assert refused.value.param == "guidance_scale"
        with pytest.raises(ServiceError) as refused:
            client.create_session(io.BytesIO(b"no video"))
        assert refused.value.code == "unreadable_video"
        with pytest.raises(ServiceError) as refused:
            client.begin_stream("a kite")
        assert refused.value.code == "unprocessable_turn"


def test_no_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "pauses", (0.0,))
    with Client("http://127.0.0.1:9") as client, pytest.raises(UnreachableError, match="started"):
        client.model()


def test_what_is_cut_off_is_sent_again_with_its_key(
    service: Any, source_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first answer of a turn is lost on the way: the job is asked for once."""
    monkeypatch.setattr(Connection, "pauses", (0.0, 0.0))
    with Client(service.address) as client:
        session = client.create_session(source_clip)
        send, lost = client._api._connection._wire._http.send, list[str]()

        def losing(request: httpx.Request, **how: Any) -> httpx.Response:
            answer = send(request, **how)
            if not lost:
                lost.append(request.headers["Idempotency-Key"])
                answer.close()
                raise httpx.ReadError("cut off")
            return answer

        monkeypatch.setattr(client._api._connection._wire._http, "send", losing)
        client.wait(client.submit(session, camera="pan_right"))
        assert lost and len(list(client.jobs(session))) == 1


@pytest.mark.parametrize(
    ("kind", "schema"),
    [
        (api.Session, schemas.SessionWithFootprint),
        (api.Turn, schemas.Turn),
        (api.Job, schemas.Job),
        (api.Model, schemas.Model),
        (api.Stream, stream_schemas.StreamStatus),
    ],
)
def test_its_types_are_the_services(kind: Any, schema: Any) -> None:
    assert {field.name for field in dataclasses.fields(kind)} <= set(schema.model_fields)


def test_both_clients_tell_what_their_methods_do() -> None:
    for kind in (Client, AsyncClient):
        for name in ("create_session", "submit", "events", "wait"):
            assert getattr(kind, name).__doc__
