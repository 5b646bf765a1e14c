"""What people change of finished work: names, notes, favourites, turns that they delete."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import sqlite3
import zipfile
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from store_check import check_store

from mv2v_engine.engine.folder import SessionFolder
from mv2v_engine.run import main
from mv2v_engine.serving.exporting import contact_sheet, request_words
from mv2v_engine.serving.store import database, history
from mv2v_engine.serving.store.records import JobRecord, SessionRecord
from tests.serving.fake_backend import FakeBackend
from tests.serving.in_process import (
    abandon,
    asked,
    begun,
    ended,
    finished,
    in_loop,
    published,
    refused,
    serving,
    started,
)
from tests.serving.test_routes import Events, Upload, finished_turn
from tests.serving.test_routes import refused as refused_over_http

SAID = {"name": "from the left", "notes": "keep\nthis one", "is_favourite": True}


class Remembering(FakeBackend):
    """Whose turns say that they remembered every turn whose latents they found."""

    async def run(
        self, job: JobRecord, session: SessionRecord, folder: Path
    ) -> AsyncIterator[dict[str, Any]]:
        there = [int(path.stem[-2:]) for path in sorted(folder.glob("turns/*.safetensors"))]
        memory = {"retrieved": [{"turn": number} for number in there]}
        async for event in super().run(job, session, folder):
            if event["type"] == "done":
                event = event | {"report": event["report"] | {"memory": memory}}
            yield event


def files_of(service: Any, session: SessionRecord, number: int) -> list[str]:
    folder = service.store.session(session.id)
    names = (f"turns/turn_{number:02d}*", f"results/turn_{number:04d}*")
    return sorted(path.name for name in names for path in folder.glob(name))


@in_loop
async def test_a_deleted_turn_leaves_memory_and_its_number_stays_taken(tmp_path: Path) -> None:
    async with serving(tmp_path, Remembering()) as (service, backend):
        session = await finished(service, turns=2)
        gone = await service.delete_turn("", session.id, 1)
        assert (gone.dependents, gone.waiting) == ((2,), ())
        # the worker has let go of it
        assert backend.released == [session.id]
        assert files_of(service, session, 1) == []
        for refusal in (
            await refused(service.turn("", session.id, 1)),
            await refused(service.turn_file("", session.id, 1, "video")),
            await refused(service.edit_turn("", session.id, 1, {"name": "x"})),
        ):
            assert refusal.code == "not_found" and "turn 1" in refusal.message
            assert "was deleted" in refusal.message
        (left,) = await service.turns("", session.id)
        assert (left.number, left.forgotten) == (2, (1,))
        assert (await service.session("", session.id)).num_turns == 1
        # once more, it is the same
        assert await service.delete_turn("", session.id, 1) == gone
        third = await ended(service, await asked(service, session))
        assert third.number == 3
        assert history.remembered((await service.turn("", session.id, 3)).report) == {2}
        assert (await refused(service.delete_turn("", session.id, 9))).code == "not_found"
        assert (await refused(service.delete_turn("ben", session.id, 2))).code == "not_found"
        # a branch is as its parent: numbers stay, what was deleted is not there
        branch = await service.branch("", session.id, 3)
        assert [turn.number for turn in await service.turns("", branch.id)] == [2, 3]
        assert (await ended(service, await asked(service, branch))).number == 4
    check_store(tmp_path)


@in_loop
async def test_a_turn_is_deleted_while_others_run_and_wait(
    tmp_path: Path, held: FakeBackend
) -> None:
    async with serving(tmp_path, held) as (service, _):
        held.go.set()
        session = await finished(service)
        held.go.clear()
        running = await asked(service, session)
        await anext(await service.events("", running.id, after=1))
        waiting = await asked(service, session)
        refusal = await refused(service.delete_turn("", session.id, 1))
        assert refusal.code == "busy" and "cancel that one first" in refusal.message
        assert [turn.number for turn in await service.turns("", session.id)] == [1]
        await service.cancel("", running.id)
        held.go.set()
        assert (await ended(service, waiting)).state == "finished"
        held.go.clear()
        # one that only waits is named, and is made without what was deleted
        _, (first, *_) = await begun(service)
        late = await asked(service, session)
        gone = await service.delete_turn("", session.id, 1)
        assert gone.waiting == (late.id,)
        held.go.set()
        assert (await ended(service, late)).state == "finished"
        assert (await ended(service, first)).state == "finished"
        assert [turn.number for turn in await service.turns("", session.id)] == [2, 3]
    check_store(tmp_path)


@pytest.mark.parametrize("is_lost", [False, True])
@in_loop
async def test_a_kill_while_a_turn_is_deleted(
    tmp_path: Path, is_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the row and the files: the next start removes these, with or without the database."""
    service = await started(tmp_path, Remembering())
    session = await finished(service, turns=2)
    await service.edit_turn("", session.id, 2, SAID)
    with monkeypatch.context() as patched:
        patched.setattr(history, "discard_files", lambda *_: None)
        await service.delete_turn("", session.id, 1)
    assert files_of(service, session, 1) != []
    await abandon(service)
    if is_lost:
        (tmp_path / "service.sqlite3").unlink()
        await asyncio.to_thread(main, ["store", "repair", str(tmp_path)])
    async with serving(tmp_path, Remembering()) as (service, _):
        assert files_of(service, session, 1) == []
        (left,) = await service.turns("", session.id)
        assert (left.number, left.forgotten, left.damage) == (2, (1,), None)
        assert (left.name, left.notes, left.is_favourite) == tuple(SAID.values())
        assert (await ended(service, await asked(service, session))).number == 3
        # session.json is made again with the number of the deleted turn
        (service.store.session(session.id) / "session.json").write_text("no JSON")
    async with serving(tmp_path, Remembering()) as (service, _):
        assert (await service.session("", session.id)).damage is None
        listed = SessionFolder(service.store.session(session.id)).read()["turns"]
        assert [row["number"] for row in listed] == [1, 2, 3]
        assert files_of(service, session, 1) == []
    shutil.rmtree(tmp_path / "set-aside")  # the manifest that was none
    check_store(tmp_path)


@in_loop
async def test_a_store_of_the_version_before_has_nothing_said_of_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, _):
        session = await finished(service)
    with closing(sqlite3.connect(tmp_path / "service.sqlite3", isolation_level=None)) as db:
        for table, names in (
            ("sessions", ("notes", "is_favourite", "edited")),
            ("turns", ("name", "notes", "is_favourite", "edited", "deleted", "forgotten")),
        ):
            for name in names:
                db.execute(f"ALTER TABLE {table} DROP COLUMN {name}")
        db.execute(f"PRAGMA user_version = {database.VERSION - 1}")
    async with serving(tmp_path) as (service, _):
        turn = await service.turn("", session.id, 1)
        assert (turn.name, turn.notes, turn.is_favourite, turn.forgotten) == ("", "", False, ())
        assert (await service.edit_turn("", session.id, 1, SAID)).name == SAID["name"]
        await published(service, session, 1)
    check_store(tmp_path)


def test_names_notes_and_favourites(
    client: httpx.Client, upload: Upload, events_of: Events
) -> None:
    session = upload(client, "clip.mp4")["id"]
    finished_turn(client, session, events_of)
    for place in (f"/v1/sessions/{session}", f"/v1/sessions/{session}/turns/1"):
        before = client.get(place).json()
        assert (before["notes"], before["is_favourite"], before["edited"]) == ("", False, None)
        after = client.patch(place, json={**SAID, "edited": None})
        assert after.status_code == 200
        assert {name: after.json()[name] for name in SAID} == SAID
        # what is left out stays; a name is one line
        after = client.patch(place, json={"name": "two\nlines "}).json()
        assert (after["name"], after["notes"]) == ("two lines", SAID["notes"])
        # another tab that has read the notes before this one wrote them
        stale = client.patch(place, json={"notes": "mine", "edited": None})
        assert "changed elsewhere" in refused_over_http(stale, 409, "edit_conflict", "edited")
        assert client.get(place).json()["notes"] == SAID["notes"]
        # the same words twice are no conflict
        fresh = client.patch(place, json={"notes": "mine", "edited": after["edited"]}).json()
        again = client.patch(place, json={"notes": "mine", "edited": after["edited"]}).json()
        assert fresh["notes"] == "mine" and again["edited"] == fresh["edited"]
        for wrong, param in (
            ({}, None),
            ({"edited": None}, None),
            ({"name": "a" * 201}, "name"),
            ({"name": None}, "name"),
            ({"is_favourite": "yes"}, "is_favourite"),
            ({"title": "x"}, "title"),
        ):
            refused_over_http(client.patch(place, json=wrong), 422, "invalid_request", param)
    missing = client.patch(f"/v1/sessions/{session}/turns/7", json={"name": "x"})
    refused_over_http(missing, 404, "not_found")


def test_a_turn_is_deleted_over_http_and_the_export_tells_of_the_rest(
    client: httpx.Client, upload: Upload, events_of: Events
) -> None:
    session = upload(client, "clip.mp4")["id"]
    for _ in range(2):
        finished_turn(client, session, events_of)
    client.patch(f"/v1/sessions/{session}/turns/2", json=SAID)
    answers = [client.delete(f"/v1/sessions/{session}/turns/1") for _ in range(2)]
    expected = {"object": "turn.deleted", "session": session, "number": 1}
    for answer in answers:
        assert answer.json() == expected | {"dependents": [], "waiting": []}
    content = client.get(f"/v1/sessions/{session}/export").content
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        (turn,) = json.loads(file.read("session.json"))["turns"]
        assert {name: turn[name] for name in SAID} == SAID and turn["number"] == 2
        assert {"turn_0002.mp4"} == {n for n in file.namelist() if n.endswith(".mp4")}


@in_loop
async def test_another_part_of_a_video(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, _):
        session = await finished(service)
        part = await service.branch("", session.id, 0, "last")
        assert service.source_frames(part) == tuple(range(11, 20))
        assert (part.parent, part.num_turns, part.identity) == (session.id, 0, None)
        assert "11" in part.warnings[0] and part.warnings != session.warnings
        for number, window, words in (
            (0, "19", "frame"),
            (1, "last", "turn 0 alone"),
        ):
            refusal = await refused(service.branch("", session.id, number, window))
            assert (refusal.code, refusal.param) == ("invalid_request", "window")
            assert words in refusal.message
        assert (await ended(service, await asked(service, part))).state == "finished"
    check_store(tmp_path)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"camera": "arc:-20"}, "Arc left 20°"),
        ({"camera": "pan:30 + tilt:-5"}, "Pan right 30°, Tilt down 5°"),
        ({"camera": "translate:0.5,-1e0,0"}, "Slide right 0.5 m, Lift up 1 m"),
        ({"camera": "zoom:-1.50+static"}, "Zoom out 1.5 m, The source's own camera"),
        ({"camera": "translate:0,0,0"}, "The source's own camera"),
        ({"camera": "pan_right"}, "Pan right"),
        ({"camera": "arc:20,3"}, "Arc 20,3"),
        ({"camera": {"name": "my path", "poses": []}}, "my path"),
        ({"camera": {"poses": []}}, "Camera path"),
        ({"camera": None, "prompt": "make the sphere red"}, "make the sphere red"),
    ],
)
def test_a_request_is_called_as_on_the_page(request_: dict[str, Any], words: str) -> None:
    assert request_words(request_) == words


def test_a_sheet_of_pictures(tmp_path: Path) -> None:
    pictures = []
    for number, colour in enumerate(("red", "lime", "blue", "white", "black"), 1):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (160, 96), colour).save(path)
        pictures.append((f"{number}  a long name that is cut at the picture's width", path))
    (tmp_path / "none.jpg").write_text("no picture")
    content = contact_sheet([*pictures, ("none", tmp_path / "none.jpg")])
    assert content is not None
    sheet = Image.open(io.BytesIO(content))
    assert sheet.size == (4 * 172 + 12, 2 * (96 + 20 + 12) + 12)
    middles = np.asarray(sheet)[60, [92, 264, 436]]
    assert middles.argmax(axis=-1).tolist() == [0, 1, 2]
    assert contact_sheet([]) is None
