"""Per cent of a turn: from its events, never back, and over all windows of a long edit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mv2v_engine.serving.store.records import JobRecord
from mv2v_engine.serving.watch.percent import Percentages

JOB = JobRecord(
    id="job_1", session="session_1", owner="", state="running", request={}, number=1, created=0.0
)


def step(number: int, total: int, stage: str = "sampling") -> dict[str, Any]:
    return {"type": "step_done", "stage": stage, "step": number, "total": total}


def after(percentages: Percentages, *events: dict[str, Any]) -> list[int]:
    found = []
    for event in events:
        percentages.job_event(JOB, event)
        found.append(percentages.of(JOB))
    return found


def test_steps_of_a_turn() -> None:
    percentages = Percentages()
    assert percentages.of(JOB) == 0
    percentages.job_started(JOB)
    other = {"type": "stage_started", "stage": "vae"}
    found = after(percentages, other, step(1, 4, "vae"), step(1, 4), other, step(4, 4), other)
    assert found == [0, 0, 26, 26, 98, 98]
    # begun again, it begins at nothing
    percentages.job_queued(JOB)
    assert percentages.of(JOB) == 0
    percentages.job_ended(JOB, None)
    assert percentages.of(replace(JOB, state="finished")) == 100
    assert percentages.of(replace(JOB, state="failed")) == 0


def test_windows_of_an_edit_share_the_whole() -> None:
    percentages = Percentages()
    percentages.job_started(JOB)

    def window(number: int, kind: str) -> dict[str, Any]:
        return {"type": f"window_{kind}", "number": number, "total": 2}

    found = after(
        percentages,
        window(1, "started"),
        step(2, 4),
        window(1, "done"),
        window(2, "started"),
        step(2, 4),
        window(2, "done"),
    )
    assert found == [2, 26, 50, 50, 74, 98]
