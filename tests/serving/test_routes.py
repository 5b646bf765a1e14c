"""Sessions, turns and jobs over HTTP: a real service that listens, a backend without an engine."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

Upload = Callable[..., dict[str, Any]]
Events = Callable[..., list[tuple[int, str, dict[str, Any]]]]
ABSENT = "session_" + 24 * "0"


def refused(answer: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """The message of an error in OpenAI's shape; the headers are those of every answer."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param), error
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["request_id"] == answer.headers["x-request-id"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    message: str = error["message"]
    return message


def finished_turn(client: httpx.Client, session: str, events_of: Events, **asked: Any) -> Any:
    answer = client.post(f"/v1/sessions/{session}/turns", json={"camera": "pan_right"} | asked)
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
    events_of(client, answer.json()["id"])
    job = client.get(answer.headers["location"]).json()
    assert job["state"] == "finished"
    return job


def test_a_session_from_upload_to_deletion(
    client: httpx.Client, upload: Upload, events_of: Events, source_clip: Path
) -> None:
    session = upload(client, "../../etc/my clip\n.mp4")
    place = f"/v1/sessions/{session['id']}"
    assert (session["frames"], session["width"], session["height"]) == (9, 64, 48)
    # a name is for people: it is no path and no second line
    assert session["name"] == "../../etc/my clip .mp4"
    job = finished_turn(client, session["id"], events_of, seed=3)
    assert (job["number"], job["request"]) == (1, {"camera": "pan_right", "seed": 3})
    finished_turn(client, session["id"], events_of, camera="arc:-40")

    turns = client.get(f"{place}/turns").json()["data"]
    assert [(turn["number"], turn["request"]["camera"]) for turn in turns] == [
        (1, "pan_right"),
        (2, "arc:-40"),
    ]
    assert turns[1]["report"]["turn"] == 2
    assert client.get(f"{place}/turns/2").json() == turns[1]
    refused(client.get(f"{place}/turns/3"), 404, "not_found")
    seen = client.get(place).json()
    assert (seen["num_turns"], seen["footprint"]["next_turn_tokens"]) == (2, {"target": 3})
    assert seen["footprint"]["disk_bytes"] > source_clip.stat().st_size

    first = b"frames of turn 1"
    for path, content, kind in (
        ("source", source_clip.read_bytes(), "video/mp4"),
        ("turns/1/video", first, "video/mp4"),
        ("turns/2/thumbnail", b"frames of turn 2", "image/jpeg"),
    ):
        answer = client.get(f"{place}/{path}")
        assert (answer.content, answer.headers["content-type"]) == (content, kind)
    with zipfile.ZipFile(io.BytesIO(client.get(f"{place}/export").content)) as archive:
        assert archive.testzip() is None
        assert first in [archive.read(name) for name in archive.namelist()]

    branch = client.post(f"{place}/branches", json={"turn": 1})
    assert branch.status_code == 201
    assert (branch.json()["parent"], branch.json()["parent_turn"]) == (session["id"], 1)
    listed = client.get("/v1/sessions", params={"limit": 2}).json()
    assert [one["id"] for one in listed["data"]] == [branch.json()["id"], session["id"]]
    assert (
        client.get("/v1/sessions", params={"order": "asc", "limit": 100}).json()["data"][-2:]
        == (listed["data"][::-1])
    )
    behind = client.get("/v1/sessions", params={"limit": 1, "after": listed["data"][0]["id"]})
    assert [one["id"] for one in behind.json()["data"]] == [session["id"]]

    assert client.delete(place).status_code == 204
    for path in ("", "/turns", "/turns/1/video", "/source", "/export"):
        refused(client.get(place + path), 404, "not_found")
    refused(client.get(f"/v1/jobs/{job['id']}"), 404, "not_found")
    assert client.get(f"{branch.headers['location']}/turns/1/video").content == first


def test_ranges_of_a_video(client: httpx.Client, upload: Upload, source_clip: Path) -> None:
    session = upload(client)["id"]
    clip, size = source_clip.read_bytes(), source_clip.stat().st_size

    def get(header: str, **more: str) -> httpx.Response:
        path = f"/v1/sessions/{session}/source"
        return client.get(path, headers={"Range": header} | more)

    for header, part in (
        ("bytes=0-99", clip[:100]),
        ("bytes=100-", clip[100:]),
        ("bytes=-7", clip[-7:]),
        (f"bytes=5-{size + 50}", clip[5:]),
    ):
        answer = get(header)
        start = size - len(part) if header[6] == "-" else int(header[6:].split("-")[0])
        assert (answer.status_code, answer.content) == (206, part)
        assert answer.headers["content-range"] == f"bytes {start}-{start + len(part) - 1}/{size}"
    tag = get("bytes=0-1").headers["etag"]
    assert get("bytes=0-1", **{"If-Range": tag}).status_code == 206
    # what is no range of bytes, or of another version, is answered with all of it
    for header in ("bytes=9-5", "bytes=-", "bytes=0-1,4-5", "frames=0-1", "bytes=a-b", ""):
        assert get(header).content == clip
    assert get("bytes=0-1", **{"If-Range": '"other"'}).content == clip
    for header in (f"bytes={size}-", "bytes=-0"):
        answer = get(header)
        refused(answer, 416, "range_not_satisfiable")
        assert answer.headers["content-range"] == f"bytes */{size}"


def test_events_are_numbered_and_taken_up_again(
    client: httpx.Client, upload: Upload, events_of: Events
) -> None:
    session = upload(client)["id"]
    job = finished_turn(client, session, events_of)
    events = events_of(client, job["id"])
    numbers, kinds = [event[0] for event in events], [event[1] for event in events]
    assert numbers == sorted(set(numbers))
    assert kinds[0] == "queued" and kinds[-1] == "finished"
    assert kinds.count("step_done") == 3
    assert all(kind == data["type"] for _, kind, data in events)
    assert events_of(client, job["id"], **{"Last-Event-ID": str(numbers[2])}) == events[3:]
    path = f"/v1/jobs/{job['id']}/events"
    answer = client.get(path, headers={"Last-Event-ID": "abc"})
    refused(answer, 422, "invalid_request", "last-event-id")


def test_a_reader_that_leaves_stops_nothing(
    client: httpx.Client, live: Any, upload: Upload, events_of: Events
) -> None:
    session = upload(client)["id"]
    live.backend.hold()
    try:
        job = client.post(f"/v1/sessions/{session}/turns", json={"camera": "pan:5"}).json()["id"]
        with live.client() as reader, reader.stream("GET", f"/v1/jobs/{job}/events") as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("id: ")
        assert client.get(f"/v1/jobs/{job}").json()["state"] in ("queued", "running")
    finally:
        live.backend.let_go()
    assert events_of(client, job)[-1][1] == "finished"


def test_the_queue_is_bounded_and_jobs_can_be_cancelled(
    client: httpx.Client, live: Any, upload: Upload, events_of: Events
) -> None:
    session = upload(client)["id"]
    live.backend.hold()
    try:
        path = f"/v1/sessions/{session}/turns"
        jobs = [client.post(path, json={"camera": f"pan:{n}"}).json()["id"] for n in (1, 2, 3)]
        with client.stream("GET", f"/v1/jobs/{jobs[0]}/events") as answer:
            # until it holds the worker, two may wait besides
            next(line for line in answer.iter_lines() if line == "event: started")
        while (answer := client.post(path, json={"camera": "pan:9"})).status_code == 202:
            jobs.append(answer.json()["id"])
        assert len(jobs) == 3 or client.get(f"/v1/jobs/{jobs[0]}").json()["state"] == "running"
        refused(answer, 429, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1

        waiting = client.get(f"/v1/jobs/{jobs[-1]}").json()
        assert (waiting["state"], waiting["position"]) == ("queued", 2)
        gone = client.delete(f"/v1/jobs/{jobs[-1]}")
        assert (gone.status_code, gone.json()["state"]) == (200, "cancelled")
        assert client.post(f"/v1/jobs/{jobs[0]}/cancel").json()["is_cancelling"]
    finally:
        live.backend.let_go()
    assert events_of(client, jobs[0])[-1][1] == "cancelled"
    assert client.get(f"/v1/jobs/{jobs[0]}").json()["error"]["code"] == "cancelled"
    assert events_of(client, jobs[1])[-1][1] == "finished"
    # one that has ended stays as it is
    assert client.post(f"/v1/jobs/{jobs[1]}/cancel").json()["state"] == "finished"
    listed = client.get("/v1/jobs", params={"session": session}).json()["data"]
    assert [job["state"] for job in listed] == ["cancelled", "finished", "cancelled"]


def test_a_key_makes_a_thing_once(client: httpx.Client, upload: Upload, source_clip: Path) -> None:
    key = {"Idempotency-Key": "once-only"}
    session = upload(client, **key)
    assert upload(client, **key)["id"] == session["id"]
    files = {"video": ("clip.mp4", source_clip.read_bytes() + b"\0", "video/mp4")}
    answer = client.post("/v1/sessions", files=files, data={"name": "clip.mp4"}, headers=key)
    refused(answer, 409, "idempotency_conflict")

    path = f"/v1/sessions/{session['id']}/turns"
    first = client.post(path, json={"camera": "pan:5"}, headers=key)
    again = client.post(path, json={"camera": "pan:5"}, headers=key)
    assert (first.status_code, again.status_code) == (202, 200)
    assert again.json()["id"] == first.json()["id"]
    other = client.post(path, json={"camera": "pan:6"}, headers=key)
    refused(other, 409, "idempotency_conflict")


def test_requests_that_are_none(client: httpx.Client, upload: Upload) -> None:
    path = f"/v1/sessions/{upload(client)['id']}/turns"

    def post(body: bytes, **headers: str) -> httpx.Response:
        sent = {"Content-Type": "application/json"} | headers
        return client.post(path, content=body, headers=sent)

    refused(post(b'{"camera": "\\ud800"}'), 422, "invalid_request", "camera")
    refused(
        post(b'{"camera": "pan_right", "guidance_scale": NaN}'),
        422,
        "invalid_request",
        "guidance_scale",
    )
    # what a page of another site could send without asking is not read as JSON
    refused(
        post(b'{"camera": "pan_right"}', **{"Content-Type": "text/plain"}), 415, "unsupported_media"
    )
    refused(post(b" " * (3 << 20)), 413, "too_large")
    refused(client.get("/v1/nothing"), 404, "not_found")
    refused(client.get("/v1/sessions/../../etc/passwd"), 404, "not_found")
    refused(client.get(f"/v1/sessions/{ABSENT}"), 404, "not_found")
    refused(client.get("/v1/sessions/%2e%2e%2fservice.sqlite3/source"), 404, "not_found")
    wrong = client.put("/v1/sessions")
    refused(wrong, 405, "method_not_allowed")
    assert wrong.headers["allow"] == "GET, HEAD, POST"
    refused(client.get("/v1/sessions?limit=0"), 422, "invalid_request", "limit")
    refused(client.get(f"/v1/sessions/{ABSENT}/turns/{10**30}"), 422, "invalid_request", "number")


def test_uploads_that_are_refused(client: httpx.Client, live: Any, source_clip: Path) -> None:
    clip = source_clip.read_bytes()

    def post(name: str = "video", data: bytes = clip, **fields: str) -> httpx.Response:
        files = {name: ("clip.mp4", data, "video/mp4")}
        return client.post("/v1/sessions", files=files, data=fields)

    refused(post("movie"), 422, "invalid_request", "movie")
    refused(post(camera="pan_right"), 422, "invalid_request", "camera")
    refused(post(name_="x" * 10), 422, "invalid_request", "name_")
    refused(client.post("/v1/sessions", data={"name": "a"}), 415, "unsupported_media")
    refused(
        client.post("/v1/sessions", files={"name": (None, "a")}), 422, "invalid_request", "video"
    )
    refused(post(data=b"no video"), 422, "unreadable_video", "video")
    refused(post(data=clip[: len(clip) // 2]), 422, "unreadable_video", "video")
    refused(post(data=clip + bytes(1 << 20)), 413, "too_large", "video")
    refused(post(data=bytes(5 << 20)), 413, "too_large")
    # nothing of them is left
    assert list((live.config.store / "uploads").iterdir()) == []


def test_what_the_service_says_of_itself(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok", "reason": None}
    assert client.get("/readyz").status_code == 200
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["kind"], model["sampling"]["size"]) == ("fake", "views", [48, 64])
    text = client.get("/metrics").text
    # counted by route, never by address
    assert 'mv2v_http_requests_total{route="/v1/models",status="200"}' in text
    assert re.search("(session|job)_[0-9a-f]{24}", text) is None
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    # one script stands in the page, and is known by what it says
    policy = page.headers["content-security-policy"]
    assert re.search("script-src 'self' 'sha256-[A-Za-z0-9+/]{43}='$", policy)
    assert "'unsafe" not in policy
    refused(client.get("/page/../app.py"), 404, "not_found")
    refused(client.get("/page/%2e%2e/app.py"), 404, "not_found")
