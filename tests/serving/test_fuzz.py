"""A few hundred requests of schemathesis, and some broken videos; stress has the long runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from broken_videos import SILENT, broken_videos, is_unharmed
from contract import Contract, allows_sent, whole_request
from schema_fuzz import fuzz_schema
from schemathesis import GenerationMode

from mv2v_engine.serving.errors import KINDS


@pytest.mark.slow
def test_answers_are_as_the_schema_says(
    live: Any, client: Any, upload: Callable[..., Any], events_of: Callable[..., Any]
) -> None:
    session = upload(client)["id"]
    asked = client.post(f"/v1/sessions/{session}/turns", json={"camera": "pan:5"}).json()
    job = asked["id"]
    events_of(client, job)
    seen: Counter[int | str] = Counter()
    contract = Contract(live.app.openapi())
    taken: list[str] = []

    def answered(case: Any, answer: Any) -> None:
        seen.update([answer.status_code])
        is_allowed = allows_sent(contract, answer.request)
        seen.update(["allowed" if is_allowed else "malformed"])
        if answer.status_code < 300 and not is_allowed:
            taken.append(f"{answer.request.method} {answer.request.url} {answer.request.body!r}")

    known = {"session_id": session, "job_id": job, "video_id": job, "number": 1}
    fuzz_schema(
        live.address,
        known,
        answered,
        modes={GenerationMode.POSITIVE: 3, GenerationMode.NEGATIVE: 5},
        timeout=600,
    )
    assert seen["allowed"] + seen["malformed"] >= 180
    # both sides of the door were seen, and nobody came in at the wrong one
    assert {200, 404, 422} <= set(seen)
    assert seen["allowed"] >= 50 and seen["malformed"] >= 20
    assert taken == []
    assert client.get(f"/v1/jobs/{job}").status_code == 200


def test_what_the_contract_allows(live: Any) -> None:
    contract = Contract(live.app.openapi())
    session, form = "session_" + "0" * 24, "multipart/form-data; boundary=x"
    turns, texts = f"/v1/sessions/{session}/turns", {"content-type": "application/json"}
    part = 'Content-Disposition: form-data; name="{}"; filename="a"\r\n\r\n'
    good, bad = (
        f"--x\r\n{part.format(name)}data\r\n--x--\r\n".encode() for name in ("video", "other")
    )
    cases: list[tuple[bool, str, str, dict[str, str], bytes]] = [
        (True, "GET", "/v1/jobs?limit=5&unknown=1", {}, b""),
        (False, "GET", "/v1/jobs?limit=many", {}, b""),
        (False, "PUT", "/v1/jobs", {}, b""),
        (False, "GET", "/v1/nothing", {}, b""),
        (True, "POST", turns, texts, b'{"camera": "pan:5", "seed": 3}'),
        (False, "POST", turns, texts, b'{"camera": "pan:5", "seed": -3}'),
        (False, "POST", turns, texts, b'{"camera": "pan:5", "seed": NaN}'),
        (False, "POST", turns, texts, b'{"camera": "pan:5", "sed": 3}'),
        (False, "POST", turns, texts, b'{"camera": "pan:5"'),
        (False, "POST", turns, {"content-type": "text/plain"}, b'{"camera": "pan:5"}'),
        (True, "POST", "/v1/sessions", {"content-type": form}, good),
        (False, "POST", "/v1/sessions", {"content-type": form}, bad),
        (False, "POST", "/v1/sessions", {"content-type": form}, good[:-6]),
    ]
    for is_allowed, *request in cases:
        assert contract.allows(*request) is is_allowed, request
    whole = b"GET /v1/jobs HTTP/1.1\r\nHost: a\r\n\r\n"
    request = whole_request(whole)
    assert request is not None and contract.allows(*request)
    assert whole_request(whole[:-2]) is None and whole_request(b"\0" + whole) is None


def test_broken_videos_are_no_fault_of_the_service(
    live: Any, client: Any, source_clip: Path, tmp_path: Path
) -> None:
    path = tmp_path / "damaged.mp4"
    for what, data in broken_videos(source_clip.read_bytes(), 24, seed=1):
        answer = client.post("/v1/sessions", files={"video": ("a", data, "video/mp4")})
        if answer.status_code == 201:
            path.write_bytes(data)
            assert what in SILENT or is_unharmed(path, source_clip), what
            client.delete(f"/v1/sessions/{answer.json()['id']}")
        else:
            assert KINDS[answer.json()["error"]["code"]].status == answer.status_code == 422
    assert list((live.config.store / "uploads").iterdir()) == []
