"""Files that are not those that rows promise: made again, or named as lost; never served."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sqlite3
import time
import zipfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from store_check import check_store

from mv2v_engine.engine.folder import SessionFolder
from mv2v_engine.engine.request import Request
from mv2v_engine.engine.turn import Draft, KeptWindow
from mv2v_engine.errors import StorageError
from mv2v_engine.locks import WriterLock
from mv2v_engine.run import main
from mv2v_engine.serving.service import Service
from mv2v_engine.serving.store.records import SessionRecord, TurnFile
from tests.serving.fake_backend import FakeBackend
from tests.serving.in_process import (
    TURN,
    abandon,
    asked,
    begun,
    ended,
    finished,
    in_loop,
    new_session,
    published,
    refused,
    serving,
    started,
    until,
)


def cut(path: Path) -> None:
    path.write_bytes(b"")


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def remove(path: Path) -> None:
    path.unlink()


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [cut, halve, shorten, lengthen, flip, remove, become_folder]
RESULTS: dict[TurnFile, str] = {
    "video": "results/turn_0001.mp4",
    "thumbnail": "results/turn_0001.jpg",
}
LATENTS = "turns/turn_01.safetensors"


@asynccontextmanager
async def damaged(
    root: Path, when: str, *names: str, damage: Callable[[Path], None]
) -> AsyncIterator[tuple[Service, SessionRecord, dict[str, bytes]]]:
    """A service and a session of two turns some of whose files were damaged, and what they were.

    when: "stopped" or "running", which the service was.
    """

    async def prepare(service: Service) -> SessionRecord:
        session = await new_session(service)
        for _ in range(2):
            await ended(service, await asked(service, session))
        return session

    def spoil(folder: Path) -> dict[str, bytes]:
        kept = {name: (folder / name).read_bytes() for name in (*names, *RESULTS.values())}
        for name in names:
            damage(folder / name)
        return kept

    if when == "running":
        async with serving(root) as (service, _):
            session = await prepare(service)
            for which in RESULTS:
                await service.turn_file("", session.id, 1, which)
            yield service, session, spoil(service.store.session(session.id))
        return
    async with serving(root) as (service, _):
        session = await prepare(service)
    kept = spoil(service.store.session(session.id))
    async with serving(root) as (service, _):
        yield service, await service.session("", session.id), kept


async def store_command(word: str, root: Path) -> int:
    """Its exit code; it has an event loop of its own."""
    return await asyncio.to_thread(main, ["store", word, str(root)])


@pytest.mark.parametrize(
    ("damage", "which", "when"),
    [
        *((damage, "video", "stopped") for damage in DAMAGES),
        *((damage, "video", "running") for damage in (cut, flip, remove)),
        *((damage, "thumbnail", "stopped") for damage in (cut, flip, remove)),
    ],
)
@in_loop
async def test_a_damaged_result_is_made_again_and_never_served(
    tmp_path: Path, damage: Callable[[Path], None], which: TurnFile, when: str
) -> None:
    name = RESULTS[which]
    async with damaged(tmp_path, when, name, damage=damage) as (service, session, kept):
        for _ in range(1000):
            try:
                path = await service.turn_file("", session.id, 1, which)
            except Exception as error:
                assert getattr(error, "code", error) == "not_finished"
                await asyncio.sleep(0.01)
                continue
            assert path.read_bytes() == kept[name]
            break
        await published(service, session, 1)
        assert (await service.turn("", session.id, 1)).damage is None
        assert (await ended(service, await asked(service, session))).number == 3
    if damage is not become_folder:
        check_store(tmp_path)


@pytest.mark.parametrize("damage", DAMAGES)
@in_loop
async def test_damaged_latents_end_their_turn_alone(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    async with damaged(tmp_path, "stopped", LATENTS, damage=damage) as (service, session, kept):
        first, second = await service.turns("", session.id)
        assert first.damage is not None and LATENTS in first.damage and second.damage is None
        assert first.report == {"turn": 1} and first.request == TURN
        assert f"turn 1 of {session.id} is damaged" in caplog.text
        # what is whole of it is served, by what was recorded
        for which, name in RESULTS.items():
            assert (await service.turn_file("", session.id, 1, which)).read_bytes() == kept[name]
        await service.turn_file("", session.id, 2, "video")
        error = await refused(service.branch("", session.id, 2))
        assert (error.code, error.param) == ("damaged", "turn") and "branch from turn 0" in str(
            error
        )
        assert (await service.branch("", session.id, 0)).num_turns == 0
        # the session goes on
        assert (await ended(service, await asked(service, session))).number == 3
    assert await store_command("check", tmp_path) == 1
    assert await store_command("repair", tmp_path) == 1
    # put back, it is whole again
    path = service.store.session(session.id) / LATENTS
    if path.is_dir():
        path.rmdir()
    path.write_bytes(kept[LATENTS])
    async with serving(tmp_path) as (service, _):
        assert (await service.turn("", session.id, 1)).damage is None
        assert (await service.branch("", session.id, 2)).num_turns == 2
    assert await store_command("check", tmp_path) == 0


@pytest.mark.parametrize("when", ["stopped", "running"])
@in_loop
async def test_a_turn_without_latents_and_video_is_gone_by_name(tmp_path: Path, when: str) -> None:
    names = (LATENTS, RESULTS["video"])
    async with damaged(tmp_path, when, *names, damage=cut) as (service, session, kept):
        error = await refused(service.turn_file("", session.id, 1, "video"))
        assert (error.code, error.status) == ("damaged", 410)
        assert "turn 1 has no video any more" in error.message
        picture = await service.turn_file("", session.id, 1, "thumbnail")
        assert picture.read_bytes() == kept[RESULTS["thumbnail"]]
        archive = await service.export("", session.id)
        with zipfile.ZipFile(archive) as file:
            assert "turn_0001.mp4" not in file.namelist()
            assert {"turn_0001.jpg", "turn_0002.mp4"} < set(file.namelist())
            about = json.loads(file.read("session.json"))
        assert about["turns"][0]["damage"] and about["turns"][0]["report"] == {"turn": 1}
        archive.unlink()
        assert (await ended(service, await asked(service, session))).number == 3


@pytest.mark.parametrize("damage", [cut, flip, remove, become_folder])
@in_loop
async def test_a_damaged_upload_ends_new_turns_and_leaves_the_old_ones(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    async with damaged(tmp_path, "stopped", "source", damage=damage) as (service, session, kept):
        assert session.damage is not None and "the uploaded video is lost" in session.damage
        for call in (
            service.source("", session.id),
            service.submit("", session.id, TURN),
            service.branch("", session.id, 1),
        ):
            assert (await refused(call)).code == "damaged"
        video = await service.turn_file("", session.id, 1, "video")
        assert video.read_bytes() == kept[RESULTS["video"]]
        other = await new_session(service)
        assert (await ended(service, await asked(service, other))).number == 1


@pytest.mark.parametrize("damage", DAMAGES)
@in_loop
async def test_an_upload_that_is_lost_while_the_service_runs_is_damage(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """Found by the next turn before it begins, and said of the session from then on."""
    async with damaged(tmp_path, "running", "source", damage=damage) as (service, session, kept):
        job = await ended(service, await asked(service, session))
        assert job.error is not None
        assert (job.state, job.error["code"]) == ("failed", "damaged")
        assert "the uploaded video is lost: source" in job.error["message"]
        now = await service.session("", session.id)
        assert now.damage is not None and now.damage == job.error["message"]
        assert (await refused(service.submit("", session.id, TURN))).code == "damaged"
        video = await service.turn_file("", session.id, 1, "video")
        assert video.read_bytes() == kept[RESULTS["video"]]
        other = await new_session(service)
        assert (await ended(service, await asked(service, other))).number == 1


@in_loop
async def test_an_upload_that_is_lost_during_a_turn_is_damage(
    tmp_path: Path, held: FakeBackend
) -> None:
    async with serving(tmp_path, held) as (service, _):
        session, (job,) = await begun(service)
        held.fails[job.id] = "unprocessable_turn"
        while job.id not in held.order:
            await asyncio.sleep(0.01)
        (service.store.session(session.id) / "source").unlink()
        held.go.set()
        job = await ended(service, job)
        assert job.error is not None and job.error["code"] == "damaged"
        # what fails for another reason is told that one
        other = await new_session(service)
        job = await asked(service, other, seed=2)
        held.fails[job.id] = "unprocessable_turn"
        job = await ended(service, job)
        assert job.error is not None and job.error["message"] == "as asked"


def garble(path: Path) -> None:
    path.write_text(path.read_text().replace('"number"', '"nulber"', 1))


def retype(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"turns": {"number": 1}}))


def drop_turn(path: Path) -> None:
    value = json.loads(path.read_text())
    value["turns"].pop()
    path.write_text(json.dumps(value))


def numbers_as_text(path: Path) -> None:
    value = json.loads(path.read_text())
    for row in value["turns"]:
        row["number"] = str(row["number"])
    path.write_text(json.dumps(value))


def rows_of_nothing(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"turns": [None, 3, []]}))


def nested(path: Path) -> None:
    path.write_text('{"format": "mv2v-session", "turns": ' + "[" * 100_000)


def not_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


MANIFESTS = [garble, retype, drop_turn, numbers_as_text, rows_of_nothing, nested, not_text]


@pytest.mark.parametrize(
    ("damage", "turns"),
    [
        *((damage, 2) for damage in [*DAMAGES, *MANIFESTS]),
        *((damage, 0) for damage in [cut, become_folder, *MANIFESTS]),
    ],
)
@in_loop
async def test_a_damaged_manifest_is_written_again_whatever_ran(
    tmp_path: Path, held: FakeBackend, damage: Callable[[Path], None], turns: int
) -> None:
    """With a job of the session running at a kill, and another session, which is served."""
    service = await started(tmp_path, held)
    held.go.set()
    session, other = await new_session(service), await new_session(service)
    for _ in range(turns):
        await ended(service, await asked(service, session))
    held.go.clear()
    job = await asked(service, session)
    await until(service, job, "started")
    await abandon(service)
    manifest = service.store.session(session.id) / "session.json"
    if not turns:
        manifest.write_text('{"format": "mv2v-session", "id": "x", "turns": [{"number": 1}]}\n')
    damage(manifest)
    async with serving(tmp_path) as (service, _):
        job = await ended(service, job)
        assert (job.state, job.number) == ("finished", turns + 1)
        assert (await ended(service, await asked(service, other))).number == 1
        assert (await service.session("", session.id)).damage is None
        for number in range(1, turns + 2):
            await published(service, session, number)
    assert await store_command("check", tmp_path) == 0


@pytest.mark.parametrize("damage", [*DAMAGES, *MANIFESTS])
@in_loop
async def test_a_manifest_that_is_lost_while_the_service_runs_is_written_again(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    async with damaged(tmp_path, "running", "session.json", damage=damage) as found:
        service, session, _ = found
        job = await ended(service, await asked(service, session))
        assert (job.state, job.number, job.error) == ("finished", 3, None)
        # a worker lets go of it before that; without its last newline it is the same
        assert (session.id in service.backend.released) == (damage is not shorten)
        assert (await service.session("", session.id)).damage is None
    assert await store_command("check", tmp_path) == 0


@in_loop
async def test_a_manifest_that_somebody_holds_is_left_alone(tmp_path: Path) -> None:
    async with damaged(tmp_path, "stopped", damage=remove) as (service, session, _):
        folder = service.store.session(session.id)
        (folder / "session.json").unlink()
        with WriterLock(folder) as lock:
            lock.take()
            backend = service.backend
            job = await asked(service, session)
            backend.fails[job.id] = "busy"
            job = await ended(service, job)
            assert job.error is not None and job.error["code"] == "busy"
            assert (await service.session("", session.id)).damage is None
            assert not (folder / "session.json").exists()
        assert (await ended(service, await asked(service, session))).number == 3


def swap(path: Path) -> None:
    """Still a list of edits, and not the one that was stored."""
    path.write_text(path.read_text().replace("a ball", "a cube"))


@pytest.mark.parametrize("damage", [swap, garble, not_text, remove])
@in_loop
async def test_a_damaged_list_of_edits_is_written_again(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """Its finished edits whole; of one between them that was unfinished nothing can be believed."""
    async with serving(tmp_path, FakeBackend(kind="edits")) as (service, _):
        session = await new_session(service)
    store = SessionFolder(service.store.session(session.id))
    store.create(session.id, {"source": "x", "cuts": []})
    for number in (1, 2, 3):
        request = Request(
            prompt=f"a ball {number}",
            seed=number,
            num_inference_steps=2,
            guidance_scale=1.0,
            memory="none",
        )
        latents = torch.full((1, 1, 2, 2), float(number))
        windows = [KeptWindow({"window": each}, latents, torch.zeros(3)) for each in (1, 2)]
        edit = Draft(number, request, {"merge": "none"}, windows)
        for window in (1, 2):
            store.append(edit, window, latents)
        if number != 2:
            edit.report = {"turn": number, "num_windows": 2}
            store.finish(edit)
    whole = store.read()
    async with serving(tmp_path, FakeBackend(kind="edits")) as (service, _):
        assert [turn.number for turn in await service.turns("", session.id)] == [1, 3]
    damage(store.manifest)
    async with serving(tmp_path, FakeBackend(kind="edits")) as (service, _):
        assert (await service.session("", session.id)).damage is None
        for turn in await service.turns("", session.id):
            assert turn.report["windows"] == [{"window": 1}, {"window": 2}]
    first, second, third = store.read()["turns"]
    assert [first, third] == [whole["turns"][0], whole["turns"][2]]
    # no request goes on with the one that was lost
    assert [edit.num_done for edit, _ in store.drafts()] == [2, 0, 2]
    assert second["settings"] == {} and second["report"] is None


@pytest.mark.parametrize("damage", [garble, not_text, cut])
@in_loop
async def test_a_manifest_that_cannot_be_made_again_ends_its_session_alone(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """A store of the version before has such a one: its rows do not have what it held."""
    service = await started(tmp_path, FakeBackend())
    session, other = await new_session(service), await new_session(service)
    await ended(service, await asked(service, session))
    await service._database.write(lambda db: db.execute("UPDATE turns SET entry = NULL"))
    await service._database.write(lambda db: db.execute("UPDATE sessions SET identity = NULL"))
    await abandon(service)
    damage(service.store.session(session.id) / "session.json")
    async with serving(tmp_path) as (service, _):
        now = await service.session("", session.id)
        assert now.damage is not None and "session.json is damaged" in now.damage
        assert (await refused(service.submit("", session.id, TURN))).code == "damaged"
        assert (await service.turn_file("", session.id, 1, "video")).exists()
        assert (await ended(service, await asked(service, other))).number == 1


@in_loop
async def test_a_job_of_a_damaged_session_fails_by_name(tmp_path: Path, held: FakeBackend) -> None:
    service = await started(tmp_path, held)
    session, other = await new_session(service), await new_session(service)
    jobs = [await asked(service, session), await asked(service, session)]
    await until(service, jobs[0], "started")
    behind = await asked(service, other)
    await abandon(service)
    (service.store.session(session.id) / "source").unlink()
    async with serving(tmp_path) as (service, _):
        for job in jobs:
            job = await ended(service, job)
            assert job.error is not None
            assert (job.state, job.error["code"]) == ("failed", "damaged")
        assert (await ended(service, behind)).state == "finished"


@pytest.mark.parametrize("name", ["session.json", "turn_0001.json"])
@pytest.mark.parametrize("damage", [cut, halve, remove, not_text, nested])
@in_loop
async def test_a_damaged_copy_of_rows_is_written_again(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    async with serving(tmp_path) as (service, _):
        session = await finished(service)
    path = service.store.session(session.id) / "rows" / name
    before = path.read_bytes()
    damage(path)
    async with serving(tmp_path):
        assert path.read_bytes() == before
    # and if the database is lost with it, what can be made of the rest is
    damage(path)
    (tmp_path / "service.sqlite3").unlink()
    code = await store_command("repair", tmp_path)
    async with serving(tmp_path) as (service, _):
        found = [(s.id, s.num_turns) for s in (await service.sessions("")).items]
    if name == "session.json":
        kept = tmp_path / "set-aside" / session.id / "turns" / "turn_01.safetensors"
        assert code == 1 and found == [] and kept.exists()
    else:
        assert code == 0 and found == [(session.id, 1)]


ROWS = {
    "sessions": ("warnings", "files", "kind", "frames", "created"),
    "turns": ("request", "report", "files", "entry", "created"),
}


@pytest.mark.parametrize("value", ["{", "3", '{"source": 3}', "[" * 100_000])
@pytest.mark.parametrize("table", ROWS)
@in_loop
async def test_a_row_of_other_words_is_written_again_from_its_copy(
    tmp_path: Path, table: str, value: str
) -> None:
    """Found though the database is whole; without a copy its session alone suffers."""
    async with serving(tmp_path) as (service, _):
        session, other = await new_session(service), await new_session(service)
        for each in (session, other):
            await ended(service, await asked(service, each))
        turn, known = await service.turn("", session.id, 1), await service.session("", session.id)
    where = {"sessions": "id", "turns": "session"}[table]
    for column in ROWS[table]:
        if value == '{"source": 3}' and column in ("report", "request", "entry"):
            continue  # other words of the right kind
        if value == "3" and column in ("frames", "created"):
            continue
        with contextlib.closing(sqlite3.connect(tmp_path / "service.sqlite3")) as db, db:
            change = f"UPDATE {table} SET {column} = ? WHERE {where} = ?"
            db.execute(change, (value, session.id))
        async with serving(tmp_path) as (service, _):
            assert await service.turn("", session.id, 1) == turn, column
            assert await service.session("", session.id) == known, column
            job = await ended(service, await asked(service, other))
            assert job.state == "finished"
    rows = service.store.session(session.id) / "rows"
    shutil.rmtree(rows)
    with contextlib.closing(sqlite3.connect(tmp_path / "service.sqlite3")) as db, db:
        db.execute(f"UPDATE {table} SET files = ? WHERE {where} = ?", (value, session.id))
    async with serving(tmp_path) as (service, _):
        found = await service.session("", session.id), await service.turn("", session.id, 1)
        if table == "turns":
            # what the manifest and the files have
            assert (found[1].report, found[1].damage) == (turn.report, None)
        else:
            assert "source: nothing is recorded of it" in (found[0].damage or "")
        assert (await ended(service, await asked(service, other))).state == "finished"


@pytest.mark.parametrize("column", ["request", "error", "progress"])
@in_loop
async def test_a_job_of_other_words_ends_nothing(tmp_path: Path, column: str) -> None:
    service = await started(tmp_path, FakeBackend())
    session = await new_session(service)
    done = await ended(service, await asked(service, session))
    await service._database.write(lambda db: db.execute(f"UPDATE jobs SET {column} = '{{'"))
    await abandon(service)
    async with serving(tmp_path) as (service, _):
        job = await service.job("", done.id)
        assert (job.state, job.number) == ("finished", 1)
        events = [event async for event in await service.events("", done.id)]
        assert [event.kind for event in events] == ["finished"]
        assert (await ended(service, await asked(service, session))).number == 2


@in_loop
async def test_a_folder_that_is_gone_ends_its_session_alone(tmp_path: Path) -> None:
    async with serving(tmp_path) as (service, _):
        session, other = await new_session(service), await new_session(service)
        await ended(service, await asked(service, session))
    service.store.session(session.id).rename(tmp_path / "gone")
    async with serving(tmp_path) as (service, _):
        assert (await refused(service.source("", session.id))).code == "damaged"
        assert (await refused(service.turn_file("", session.id, 1, "video"))).code == "damaged"
        (turn,) = await service.turns("", session.id)
        assert turn.damage is not None and turn.report == {"turn": 1}
        assert (await ended(service, await asked(service, other))).number == 1
        await service.delete_session("", session.id)
    assert (tmp_path / "gone").is_dir()


def test_over_http_a_lost_file_is_410_and_one_made_again_409(
    tmp_path: Path, serving: Any, upload: Any
) -> None:
    with serving(tmp_path) as live, live.client() as client:
        session = upload(client)
        answer = client.post(f"/v1/sessions/{session['id']}/turns", json=TURN)
        job = answer.json()["id"]
        client.get(f"/v1/jobs/{job}/events")
        folder = tmp_path / "sessions" / session["id"]
        url = f"/v1/sessions/{session['id']}/turns/1"
        whole = client.get(f"{url}/video").content
        (folder / RESULTS["video"]).write_bytes(b"")
        answer = client.get(f"{url}/video")
        assert answer.status_code == 409 and answer.json()["error"]["code"] == "not_finished"
        while (answer := client.get(f"{url}/video")).status_code == 409:
            time.sleep(0.01)
        assert answer.content == whole
        flip(folder / LATENTS)
        (folder / RESULTS["video"]).unlink()
        answer = client.get(f"{url}/video")
        assert answer.status_code == 410 and answer.json()["error"]["code"] == "damaged"
        assert LATENTS in client.get(url).json()["damage"]
        answer = client.get(f"/v1/videos/{job}/content")
        assert answer.status_code == 410
        flip(folder / "source")
        assert client.get(f"/v1/sessions/{session['id']}/source").status_code == 410


@in_loop
async def test_no_answer_is_given_for_a_store_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "sessions").write_text("no folder")
    with pytest.raises(StorageError, match="cannot make the store"):
        async with serving(tmp_path):
            pass
