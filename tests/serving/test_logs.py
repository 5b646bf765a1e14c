"""Logs: one JSON object a line, with ids, and without what users wrote."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from mv2v_engine.serving.store.records import JobRecord
from mv2v_engine.serving.watch.logs import LogListener, configure_logs, log_event, log_ids

SESSION, JOB = "session_" + "ab" * 12, "job_" + "0" * 24
OWN = ("mv2v_engine.serving", "uvicorn", "uvicorn.error", "uvicorn.access")


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Configured logs, and what they wrote since the last call."""
    root, stderr = logging.getLogger(), io.StringIO()
    before = root.handlers[:], root.level
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stderr)
        configure_logs()

    def read() -> list[dict[str, Any]]:
        written = stderr.getvalue()
        stderr.seek(0)
        stderr.truncate()
        return [json.loads(line) for line in written.splitlines()]

    yield read
    logging.captureWarnings(False)
    root.handlers[:], level = before
    root.setLevel(level)
    for name in OWN:
        logging.getLogger(name).setLevel(logging.NOTSET)


def job(**fields: Any) -> JobRecord:
    common = {"session": SESSION, "owner": "digest", "number": 2, "created": 10.0}
    request = {"prompt": "my secret wish"}
    return JobRecord(id=JOB, request=request, **{"state": "running", **common, **fields})


def test_a_line_has_time_level_event_ids_and_fields(lines: Any) -> None:
    with log_ids(session=SESSION), log_ids(job=JOB):
        log_event("turn_stored", bytes=12, seconds=0.5)
    log_event("worker_ready", level=logging.WARNING)
    first, second = lines()
    assert first.pop("time").endswith("Z") and second.pop("time")[10] == "T"
    assert first == {
        "level": "info",
        "event": "turn_stored",
        "session": SESSION,
        "job": JOB,
        "bytes": 12,
        "seconds": 0.5,
    }
    assert second == {"level": "warning", "event": "worker_ready"}


def test_tasks_do_not_see_each_others_ids(lines: Any) -> None:
    async def handle(session: str, turn: asyncio.Event, other: asyncio.Event) -> None:
        with log_ids(session=session):
            turn.set()
            await other.wait()
            log_event("handled", number=int(session[-1]))

    async def both() -> None:
        one, two = asyncio.Event(), asyncio.Event()
        await asyncio.gather(handle("session_1", one, two), handle("session_2", two, one))

    asyncio.run(both())
    assert {(line["session"], line["number"]) for line in lines()} == {
        ("session_1", 1),
        ("session_2", 2),
    }


def test_an_error_is_told_by_its_type_and_place_alone(lines: Any) -> None:
    def fail() -> None:
        raise ValueError("cannot read the prompt 'my secret wish'")

    try:
        try:
            fail()
        except ValueError as error:
            raise RuntimeError("my secret wish") from error
    except RuntimeError as error:
        log_event("turn_failed", level=logging.ERROR, error=error)
    (line,) = lines()
    assert [one["type"] for one in line["error"]] == ["RuntimeError", "ValueError"]
    assert line["error"][1]["at"][-1].endswith(" fail")
    assert "test_logs.py:" in line["error"][0]["at"][0]
    assert "secret" not in json.dumps(line)


def test_the_listener_tells_what_happened_and_not_what_was_asked(lines: Any) -> None:
    listener = LogListener()
    listener.job_started(job())
    error = {"code": "unprocessable_turn", "message": "my secret wish is too long"}
    listener.job_ended(job(state="failed", started=11.0, ended=12.25, error=error), None)
    listener.job_ended(job(state="cancelled"), None)
    started, failed, cancelled = lines()
    assert started["event"] == "job_started" and started["turn"] == 2
    assert failed["level"] == "error" and failed["code"] == "unprocessable_turn"
    assert failed["outcome"] == "failed" and failed["seconds"] == 1.25
    assert cancelled["level"] == "info" and cancelled["seconds"] is None
    assert {(line["session"], line["job"]) for line in (started, failed, cancelled)} == {
        (SESSION, JOB)
    }
    assert "secret" not in json.dumps([started, failed, cancelled])


def test_uvicorns_requests_lose_their_query_and_get_their_ids(lines: Any) -> None:
    access = logging.getLogger("uvicorn.access")
    words = '%s - "%s %s HTTP/%s" %d'
    access.info(words, "127.0.0.1:5", "GET", f"/v1/jobs/{JOB}?token=abc", "1.1", 200)
    access.info(words, "127.0.0.1:5", "POST", f"/v1/sessions/{SESSION}/turns", "1.1", 429)
    access.info(words, "127.0.0.1:5", "GET", "/v1/sessions/x%0a\n{" + "y" * 999, "1.1", 404)
    probes = [("/healthz", 200), ("/readyz", 200), ("/readyz", 503)]
    for level in (logging.INFO, logging.DEBUG):
        logging.getLogger().setLevel(level)
        access.setLevel(level)
        for path, status in probes:
            access.info(words, "127.0.0.1:5", "GET", path, "1.1", status)
    read, refused, strange, *probed = lines()
    assert [(line["level"], line["path"]) for line in probed] == [
        ("debug", path) for path, _ in probes
    ]
    assert (read["path"], read["job"], read["status"]) == (f"/v1/jobs/{JOB}", JOB, 200)
    assert "session" not in read and "abc" not in json.dumps(read)
    assert (refused["event"], refused["session"], refused["method"]) == ("request", SESSION, "POST")
    assert len(strange["path"]) == 200


def test_libraries_are_heard_from_warnings_on(lines: Any) -> None:
    logging.getLogger("some.library").info("chatter")
    logging.getLogger("some.library").warning("%d frames\nare missing", 3)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    logging.getLogger("uvicorn.error").info("Started server process [%d]", 7)
    logging.getLogger("mv2v_engine.serving.worker").info("job %s of %s goes on", JOB, SESSION)
    library, python, uvicorn, own = lines()
    assert (own["session"], own["job"], own["event"]) == (SESSION, JOB, "message")
    assert (library["logger"], library["message"]) == ("some.library", "3 frames\nare missing")
    assert python["logger"] == "py.warnings" and "old" in python["message"]
    assert uvicorn["message"] == "Started server process [7]" and uvicorn["level"] == "info"


def test_logs_need_nothing_of_the_extra() -> None:
    # the worker logs too, and imports no web framework for it
    code = (
        "import sys; from mv2v_engine.serving.watch import logs, tracing\n"
        "heavy = {'fastapi', 'uvicorn', 'pydantic', 'prometheus_client', 'opentelemetry'}\n"
        "found = heavy & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
