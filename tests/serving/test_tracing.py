"""Traces: the spans are the stages', below the job's, and nothing is imported unasked."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from mv2v_engine import CancelToken, Engine
from mv2v_engine.engine.request import Request
from mv2v_engine.errors import CancelledError, RequestError
from mv2v_engine.progress import Event, StageStarted
from mv2v_engine.serving.store.folders import source_path
from mv2v_engine.serving.watch import tracing
from mv2v_engine.serving.work import worker
from mv2v_engine.serving.work.host import Host
from mv2v_engine.serving.work.protocol import decode

pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def open_job(exporter: InMemorySpanExporter) -> tracing.OpenJob:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return tracing.job_spans(provider)


def only_parent(spans: tuple[ReadableSpan, ...]) -> ReadableSpan:
    """The one span that has no parent; asserts that it is everybody else's."""
    (job,) = [span for span in spans if span.parent is None]
    assert job.context is not None
    for span in spans:
        if span is not job:
            assert span.parent is not None and span.parent.span_id == job.context.span_id
    return job


def test_a_turns_stages_are_spans_below_its_job(
    engine: Engine,
    source_frames: Tensor,
    open_job: tracing.OpenJob,
    exporter: InMemorySpanExporter,
) -> None:
    session = engine.session(source_frames)
    events: list[Event] = []
    with open_job("session_1", "job_1"):
        session.render("pan_right", on_progress=events.append)
    spans = exporter.get_finished_spans()
    job = only_parent(spans)
    assert job.name == "job"
    assert dict(job.attributes or {}) == {"mv2v.session": "session_1", "mv2v.job": "job_1"}
    begun = [event.stage for event in events if isinstance(event, StageStarted)]
    assert [span.name for span in spans] == [*begun, "job"]
    assert begun == ["vae", "text", "memory", "sampling", "vae"]
    assert all(span.status.status_code == StatusCode.UNSET for span in spans)
    assert job.start_time and spans[0].start_time and job.start_time <= spans[0].start_time
    exporter.clear()
    session.render("pan_left")
    assert exporter.get_finished_spans() == ()


def test_what_fails_is_an_error_without_its_words(
    engine: Engine,
    source_frames: Tensor,
    open_job: tracing.OpenJob,
    exporter: InMemorySpanExporter,
) -> None:
    session, cancel = engine.session(source_frames), CancelToken()

    def cancel_in_sampling(event: Event) -> None:
        if event == StageStarted("sampling"):
            cancel.cancel()

    with pytest.raises(CancelledError), open_job("session_1", "job_1"):
        session.render("pan_right", on_progress=cancel_in_sampling, cancel=cancel)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    for name in ("sampling", "job"):
        assert spans[name].status.status_code == StatusCode.ERROR
        assert spans[name].status.description == "CancelledError"
        assert not spans[name].events
    assert spans["memory"].status.status_code == StatusCode.UNSET


def test_turns_that_run_together_keep_their_spans_apart(
    engine: Engine,
    source_frames: Tensor,
    open_job: tracing.OpenJob,
    exporter: InMemorySpanExporter,
) -> None:
    from opentelemetry import trace

    request = Request.view("pan_right", engine.sampling, memory="none")
    turns = [(engine.session(source_frames), request) for _ in range(2)]
    with open_job("session_1", "job_1"):
        engine.answer_all(turns, token_budget=10_000)
        assert not trace.get_current_span().get_span_context().is_valid
    spans = exporter.get_finished_spans()
    only_parent(spans)
    sampling = [span for span in spans if span.name == "sampling"]
    assert len(sampling) == 2
    # they overlap: each began before the other's end
    assert max(span.start_time or 0 for span in sampling) < min(
        span.end_time or 0 for span in sampling
    )


def test_the_worker_traces_its_jobs(
    engine: Engine,
    source_clip: Path,
    tmp_path: Path,
    open_job: tracing.OpenJob,
    exporter: InMemorySpanExporter,
) -> None:
    shutil.copy(source_clip, source_path(tmp_path))
    order = {
        "type": "run",
        "job": {"id": "job_1", "number": 1, "request": {"camera": "pan_right"}},
        "session": {"id": "session_1", "frames": 9, "window": None},
        "folder": str(tmp_path),
    }
    pipe = io.BytesIO()
    host, orders = Host(engine, max_open=1), worker.Orders(io.BytesIO())
    for _ in worker._turn(order, host, orders, pipe, open_job):
        host.tick()
    *_, last = map(decode, pipe.getvalue().splitlines())
    assert last["event"]["type"] == "done"
    spans = exporter.get_finished_spans()
    job = only_parent(spans)
    assert dict(job.attributes or {}) == {"mv2v.session": "session_1", "mv2v.job": "job_1"}
    assert {span.name for span in spans} == {"job", *last["event"]["report"]["seconds"]}


@pytest.mark.parametrize("value", [None, "", "none"])
def test_nothing_is_traced_unless_asked(monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    monkeypatch.delenv("OTEL_TRACES_EXPORTER", raising=False)
    if value is not None:
        monkeypatch.setenv("OTEL_TRACES_EXPORTER", value)
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry", None)
    with tracing.open_traces()("session_1", "job_1"):
        pass
    tracing.flush_traces()


def test_traces_that_cannot_be_had_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setattr(tracing, "entry_points", lambda group: ())
    with pytest.raises(RequestError, match="nothing is installed that exports spans"):
        tracing.open_traces()
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry", None)
    with pytest.raises(RequestError, match="opentelemetry-api is not installed"):
        tracing.open_traces()


def test_the_installed_configurator_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from opentelemetry import trace

    provider = TracerProvider(shutdown_on_exit=False)
    exporter = InMemorySpanExporter()
    # an hour's spans are sent together
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=3_600_000))

    class Configurator:
        def configure(self) -> None:
            monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)

    class EntryPoint:
        def load(self) -> type[Configurator]:
            return Configurator

    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setattr(tracing, "entry_points", lambda group: [EntryPoint()])
    with tracing.open_traces()("session_1", "job_1"):
        pass
    assert not exporter.get_finished_spans()
    tracing.flush_traces()
    (span,) = exporter.get_finished_spans()
    assert span.name == "job"
    provider.shutdown()
