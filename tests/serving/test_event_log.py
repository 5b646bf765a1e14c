"""A job's events: in order for every reader, of previews the newest alone, none behind the end."""

from __future__ import annotations

import asyncio

from mv2v_engine.serving.watch.events import EventLog
from tests.serving.in_process import in_loop


def preview(step: int) -> dict[str, object]:
    return {"type": "preview", "step": step, "total": 3, "image": f"data:{step}"}


def step(number: int) -> dict[str, object]:
    return {"type": "step_done", "step": number}


async def read(log: EventLog, after: int = 0) -> list[tuple[int, str]]:
    return [(event.number, event.kind) async for event in log.follow(after)]


@in_loop
async def test_a_reader_on_time_has_every_preview_and_a_late_one_the_newest() -> None:
    log = EventLog()
    reader = asyncio.create_task(read(log))
    for number in (1, 2, 3):
        log.add(step(number))
        log.add(preview(number))
        await asyncio.sleep(0)
    assert log.last is not None and log.last.data == step(3)
    kept = [event.data for event in log._events]
    assert kept == [step(1), step(2), step(3), preview(3)]
    late = asyncio.create_task(read(log, after=2))
    await asyncio.sleep(0)
    log.add({"type": "finished", "turn": 1})
    log.add(preview(4))
    kinds = ["step_done", "preview"] * 3 + ["finished"]
    assert await reader == list(enumerate(kinds, 1))
    assert await late == [(3, "step_done"), (5, "step_done"), (6, "preview"), (7, "finished")]
    # what is over needs no picture: the turn has one
    assert [kind for _, kind in await read(log)] == [*["step_done"] * 3, "finished"]
