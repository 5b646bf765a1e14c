"""How much of a turn is done, in per cent, for clients that know no stages."""

from __future__ import annotations

from typing import Any

from mv2v_engine.serving.store.records import JobRecord
from mv2v_engine.serving.watch.listener import Listener

# steps are nearly all of a turn; what comes before and behind them has the rest
_BEFORE, _STEPS = 2, 96


class Percentages(Listener):
    """Follows the jobs that run. Never goes back, but for a job that is begun again."""

    def __init__(self) -> None:
        self._percent: dict[str, int] = {}
        # a long edit's windows that are finished, and all of them
        self._windows: dict[str, tuple[int, int]] = {}

    def of(self, job: JobRecord) -> int:
        """0 to 100. A job that failed stays where it was told last: at 0."""
        return 100 if job.state == "finished" else self._percent.get(job.id, 0)

    def job_started(self, job: JobRecord) -> None:
        self._forget(job)
        self._percent[job.id] = 0

    def job_event(self, job: JobRecord, event: dict[str, Any]) -> None:
        match event["type"]:
            case "step_done" if event["stage"] == "sampling":
                share = event["step"] / event["total"]
            case "window_started":
                self._windows[job.id] = (event["number"] - 1, event["total"])
                share = 0.0
            case "window_done":
                self._windows[job.id] = (event["number"], event["total"])
                share = 0.0
            case _:
                return
        done, total = self._windows.get(job.id, (0, 1))
        percent = round(_BEFORE + _STEPS * (done + share) / total)
        self._percent[job.id] = min(99, max(self._percent.get(job.id, 0), percent))

    def job_queued(self, job: JobRecord) -> None:
        self._forget(job)

    def job_ended(self, job: JobRecord, report: dict[str, Any] | None) -> None:
        self._forget(job)

    def _forget(self, job: JobRecord) -> None:
        self._percent.pop(job.id, None)
        self._windows.pop(job.id, None)
