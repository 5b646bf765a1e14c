"""A few hundred requests of schemathesis, and some broken videos; profiling has the long runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from broken_videos import broken_videos
from schema_fuzz import fuzz_schema
from schemathesis import GenerationMode

from mv2v_engine.serving.errors import KINDS


def test_answers_are_as_the_schema_says(
    live: Any, client: Any, upload: Callable[..., Any], events_of: Callable[..., Any]
) -> None:
    session = upload(client)["id"]
    asked = client.post(f"/v1/sessions/{session}/turns", json={"camera": "pan:5"}).json()
    job = asked["id"]
    events_of(client, job)
    seen: Counter[int] = Counter()
    known = {"session_id": session, "job_id": job, "video_id": job, "number": 1}
    fuzz_schema(
        live.address,
        known,
        lambda case, answer: seen.update([answer.status_code]),
        modes={GenerationMode.POSITIVE: 3, GenerationMode.NEGATIVE: 5},
        timeout=120,
    )
    assert seen.total() >= 180
    # both sides of the door were seen
    assert {200, 404, 422} <= set(seen)
    assert client.get(f"/v1/jobs/{job}").status_code == 200


def test_broken_videos_are_no_fault_of_the_service(
    live: Any, client: Any, source_clip: Path
) -> None:
    for what, data in broken_videos(source_clip.read_bytes(), 24, seed=1):
        answer = client.post("/v1/sessions", files={"video": ("a", data, "video/mp4")})
        if answer.status_code == 201:
            # what decodes to its end is a video
            assert what not in ("another file", "cut off")
            client.delete(f"/v1/sessions/{answer.json()['id']}")
        else:
            assert KINDS[answer.json()["error"]["code"]].status == answer.status_code == 422
    assert list((live.config.store / "uploads").iterdir()) == []
