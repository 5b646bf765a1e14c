"""OpenRouter's shape of videos, videos by URL, and ids of requests, at a service that listens."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

from mv2v_engine.serving.config import Limits


class Source:
    """A site with a video at /clip.mp4, a longer one at /long, and a way to it at /moved."""

    def __init__(self, clip: bytes) -> None:
        self.asked: list[str] = []
        source = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                source.asked.append(self.path)
                found = {"/clip.mp4": clip, "/long": clip + bytes(1 << 20), "/none": b"none"}
                status = 302 if self.path == "/moved" else 200 if self.path in found else 404
                self.send_response(status)
                self.send_header("Location", "/clip.mp4")
                self.end_headers()
                with suppress(OSError):  # whoever asked has seen enough
                    self.wfile.write(found.get(self.path, b""))

            def log_message(self, *said: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.place = f"127.0.0.1:{self.server.server_port}"


@pytest.fixture(scope="module")
def source(source_clip: Path) -> Iterator[Source]:
    source = Source(source_clip.read_bytes())
    thread = threading.Thread(target=source.server.serve_forever)
    thread.start()
    yield source
    source.server.shutdown()
    thread.join()
    source.server.server_close()


@pytest.fixture(scope="module")
def service(
    serving: Callable[..., Any], source: Source, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    limits = Limits(upload_bytes=1 << 20)
    store = tmp_path_factory.mktemp("store")
    with serving(store, limits=limits, source_hosts=(source.place,), tokens=("a", "b")) as service:
        yield service


@pytest.fixture
def http(service: Any) -> Iterator[httpx.Client]:
    with service.client("a") as client:
        yield client


def asked(source: Source, path: str = "/clip.mp4", **more: Any) -> dict[str, Any]:
    reference = {"type": "video_url", "video_url": {"url": f"http://{source.place}{path}"}}
    return {"model": "fake", "prompt": "pan_right", "input_references": [reference], **more}


def wait(http: httpx.Client, job: str) -> None:
    http.get(f"/v1/jobs/{job}/events").raise_for_status()


def test_submitted_polled_and_downloaded(service: Any, source: Source, http: httpx.Client) -> None:
    answer = http.post("/api/v1/videos", json=asked(source, seed=3))
    assert answer.status_code == 202, answer.text
    begun = answer.json()
    assert begun["status"] in ("pending", "in_progress")
    assert begun["polling_url"] == f"/api/v1/videos/{begun['id']}"
    assert "unsigned_urls" not in begun and "error" not in begun
    wait(http, begun["id"])
    done = http.get(begun["polling_url"]).json()
    assert done["status"] == "completed"
    (content,) = done["unsigned_urls"]
    assert content.startswith(service.address)
    assert http.get(content).content == b"frames of turn 1"
    # it is the same job as everywhere else
    video = http.get(f"/v1/videos/{begun['id']}").json()
    assert video["status"] == "completed"
    assert http.get(f"/v1/jobs/{begun['id']}").json()["request"] == {
        "camera": "pan_right",
        "seed": 3,
    }
    more = {"model": "fake", "prompt": "static", "session_id": video["session_id"]}
    again = http.post("/api/v1/videos", json=more).json()
    wait(http, again["id"])
    assert http.get(f"/v1/jobs/{again['id']}").json()["number"] == 2


def test_the_models(http: httpx.Client) -> None:
    (model,) = http.get("/api/v1/videos/models").json()["data"]
    assert model["id"] == "fake" and model["supported_sizes"] == ["64x48"]


def test_a_cancelled_one(service: Any, source: Source, http: httpx.Client) -> None:
    service.backend.hold()
    try:
        job = http.post("/api/v1/videos", json=asked(source)).json()["id"]
        http.post(f"/v1/jobs/{job}/cancel")
    finally:
        service.backend.let_go()
    wait(http, job)
    ended = http.get(f"/api/v1/videos/{job}").json()
    assert ended["status"] == "cancelled" and ended["error"]


def test_it_needs_the_token(service: Any, source: Source, http: httpx.Client) -> None:
    with service.client() as nobody:
        for method, path in (("POST", ""), ("GET", "/models"), ("GET", "/job_x")):
            answer = nobody.request(method, f"/api/v1/videos{path}", json=asked(source))
            assert answer.json()["error"]["code"] == "authentication_required"
    job = http.post("/api/v1/videos", json=asked(source)).json()["id"]
    with service.client("b") as other:
        assert other.get(f"/api/v1/videos/{job}").json()["error"]["code"] == "not_found"
    wait(http, job)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"model": "other"}, "not_made_here"),
        ({"duration": 60.0}, "not_made_here"),
        ({"resolution": "720p"}, "invalid_request"),
        ({"input_references": []}, "invalid_request"),
        ({"callback_url": "https://example.org/"}, "host_not_allowed"),
    ],
)
def test_what_is_refused(
    source: Source, http: httpx.Client, change: dict[str, Any], code: str
) -> None:
    sessions = len(http.get("/v1/sessions").json()["data"])
    answer = http.post("/api/v1/videos", json=asked(source) | change)
    assert answer.json()["error"]["code"] == code, answer.text
    assert len(http.get("/v1/sessions").json()["data"]) == sessions


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/long", "too_large"),
        ("/moved", "not_fetched"),
        ("/nothing", "not_fetched"),
        ("/none", "unreadable_video"),
    ],
)
def test_urls_that_give_no_video(
    service: Any, source: Source, http: httpx.Client, path: str, code: str
) -> None:
    before = len(source.asked)
    address = f"http://{source.place}{path}"
    answer = http.post("/v1/videos", json={"prompt": "static", "video_url": address})
    assert answer.json()["error"]["code"] == code, answer.text
    assert len(source.asked) == before + 1, "no redirect is followed"
    assert not list((service.config.store / "uploads").iterdir())


@pytest.mark.parametrize("host", ["127.0.0.1:1", "localhost", "169.254.169.254", "example.org"])
def test_hosts_that_are_not_listed(http: httpx.Client, host: str) -> None:
    body = {"prompt": "static", "video_url": f"http://{host}/clip.mp4"}
    error = http.post("/v1/videos", json=body).json()["error"]
    assert (error["code"], error["param"]) == ("host_not_allowed", "video_url")


def test_ids_of_requests(service: Any, http: httpx.Client) -> None:
    def told(given: str | None, path: str = "/healthz") -> str:
        headers = {} if given is None else {"X-Request-ID": given}
        return str(http.get(path, headers=headers).headers["x-request-id"])

    assert told("abc-1.2_3") == "abc-1.2_3"
    assert told("abc", "/v1/jobs/nothing") == "abc"
    for given in (None, "", "a b", "a" * 129, '"; DROP'):
        assert told(given).startswith("req_")
    assert told(None) != told(None)
    with service.client() as nobody:
        answer = nobody.get("/v1/jobs", headers={"X-Request-ID": "refused-1"})
        assert answer.status_code == 401 and answer.headers["x-request-id"] == "refused-1"
        assert answer.json()["error"]["request_id"] == "refused-1"


def test_a_fault_tells_its_id(
    service: Any, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(service.app.state.service, "jobs", broken)
    answer = http.get("/v1/jobs", headers={"X-Request-ID": "fault-1"})
    assert answer.status_code == 500 and answer.headers["x-request-id"] == "fault-1"
    error = json.loads(answer.text)["error"]
    assert (error["code"], error["request_id"]) == ("internal", "fault-1")
