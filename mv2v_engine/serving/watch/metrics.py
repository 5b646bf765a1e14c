"""What the service counts and times, for Prometheus: a registry of its own, every name `mv2v_*`.

Stages and steps are timed as their events arrive, so that they cost the worker nothing. Numbers of
turns come from their reports, and only of turns that this process has seen begin: one that an
earlier process made, and that is found finished at the start, has been counted there. Outcomes
and faults stand at 0 from the start: Prometheus sees no increase in a count that begins at 1.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from mv2v_engine.memory.cache import COUNTERS
from mv2v_engine.serving.store.records import JobRecord, SessionRecord
from mv2v_engine.serving.store.streams import StreamRecord
from mv2v_engine.serving.watch.listener import Listener

_STEP = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_STAGE = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0, 1800.0)
_TURN = (0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0, 1800.0, 3600.0, 14400.0)
_REQUEST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
# outcomes of jobs, and the codes of their errors; others are possible, and hardly happen
_ENDS = (
    ("finished", ""),
    ("cancelled", "cancelled"),
    ("failed", "disk_full"),
    ("failed", "internal"),
    ("failed", "not_finite"),
    ("failed", "out_of_memory"),
    ("failed", "timeout"),
    ("failed", "unprocessable_turn"),
    ("failed", "worker_crashed"),
)
_STREAM_ENDS = (*_ENDS, ("finished", "stream_limit"), ("cancelled", "unread"))
_FRACTION = tuple(tenth / 10 for tenth in range(1, 11))


class Metrics(Listener):
    """Listens to the service, is told of requests, and renders itself.

    queue_capacity: turns that may wait. store: the folder whose disk is watched. clock: seconds.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(
        self,
        *,
        queue_capacity: int,
        store: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._queued: set[str] = set()
        self._running: set[str] = set()
        # when a running job's last step, or its stage, began; when each stage of it began
        self._step_began: dict[str, float] = {}
        self._stage_began: dict[tuple[str, str], float] = {}
        # the worker's cache counters when they were last told
        self._cache_counts: dict[str, int] = {}

        self.registry = registry = CollectorRegistry()
        ProcessCollector(namespace="mv2v", registry=registry)
        gauge, counter = partial(Gauge, registry=registry), partial(Counter, registry=registry)
        histogram = partial(Histogram, registry=registry)
        gauge("mv2v_queue_depth", "Turns that wait.").set_function(lambda: len(self._queued))
        gauge("mv2v_queue_capacity", "Turns that may wait.").set(queue_capacity)
        gauge("mv2v_jobs_running", "Turns under way.").set_function(lambda: len(self._running))
        free = gauge("mv2v_store_free_bytes", "Bytes free on the store's disk.")
        free.set_function(lambda: shutil.disk_usage(store).free)
        self._ready = gauge("mv2v_ready", "1 when turns can be made, as /readyz says.")
        self._jobs = counter(
            "mv2v_jobs",
            "Turns that ended, by outcome and, if they failed, by the code of their error.",
            ("outcome", "code"),
        )
        for outcome in _ENDS:
            self._jobs.labels(*outcome)
        self._wait_seconds = histogram(
            "mv2v_job_wait_seconds", "From a turn's request to its first begin.", buckets=_TURN
        )
        self._job_seconds = histogram(
            "mv2v_job_seconds", "From a finished turn's begin to its end.", buckets=_TURN
        )
        self._stage_seconds = histogram(
            "mv2v_stage_seconds", "Stages of turns, by stage.", ("stage",), buckets=_STAGE
        )
        self._step_seconds = histogram("mv2v_step_seconds", "Denoising steps.", buckets=_STEP)
        self._steps = counter(
            "mv2v_steps",
            "Denoising steps of finished turns, by whether they shared a forward with others'.",
            ("how",),
        )
        for how in ("alone", "packed"):
            self._steps.labels(how)
        self._tokens = counter(
            "mv2v_tokens",
            "Tokens of finished turns' sequences before merging, by kind.",
            ("kind",),
        )
        self._merged_fraction = histogram(
            "mv2v_merged_fraction",
            "Share of a sequence's conditioning frames that were merged.",
            buckets=_FRACTION,
        )
        self._cache_bytes = gauge(
            "mv2v_cache_bytes",
            "Bytes of latents in the engine's memory when the last turn was decoded, by tier.",
            ("tier",),
        )
        self._cache_events = counter(
            "mv2v_cache_events",
            "Hits, misses, reloads, demotions and evictions of the engine's memory.",
            ("event",),
        )
        for event in COUNTERS:
            self._cache_events.labels(event)
        self._restarts = counter("mv2v_worker_restarts", "Times that the worker was started again.")
        self._sessions = counter(
            "mv2v_sessions", "Sessions created and deleted, by what happened.", ("event",)
        )
        for event in ("created", "deleted"):
            self._sessions.labels(event)
        self._requests = counter(
            "mv2v_http_requests",
            "Answered requests by route template and status.",
            ("route", "status"),
        )
        self._request_seconds = histogram(
            "mv2v_http_request_seconds",
            "From a request to the end of its answer, by route template.",
            ("route",),
            buckets=_REQUEST,
        )
        self._streams = gauge("mv2v_event_streams", "Event streams that are being read.")

        self._live: set[str] = set()
        gauge("mv2v_streams_live", "Streams that are made.").set_function(lambda: len(self._live))
        self._streams_ended = counter(
            "mv2v_streams",
            "Streams that ended, by outcome and, if there is one, by the code of their error.",
            ("outcome", "code"),
        )
        for outcome in _STREAM_ENDS:
            self._streams_ended.labels(*outcome)
        self._stream_frames = counter("mv2v_stream_frames", "Frames of streams that were made.")
        self._block_seconds = histogram(
            "mv2v_stream_block_seconds",
            "From the order of a stream's block to its answer.",
            buckets=_STEP,
        )
        self._stream_readers = gauge("mv2v_stream_readers", "Streams' videos that are being read.")

    def watch_ready(self, is_ready: Callable[[], bool]) -> None:
        """Ask this whenever the metrics are read."""
        self._ready.set_function(lambda: float(is_ready()))

    def watch_routes(self, routes: Iterable[str]) -> None:
        """Count the faults of these from 0. routes: templates, as `observe_request` takes them."""
        for route in routes:
            self._requests.labels(route, "500")

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        """A request was answered. route: its template, so that ids make no series of their own."""
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def event_stream(self) -> AbstractContextManager[None]:
        """An event stream is read while the block runs."""
        return self._streams.track_inprogress()

    def stream_reader(self) -> AbstractContextManager[None]:
        """A stream's video is read while the block runs."""
        return self._stream_readers.track_inprogress()

    def render(self) -> bytes:
        """Everything in Prometheus's text format."""
        return generate_latest(self.registry)

    def job_queued(self, job: JobRecord) -> None:
        self._leave(job.id)
        self._queued.add(job.id)

    def job_started(self, job: JobRecord) -> None:
        self._queued.discard(job.id)
        self._running.add(job.id)
        if job.attempts <= 1 and job.started is not None:
            self._wait_seconds.observe(max(job.started - job.created, 0.0))

    def job_event(self, job: JobRecord, event: dict[str, Any]) -> None:
        now = self._clock()
        match event["type"]:
            case "stage_started":
                self._stage_began[job.id, event["stage"]] = now
                self._step_began[job.id] = now
            case "step_done":
                if (began := self._step_began.get(job.id)) is not None:
                    self._step_seconds.observe(now - began)
                self._step_began[job.id] = now
            case "stage_done":
                if (began := self._stage_began.pop((job.id, event["stage"]), None)) is not None:
                    self._stage_seconds.labels(event["stage"]).observe(now - began)

    def job_ended(self, job: JobRecord, report: dict[str, Any] | None) -> None:
        was_seen = job.id in self._running
        self._queued.discard(job.id)
        self._leave(job.id)
        self._jobs.labels(job.state, (job.error or {}).get("code", "")).inc()
        if not was_seen:
            return
        if job.state == "finished" and job.started is not None and job.ended is not None:
            self._job_seconds.observe(max(job.ended - job.started, 0.0))
        if report is not None:
            self._observe_report(report)

    def session_created(self, session: SessionRecord) -> None:
        self._sessions.labels("created").inc()

    def session_deleted(self, session_id: str) -> None:
        self._sessions.labels("deleted").inc()

    def stream_block(self, stream: StreamRecord, frames: int, seconds: float) -> None:
        self._live.add(stream.id)
        self._stream_frames.inc(frames)
        self._block_seconds.observe(seconds)

    def stream_created(self, stream: StreamRecord) -> None:
        self._live.add(stream.id)

    def stream_ended(self, stream: StreamRecord) -> None:
        self._live.discard(stream.id)
        self._streams_ended.labels(stream.state, (stream.error or {}).get("code", "")).inc()

    def worker_restarted(self, reason: str) -> None:
        self._restarts.inc()
        # the new one's memory is empty
        self._cache_counts = {}
        self._cache_bytes.clear()

    def _leave(self, job_id: str) -> None:
        """A job runs no longer, whatever became of it."""
        self._running.discard(job_id)
        self._step_began.pop(job_id, None)
        for key in [key for key in self._stage_began if key[0] == job_id]:
            del self._stage_began[key]

    def _observe_report(self, report: Mapping[str, Any]) -> None:
        """What it lacks, such as the report of another version's turn, is not counted."""
        for part in report.get("windows", [report]):
            plan = part.get("plan")
            if plan is None:
                continue
            packed, steps = part.get("packed_steps"), report.get("num_inference_steps")
            if packed is not None and steps is not None:
                self._steps.labels("packed").inc(packed)
                self._steps.labels("alone").inc(steps - packed)
            for kind, count in plan["tokens_by_kind"].items():
                self._tokens.labels(kind).inc(count)
            merges = plan["merges"]
            merged = sum(merge["frames"] for merge in merges)
            self._merged_fraction.observe(merged / merges[0]["of"] if merges else 0.0)
        for tier, count in report.get("cache_bytes_by_tier", {}).items():
            self._cache_bytes.labels(tier).set(count)
        told = report.get("cache_counters")
        if told is None:
            return
        counts = {event: told[event] for event in COUNTERS}
        for event, count in counts.items():
            self._cache_events.labels(event).inc(max(count - self._cache_counts.get(event, 0), 0))
        self._cache_counts = counts
