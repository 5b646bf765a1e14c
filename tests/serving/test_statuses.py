"""The state of a job, asked for again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mv2v_engine.serving.store.database import Database
from mv2v_engine.serving.store.jobs import find_job
from tests.serving.conftest import HeldBackend, Live, until

Upload = Callable[..., dict[str, Any]]


@pytest.fixture
def service(serving: Callable[..., Any], tmp_path: Path) -> Iterator[Live]:
    with serving(tmp_path / "store", HeldBackend(), tokens=("one", "two")) as service:
        service.backend.hold()
        yield service


@pytest.fixture
def http(service: Live) -> Iterator[httpx.Client]:
    with service.client("one") as client:
        yield client


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The jobs that are asked of the database; who compares files in the background reads, too."""
    done: list[str] = []
    read = Database.read

    async def counted(self: Database, work: Any, *args: Any, **how: Any) -> Any:
        if work is find_job:
            done.append(args[-1])
        return await read(self, work, *args, **how)

    monkeypatch.setattr(Database, "read", counted)
    return done


def test_what_has_not_changed_is_not_asked_of_the_database(
    service: Live, http: httpx.Client, upload: Upload, reads: list[str]
) -> None:
    session = upload(http)["id"]
    job = http.post(f"/v1/sessions/{session}/turns", json={"camera": "pan_right"}).json()["id"]
    path = f"/v1/jobs/{job}"
    until(lambda: http.get(path).json()["state"] == "running")
    until(lambda: http.get(path).json()["progress"])
    first = http.get(path)
    assert set(reads) == {job}
    reads.clear()
    again = [http.get(path) for _ in range(20)]
    assert reads == []
    assert {one.text for one in again} == {first.text}
    tag = first.headers["etag"]
    assert first.headers["cache-control"] == "private, no-cache"
    assert {one.headers["etag"] for one in again} == {tag}

    # the tag that a client has stands for the body, however a proxy has written it
    for given in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        same = http.get(path, headers={"If-None-Match": given})
        assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", tag)
    assert http.get(path, headers={"If-None-Match": '"other"'}).text == first.text
    head = http.head(path)
    assert (head.status_code, head.headers["etag"], head.content) == (200, tag, b"")
    assert reads == []

    # each is counted and has an id as every other answer
    assert {"x-request-id", "x-content-type-options"} <= set(same.headers)
    assert 'route="/v1/jobs/{job_id}",status="304"' in http.get("/metrics").text

    # it is nobody else's, and a parameter that there is none of is refused as before
    with service.client("two") as other:
        assert other.get(path).status_code == 404
        assert other.get(path, headers={"If-None-Match": tag}).status_code == 404
    assert http.get(path, params={"verbose": 1}).json()["error"]["code"] == "invalid_request"


def test_what_changes_is_told_at_once(
    service: Live, http: httpx.Client, upload: Upload, events_of: Callable[..., Any]
) -> None:
    session = upload(http)["id"]
    path = f"/v1/sessions/{session}/turns"
    first, second = (http.post(path, json={"camera": "static"}).json()["id"] for _ in range(2))
    waiting = http.get(f"/v1/jobs/{second}")
    assert (waiting.json()["state"], waiting.json()["position"]) == ("queued", 1)
    assert http.post(f"/v1/jobs/{second}/cancel").json()["state"] == "cancelled"
    after = http.get(f"/v1/jobs/{second}", headers={"If-None-Match": waiting.headers["etag"]})
    assert after.status_code == 200 and after.json()["state"] == "cancelled"

    until(lambda: http.get(f"/v1/jobs/{first}").json()["state"] == "running")
    running = http.get(f"/v1/jobs/{first}")
    service.backend.let_go()
    events_of(http, first)
    ended = http.get(f"/v1/jobs/{first}", headers={"If-None-Match": running.headers["etag"]})
    assert ended.status_code == 200 and ended.json()["progress"]["type"] == "finished"
    assert http.delete(f"/v1/sessions/{session}").status_code < 300
    for job in (first, second):
        assert http.get(f"/v1/jobs/{job}").status_code == 404
