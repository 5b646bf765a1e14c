"""What happened to each job, kept so that a reader can come late, leave, and come back.

Events live in memory: of every job that has not ended, and of those that ended last. What a job
came to is in the database.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from mv2v_engine.serving.store.records import LAST_EVENTS, PREVIEW, JobEvent, JobRecord

# events kept of one job: a reader that is further behind misses the oldest
_MAX_EVENTS = 4096
_MAX_ENDED = 256
# numbers that a start of the store has for itself; those of the first lie behind milliseconds of
# the clock, which versions before took
_NUMBERS = 1 << 42
_LAST = (1 << 63) - 1


class EventLog:
    """One job's events. first: the number of its first one."""

    def __init__(self, first: int = 1) -> None:
        self._next = first
        self._events: list[JobEvent] = []
        self._changed = asyncio.Event()

    @property
    def last(self) -> JobEvent | None:
        """The newest event that tells how far the job is."""
        return next((event for event in reversed(self._events) if event.kind != PREVIEW), None)

    @property
    def newest(self) -> int:
        """The number of the last event, or the one before the first."""
        return self._next - 1

    @property
    def is_ended(self) -> bool:
        return self.last is not None and self.last.kind in LAST_EVENTS

    def add(self, data: dict[str, Any]) -> None:
        """Add an event and wake whoever reads; none follows the one that ended the job.

        Of previews the newest alone is kept, until the job ends.
        """
        if self.is_ended:
            return
        if data["type"] == PREVIEW or data["type"] in LAST_EVENTS:
            self._events = [event for event in self._events if event.kind != PREVIEW]
        self._events.append(JobEvent(self._next, data["type"], data))
        self._next += 1
        if len(self._events) > _MAX_EVENTS:
            del self._events[: _MAX_EVENTS // 4]
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def follow(self, after: int) -> AsyncIterator[JobEvent]:
        """Events behind number `after`, as they come, to the last one."""
        while True:
            changed = self._changed
            start = bisect_right(self._events, after, key=lambda event: event.number)
            for event in self._events[start:]:
                after = event.number
                yield event
            if self._changed is not changed:
                continue
            if self.is_ended:
                return
            await changed.wait()


class EventLogs:
    """The logs of all jobs that are alive, and of the last that were.

    generation: of the store, one higher at every start: no clock can tell what came after what.
    """

    def __init__(self, generation: int = 0) -> None:
        self._first = max(generation, 1) * _NUMBERS
        self._alive: dict[str, EventLog] = {}
        self._ended: OrderedDict[str, EventLog] = OrderedDict()

    def open(self, job_id: str, *, is_new: bool) -> EventLog:
        """The log of a job that has not ended.

        is_new: whether the job is; the numbers of an older one's log, which another process kept,
            go on behind all that it may have given.
        """
        log = self._alive.get(job_id)
        if log is None:
            log = self._alive[job_id] = EventLog(1 if is_new else self._first)
        return log

    def find(self, job_id: str) -> EventLog | None:
        return self._alive.get(job_id) or self._ended.get(job_id)

    def num_events(self, job_id: str) -> int:
        """The number of the newest event of a job's log; 0 of a job without one."""
        found = self.find(job_id)
        return found.newest if found is not None else 0

    def end(self, job: JobRecord) -> None:
        """Add the event that a job came to, which ends its log."""
        log = self._alive.pop(job.id, None)
        if log is None:
            return
        log.add(last_event(job).data)
        self._ended[job.id] = log
        while len(self._ended) > _MAX_ENDED:
            self._ended.popitem(last=False)

    def with_progress(self, job: JobRecord) -> JobRecord:
        """A job with the newest event of its stream."""
        found = self.find(job.id)
        if job.is_ended or found is None or found.last is None:
            return job
        return replace(job, progress=found.last.data)

    def __len__(self) -> int:
        return len(self._alive) + len(self._ended)


async def ended(job: JobRecord, after: int) -> AsyncIterator[JobEvent]:
    """The stream of a job without a log: what it came to, if that is news."""
    event = last_event(job)
    if event.number > after:
        yield event


def last_event(job: JobRecord) -> JobEvent:
    """What a job came to, numbered behind every event that it may have had before."""
    assert job.is_ended
    # its state is what is left to tell where the row's progress is damaged
    data: dict[str, Any] = {"type": job.state, **(job.progress or {})}
    return JobEvent(_LAST, data["type"], data)
