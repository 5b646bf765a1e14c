"""Metrics: what a life of jobs leaves in the registry, and the format that Prometheus reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from mv2v_engine import Engine
from mv2v_engine.progress import Event, StageDone, StageStarted, StepDone

pytest.importorskip("prometheus_client", reason="the extra [serve] is not installed")
from prometheus_client.parser import text_string_to_metric_families

from mv2v_engine.serving.store.jobs import CANCELLED
from mv2v_engine.serving.store.records import JobRecord
from mv2v_engine.serving.watch.metrics import Metrics


class Clock:
    """Seconds that pass when they are told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(tmp_path: Path, clock: Clock) -> Metrics:
    return Metrics(queue_capacity=4, store=tmp_path, clock=clock)


def job(name: str = "job_1", **fields: Any) -> JobRecord:
    common = {"session": "session_1", "owner": "", "request": {}, "number": 1, "created": 10.0}
    return JobRecord(id=name, **{"state": "queued", **common, **fields})


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"mv2v_{name}", labels)


def as_json(event: Event) -> dict[str, Any]:
    match event:
        case StageStarted(stage):
            return {"type": "stage_started", "stage": stage}
        case StepDone(stage, step, total, left):
            kind = {"type": "step_done", "stage": stage, "step": step}
            return {**kind, "total": total, "seconds_left": left}
        case StageDone(stage, seconds):
            return {"type": "stage_done", "stage": stage, "seconds": seconds}
    raise AssertionError(event)


def test_what_is_counted_by_label_begins_at_0(metrics: Metrics) -> None:
    """The first turn that fails, and the first answer of 500, are an increase to Prometheus."""
    metrics.watch_routes(["/v1/jobs/{id}"])

    def counted() -> dict[tuple[str, ...], float]:
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in metrics.registry.collect()
            for sample in family.samples
            if sample.name in ("mv2v_jobs_total", "mv2v_http_requests_total")
        }

    before = counted()
    assert set(before.values()) == {0}
    for number, code in enumerate(("worker_crashed", "timeout", "internal", "unprocessable_turn")):
        error = {"code": code, "message": "words"}
        metrics.job_ended(job(f"job_{number}", state="failed", ended=2.0, error=error), None)
    metrics.job_ended(job(state="cancelled", ended=2.0, error=CANCELLED), None)
    metrics.job_ended(job(state="finished", ended=2.0), None)
    metrics.observe_request("/v1/jobs/{id}", 500, 0.1)
    assert counted().keys() == before.keys() and sum(counted().values()) == 7


def test_the_queue_as_jobs_come_run_and_go(metrics: Metrics) -> None:
    def shown() -> tuple[float | None, float | None]:
        return value(metrics, "queue_depth"), value(metrics, "jobs_running")

    assert value(metrics, "queue_capacity") == 4 and shown() == (0, 0)
    for name in ("job_1", "job_2", "job_3"):
        metrics.job_queued(job(name))
    assert shown() == (3, 0)
    metrics.job_started(job(state="running", started=12.5, attempts=1))
    metrics.job_ended(job("job_2", state="cancelled", ended=13.0, error=CANCELLED), None)
    assert shown() == (1, 1)
    # the server stops: the turn under way goes back, and is begun again
    metrics.job_queued(job(started=12.5, attempts=1))
    assert shown() == (2, 0)
    metrics.job_started(job(state="running", started=20.0, attempts=2))
    error = {"code": "worker_crashed", "message": "words"}
    metrics.job_ended(job(state="failed", started=20.0, ended=21.0, error=error), None)
    assert shown() == (1, 0)
    assert value(metrics, "jobs_total", outcome="cancelled", code="cancelled") == 1
    assert value(metrics, "jobs_total", outcome="failed", code="worker_crashed") == 1
    # the first begin alone tells how long it waited
    assert value(metrics, "job_wait_seconds_count") == 1
    assert value(metrics, "job_wait_seconds_sum") == 2.5
    assert value(metrics, "job_seconds_count") == 0


def test_a_real_turns_stages_steps_tokens_and_memory(
    engine: Engine, source_frames: Tensor, metrics: Metrics, clock: Clock
) -> None:
    session = engine.session(source_frames)

    def on_progress(event: Event) -> None:
        clock.now += 0.5
        metrics.job_event(running, as_json(event))

    for number, camera in enumerate(("pan_right", "pan_left"), 1):
        running = job(f"job_{number}", state="running", started=20.0, attempts=1)
        metrics.job_queued(running)
        metrics.job_started(running)
        turn = session.render(camera, num_inference_steps=3, on_progress=on_progress)
        ended = job(f"job_{number}", state="finished", started=20.0, ended=27.0)
        metrics.job_ended(ended, turn.report)

    assert value(metrics, "jobs_total", outcome="finished", code="") == 2
    assert value(metrics, "job_seconds_sum") == 14.0
    # half a second an event: a stage of three steps has four of them after its begin
    assert value(metrics, "stage_seconds_count", stage="sampling") == 2
    assert value(metrics, "stage_seconds_sum", stage="sampling") == 2 * 2.0
    assert value(metrics, "step_seconds_count") == 6
    assert value(metrics, "steps_total", how="alone") == 6
    assert value(metrics, "steps_total", how="packed") == 0
    assert value(metrics, "step_seconds_sum") == 6 * 0.5
    # the VAE encodes once and decodes twice, and a stage is its own time, not the turn's so far
    assert value(metrics, "stage_seconds_count", stage="vae") == 3
    assert value(metrics, "stage_seconds_sum", stage="vae") == 3 * 0.5

    reports = [turn.report for turn in session.turns]
    for kind in ("target", "source", "memory"):
        expected = sum(report["plan"]["tokens_by_kind"].get(kind, 0) for report in reports)
        assert value(metrics, "tokens_total", kind=kind) == expected > 0
    # so few frames of so small a model that nothing merges
    assert not any(report["plan"]["merges"] for report in reports)
    assert value(metrics, "merged_fraction_count") == 2
    assert value(metrics, "merged_fraction_sum") == 0
    assert value(metrics, "cache_bytes", tier="loose") == reports[-1]["cache_bytes"] > 0
    assert reports[-1]["cache_counters"]["hits"] > 0
    for event, count in reports[-1]["cache_counters"].items():
        assert value(metrics, "cache_events_total", event=event) == count


def test_a_new_workers_memory_counts_from_nothing(metrics: Metrics) -> None:
    def finish(name: str, hits: int) -> None:
        counters = dict.fromkeys(("misses", "reloads", "demotions", "evictions"), 0)
        report = {
            "plan": {"tokens_by_kind": {}, "merges": []},
            "cache_bytes_by_tier": {"device": 5},
            "cache_counters": {"hits": hits, **counters},
            "num_inference_steps": 6,
            "packed_steps": 4,
        }
        metrics.job_started(job(name, state="running", started=1.0))
        metrics.job_ended(job(name, state="finished", started=1.0, ended=2.0), report)

    finish("job_1", 4)
    finish("job_2", 6)
    assert value(metrics, "cache_events_total", event="hits") == 6
    assert [value(metrics, "steps_total", how=how) for how in ("packed", "alone")] == [8, 4]
    metrics.worker_restarted("exit code -9")
    assert value(metrics, "cache_bytes", tier="device") is None
    finish("job_3", 2)
    assert value(metrics, "cache_events_total", event="hits") == 8
    assert value(metrics, "worker_restarts_total") == 1


def test_a_turn_of_an_earlier_process_is_counted_and_not_its_report(metrics: Metrics) -> None:
    metrics.job_ended(job(state="finished", started=1.0, ended=9.0), {"plan": "not looked at"})
    assert value(metrics, "jobs_total", outcome="finished", code="") == 1
    assert value(metrics, "job_seconds_count") == 0


def test_an_edits_windows_are_sequences_of_their_own(metrics: Metrics) -> None:
    def window(merged: int, memory: int) -> dict[str, Any]:
        merges = [{"frames": merged, "of": 10}, {"frames": 1, "of": 10 - merged}]
        kinds = {"target": 100, "memory": memory}
        return {"plan": {"tokens_by_kind": kinds, "merges": merges}}

    counters = dict.fromkeys(("hits", "misses", "reloads", "demotions", "evictions"), 0)
    memory = {"cache_bytes_by_tier": {}, "cache_counters": counters}
    metrics.job_started(job(state="running", started=1.0))
    report = {"windows": [window(3, 0), window(5, 25)], **memory}
    metrics.job_ended(job(state="finished", started=1.0, ended=2.0), report)
    assert value(metrics, "tokens_total", kind="target") == 200
    assert value(metrics, "tokens_total", kind="memory") == 25
    assert value(metrics, "merged_fraction_count") == 2
    assert value(metrics, "merged_fraction_sum") == pytest.approx(0.4 + 0.6)


def test_what_prometheus_reads(metrics: Metrics) -> None:
    is_ready = False
    metrics.watch_ready(lambda: is_ready)
    metrics.observe_request("/v1/jobs/{id}", 200, 0.003)
    metrics.observe_request("/v1/jobs/{id}", 404, 0.2)
    with metrics.event_stream():
        text = metrics.render().decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert all(name.startswith("mv2v_") for name in families)
    assert all(family.documentation for family in families.values())
    (streams,) = families["mv2v_event_streams"].samples
    (ready,) = families["mv2v_ready"].samples
    assert (streams.value, ready.value) == (1, 0)
    is_ready = True
    assert value(metrics, "ready") == 1 and value(metrics, "event_streams") == 0
    assert value(metrics, "http_requests_total", route="/v1/jobs/{id}", status="404") == 1
    assert value(metrics, "http_request_seconds_count", route="/v1/jobs/{id}") == 2
    assert (value(metrics, "store_free_bytes") or 0) > 0
    assert metrics.content_type.startswith("text/plain")


def test_two_services_in_one_process_do_not_share_numbers(metrics: Metrics, tmp_path: Path) -> None:
    other = Metrics(queue_capacity=1, store=tmp_path)
    metrics.job_queued(job())
    assert value(other, "queue_depth") == 0
