"""What stands before the routes: tokens, hosts and origins, bodies, limits of the disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from mv2v_engine.config import Alpha
from mv2v_engine.serving.config import Limits, ServingConfig
from mv2v_engine.serving.http.app import create_app
from mv2v_engine.serving.http.auth import owner_of
from mv2v_engine.serving.http.bodies import BodyLimit
from mv2v_engine.serving.http.headers import SECURITY
from mv2v_engine.serving.http.routes.jobs import event_lines
from mv2v_engine.serving.service import Service
from mv2v_engine.serving.store.records import JobEvent, ProbedVideo
from mv2v_engine.serving.watch.metrics import Metrics
from mv2v_engine.serving.watch.percent import Percentages
from tests.serving.in_process import in_loop

VIDEO = ProbedVideo(frames=9, width=64, height=48, fps=8.0, seconds=9 / 8)
FILES = {"video": ("clip.mp4", b"a video", "video/mp4")}


async def any_video(owner: str, path: Path, limits: Limits, alpha: Alpha) -> ProbedVideo:
    return VIDEO


@asynccontextmanager
async def connected(
    config: ServingConfig, backend: Any, base_url: str = "http://127.0.0.1:8000"
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a service in this process."""
    metrics = Metrics(queue_capacity=config.max_queue, store=config.store)
    service = Service(config, backend, any_video, (metrics,))
    await service.start()
    try:
        app = create_app(service, config, metrics, Percentages())
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=base_url) as client:
            yield client
    finally:
        await service.stop()


@pytest.fixture
def backend(serving_backend: Callable[[], Any]) -> Any:
    return serving_backend()


@pytest.fixture
def config(tmp_path: Path) -> ServingConfig:
    return ServingConfig(store=tmp_path / "store", min_free_bytes=0)


def code(answer: httpx.Response) -> tuple[int, str]:
    assert all(answer.headers[name] == value for name, value in SECURITY.items())
    return answer.status_code, answer.json()["error"]["code"]


@in_loop
async def test_each_token_has_its_own_sessions(config: ServingConfig, backend: Any) -> None:
    async with connected(replace(config, tokens=("a", "b")), backend) as client:
        for header in ({}, {"Authorization": "Bearer c"}, {"Authorization": "Basic YTpi"}):
            answer = await client.get("/v1/sessions", headers=header)
            assert code(answer) == (401, "authentication_required")
            assert answer.headers["www-authenticate"] == "Bearer"
            answer = await client.post("/v1/sessions", files=FILES, headers=header)
            assert code(answer) == (401, "authentication_required")
        for path in ("/healthz", "/readyz", "/metrics", "/openapi.json"):
            assert (await client.get(path)).status_code == 200
        one, two = ({"Authorization": f"bearer {token}"} for token in "ab")
        session = (await client.post("/v1/sessions", files=FILES, headers=one)).json()["id"]
        place = f"/v1/sessions/{session}"
        turn = await client.post(f"{place}/turns", json={"camera": "pan:5"}, headers=one)
        job = f"/v1/jobs/{turn.json()['id']}"
        assert (await client.get(job, headers=one)).status_code == 200
        source = await client.get(f"{place}/source", headers=one)
        assert source.content == b"a video"
        assert source.headers["content-type"] == "application/octet-stream"
        for method, path in (
            ("GET", place),
            ("GET", f"{place}/turns"),
            ("GET", f"{place}/source"),
            ("GET", f"{place}/export"),
            ("GET", f"{place}/turns/1/video"),
            ("DELETE", place),
            ("GET", job),
            ("DELETE", job),
            ("POST", f"{job}/cancel"),
            ("GET", f"{job}/events"),
            ("GET", f"/v1/jobs?session={session}"),
            ("GET", job.replace("jobs", "videos")),
            ("DELETE", job.replace("jobs", "videos")),
            ("GET", job.replace("jobs", "videos") + "/content"),
        ):
            answer = await client.request(method, path, headers=two)
            assert code(answer) == (404, "not_found"), path
        for path, body in (("turns", {"camera": "pan:5"}), ("branches", {"turn": 0})):
            answer = await client.post(f"{place}/{path}", json=body, headers=two)
            assert code(answer) == (404, "not_found")
        for path in ("/v1/sessions", "/v1/jobs", "/v1/videos"):
            assert (await client.get(path, headers=two)).json()["data"] == []
            assert len((await client.get(path, headers=one)).json()["data"]) == 1
    # a token is nowhere in the store
    assert owner_of("a") != owner_of("b")
    assert b"bearer a" not in (config.store / "service.sqlite3").read_bytes()


@in_loop
async def test_other_sites_cannot_use_an_open_service(config: ServingConfig, backend: Any) -> None:
    async with connected(config, backend) as client:
        for host in ("evil.example", "127.0.0.1.evil.example", "[::1", ""):
            answer = await client.get("/v1/sessions", headers={"Host": host})
            assert code(answer) == (400, "wrong_host"), host
        for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
            answer = await client.get("/v1/sessions", headers={"Host": host})
            assert answer.status_code == 200, host
        for origin in ("https://evil.example", "null", "http://127.0.0.1:9"):
            answer = await client.post("/v1/sessions", files=FILES, headers={"Origin": origin})
            assert code(answer) == (403, "wrong_origin")
            answer = await client.get("/v1/sessions", headers={"Origin": origin})
            assert "access-control-allow-origin" not in answer.headers
        own = {"Origin": "http://127.0.0.1:8000"}
        assert (await client.post("/v1/sessions", files=FILES, headers=own)).status_code == 201


@in_loop
async def test_a_service_with_tokens_may_stand_behind_any_name(
    config: ServingConfig, backend: Any
) -> None:
    changed = replace(config, tokens=("a",), cors_origins=("https://videos.example",))
    async with connected(changed, backend, "https://videos.example") as client:
        headers = {"Authorization": "Bearer a", "Origin": "https://videos.example"}
        answer = await client.get("/v1/sessions", headers=headers)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://videos.example"
        asked = {
            "Origin": "https://videos.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,idempotency-key",
        }
        answer = await client.options("/v1/sessions", headers=asked)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://videos.example"
        answer = await client.options(
            "/v1/sessions", headers=asked | {"Origin": "https://evil.example"}
        )
        assert "access-control-allow-origin" not in answer.headers


@in_loop
async def test_before_the_engine_is_ready(config: ServingConfig, backend: Any) -> None:
    backend.ready, backend.reason, backend.about = False, "the engine is being loaded", None

    async with connected(config, backend) as client:
        assert (await client.get("/healthz")).status_code == 200
        answer = await client.get("/readyz")
        assert answer.status_code == 503
        assert answer.json() == {"status": "not_ready", "reason": "the engine is being loaded"}
        for answer in (
            await client.post("/v1/sessions", files=FILES),
            await client.get("/v1/models"),
            await client.post("/v1/videos", json={"prompt": "pan:5", "session_id": "x"}),
        ):
            assert code(answer) == (503, "not_ready")
            assert int(answer.headers["retry-after"]) >= 1
        assert (await client.get("/v1/sessions")).json()["data"] == []


@in_loop
async def test_a_fault_is_an_answer_without_details(
    config: ServingConfig, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(Service, "sessions", broken)

    async with connected(config, backend) as client:
        answer = await client.get("/v1/sessions")
        assert code(answer) == (500, "internal")
        assert "secret" not in answer.text
        assert 'route="/v1/sessions",status="500"' in (await client.get("/metrics")).text


@in_loop
async def test_a_body_that_stops_coming_is_refused() -> None:
    async def echo(request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(len(await request.body())))

    limits = Limits(upload_bytes=10)
    app = BodyLimit(
        Starlette(routes=[Route("/", echo, methods=["POST"])]), limits, idle_seconds=0.05
    )
    sent: list[Any] = []

    async def never() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
    await app(scope, never, send)
    assert sent[0]["status"] == 408


@in_loop
async def test_a_quiet_stream_says_so_and_ends_with_the_service() -> None:
    more, stopping, lines = asyncio.Event(), asyncio.Event(), []

    async def events() -> AsyncIterator[JobEvent]:
        yield JobEvent(1, "started", {"type": "started"})
        await more.wait()

    metrics = Metrics(queue_capacity=1, store=Path())
    async for line in event_lines(events(), stopping, metrics.event_stream(), keep_alive=0.01):
        lines.append(line)
        if line.startswith(":"):
            assert b"mv2v_event_streams 1.0" in metrics.render()
            stopping.set()
    assert b"mv2v_event_streams 0.0" in metrics.render()
    assert lines == [
        'id: 1\nevent: started\ndata: {"type": "started"}\n\n',
        ": nothing new\n\n",
    ]
