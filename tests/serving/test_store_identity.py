"""Stores whose database is not theirs, or of another time: refused, checked, repaired."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path

import pytest
from store_check import check_store

from mv2v_engine.errors import StorageError
from mv2v_engine.run import main
from mv2v_engine.serving.store.records import Choices
from tests.folders import contents, edited_json
from tests.serving.fake_backend import FakeBackend, store_turn, write_results
from tests.serving.in_process import (
    abandon,
    asked,
    ended,
    finished,
    in_loop,
    published,
    refused,
    serving,
    started,
)

DATABASE = "service.sqlite3"


def make(root: Path, *, turns: int = 2, keep: Path | None = None) -> list[str]:
    """A store that was started twice, with a session of each time. keep: the database before."""

    async def work() -> list[str]:
        async with serving(root) as (service, _):
            first = await finished(service, "anna", turns)
        if keep is not None:
            shutil.copy(root / DATABASE, keep)
        async with serving(root) as (service, _):
            return [first.id, (await finished(service, "ben")).id]

    return asyncio.run(work())


def start(root: Path) -> None:
    async def work() -> None:
        async with serving(root):
            pass

    asyncio.run(work())


def older(root: Path, spare: Path) -> None:
    shutil.copy(spare / "older", root / DATABASE)


def older_of_the_same_start(root: Path, spare: Path) -> None:
    """Make the database like a copy that was made while the service ran."""
    with closing(sqlite3.connect(root / DATABASE, isolation_level=None)) as db:
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("DELETE FROM sessions WHERE owner = 'ben'")


def foreign(root: Path, spare: Path) -> None:
    make(spare / "other")
    shutil.copy(spare / "other" / DATABASE, root / DATABASE)


def newer(root: Path, spare: Path) -> None:
    """The folders are of a backup, the database is not."""
    with edited_json(root / "store.json") as value:
        value["generation"] = 0


def missing(root: Path, spare: Path) -> None:
    (root / DATABASE).unlink(missing_ok=True)


def empty(root: Path, spare: Path) -> None:
    (root / DATABASE).write_bytes(b"")


def no_tables(root: Path, spare: Path) -> None:
    missing(root, spare)
    with closing(sqlite3.connect(root / DATABASE)) as db:
        db.execute("PRAGMA journal_mode = WAL")


def garbage(root: Path, spare: Path) -> None:
    (root / DATABASE).write_bytes(b"garbage" * 1000)


def half(root: Path, spare: Path) -> None:
    content = (root / DATABASE).read_bytes()
    (root / DATABASE).write_bytes(content[: len(content) // 2])


def no_name(root: Path, spare: Path) -> None:
    (root / "store.json").unlink()


def garbled_name(root: Path, spare: Path) -> None:
    (root / "store.json").write_text('{"format": "mv2v-store"}')


KINDS = [
    missing,
    empty,
    no_tables,
    garbage,
    half,
    older,
    older_of_the_same_start,
    newer,
    foreign,
    no_name,
    garbled_name,
]


@pytest.mark.parametrize("spoil", KINDS)
def test_what_does_not_belong_together_is_refused_and_can_be_repaired(
    tmp_path: Path, spoil: Callable[[Path, Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    root, spare = tmp_path / "store", tmp_path / "spare"
    spare.mkdir()
    sessions = make(root, keep=spare / "older")
    before = contents(root)
    spoil(root, spare)
    spoiled = contents(root)
    for _ in range(2):
        with pytest.raises(StorageError, match=r"store repair"):
            start(root)
    assert main(["store", "check", str(root)]) == 1
    now = contents(root)
    assert {name for name in spoiled if now.get(name) != spoiled[name]} <= {DATABASE}
    assert set(now) == set(spoiled)

    assert main(["store", "repair", str(root)]) == 0, capsys.readouterr().out
    assert main(["store", "check", str(root)]) == 0

    async def look() -> None:
        async with serving(root) as (service, backend):
            for owner, session, turns in (("anna", sessions[0], 2), ("ben", sessions[1], 1)):
                assert [s.id for s in (await service.sessions(owner)).items] == [session]
                found = await service.turns(owner, session)
                assert [turn.number for turn in found] == list(range(1, turns + 1))
                assert all(turn.is_published for turn in found)
                for turn in found:
                    assert turn.job is not None
                    assert (await service.job(owner, turn.job)).number == turn.number
                    video = await service.turn_file(owner, session, turn.number, "video")
                    name = video.relative_to(root).as_posix()
                    assert video.read_bytes() == before[name]
            session = await service.session("anna", sessions[0])
            assert (await ended(service, await asked(service, session))).number == 3
            assert backend.made == {(sessions[0], 3): 1}

    asyncio.run(look())


@pytest.mark.parametrize(
    ("is_served", "wanted"), [(False, "is no store"), (True, "is served by process")]
)
@in_loop
async def test_the_commands_refuse_what_is_no_store_or_runs(
    tmp_path: Path, is_served: bool, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving(tmp_path) if is_served else nullcontext():
        codes = [main(["store", word, str(tmp_path)]) for word in ("check", "repair")]
    said = capsys.readouterr().err.splitlines()
    assert codes == [2, 2] and len(said) == 2 and all(wanted in line for line in said)
    assert is_served or not list(tmp_path.iterdir())


def test_a_cut_off_beginning_is_begun_again(tmp_path: Path) -> None:
    """A kill between the name, the database and the name's first generation."""
    for cut in ("name", "tables", "generation"):
        root = tmp_path / cut
        make_name = {"format": "mv2v-store", "version": 1, "id": "store_1", "generation": 0}
        root.mkdir()
        (root / "store.json").write_text(json.dumps(make_name))
        if cut == "tables":
            no_tables(root, root)
        if cut == "generation":
            start(root)
            (root / "store.json").write_text(json.dumps(make_name))
        start(root)
        value = json.loads((root / "store.json").read_text())
        assert value["id"] == "store_1" and value["generation"] >= 1
        check_store(root)


@in_loop
async def test_what_no_row_tells_of_is_set_aside_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A branch whose row was not written, a session of another store: kept, out of the way."""
    async with serving(tmp_path) as (service, _):
        known = (await finished(service)).id
    before = contents(tmp_path / "sessions")
    for name in ("session_" + "0" * 24, "session_" + "1" * 24, "lost+found"):
        store_turn(tmp_path / "sessions" / name, name, 1)
    shutil.copytree(
        tmp_path / "sessions" / known / "rows", tmp_path / "sessions" / "lost+found" / "rows"
    )
    (tmp_path / "sessions" / "a file").write_text("of somebody")
    for _ in range(2):
        async with serving(tmp_path) as (service, _):
            assert [s.id for s in (await service.sessions("")).items] == [known]
    assert contents(tmp_path / "sessions") == before
    aside = tmp_path / "set-aside"
    assert len(list(aside.iterdir())) == 4
    assert (aside / "lost+found" / "turns" / "turn_01.safetensors").exists()
    assert (aside / "a file").read_text() == "of somebody"
    said = [record.getMessage() for record in caplog.records]
    assert sum("set aside" in line for line in said) == 4


@in_loop
async def test_a_finished_turn_without_a_row_gets_one(tmp_path: Path) -> None:
    """An older database lacks it, or the turn was stored when its job was given up."""
    async with serving(tmp_path) as (service, _):
        session = (await finished(service)).id
        store_turn(service.store.session(session), session, 2)
        write_results(service.store.session(session), 2)
    async with serving(tmp_path) as (service, _):
        assert [turn.number for turn in await service.turns("", session)] == [1, 2]
        record = await service.session("", session)
        await published(service, record, 2)
        assert (await ended(service, await asked(service, record))).number == 3


# columns that versions before have not: 3 none of them, 5 none of the later ones
CHOSEN = ("asked_fps", "alpha", "fit", "size")
SAID = ("notes", "is_favourite", "edited")
SAID_OF_TURNS = ("name", *SAID, "deleted", "forgotten")
CHOICES = Choices(window="last", fps=12.5, alpha="white")


def to_version(version: int, root: Path) -> None:
    """The store as an earlier version wrote it."""
    of_sessions = SAID if version == 5 else (*CHOSEN, *SAID)
    with closing(sqlite3.connect(root / DATABASE, isolation_level=None)) as db:
        for table, names in (("sessions", of_sessions), ("turns", SAID_OF_TURNS)):
            for name in names:
                db.execute(f"ALTER TABLE {table} DROP COLUMN {name}")
        db.execute(f"PRAGMA user_version = {version}")
    for pattern, names in (("session", of_sessions), ("turn_*", SAID_OF_TURNS)):
        for path in root.glob(f"sessions/*/rows/{pattern}.json"):
            with edited_json(path) as copy:
                for name in names:
                    del copy["row"][name]


def to_version_3(root: Path, spare: Path) -> None:
    """A session's row has the window alone."""
    to_version(3, root)


def to_version_5(root: Path, spare: Path) -> None:
    """Nobody could name a turn or delete it."""
    to_version(5, root)


def lost_in_version_3(root: Path, spare: Path) -> None:
    to_version_3(root, spare)
    missing(root, spare)


@pytest.mark.parametrize("version", [1, 2, 4, 7])
def test_a_store_of_another_version_is_refused(
    tmp_path: Path, version: int, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path)
    with closing(sqlite3.connect(tmp_path / DATABASE, isolation_level=None)) as db:
        db.execute(f"PRAGMA user_version = {version}")
    before = contents(tmp_path)
    wanted = f"has version {version}, this engine reads 3, 5 and 6; serve it"
    with pytest.raises(StorageError, match=wanted):
        start(tmp_path)
    assert [main(["store", word, str(tmp_path)]) for word in ("check", "repair")] == [1, 2]
    said = capsys.readouterr()
    assert wanted in said.out and wanted in said.err
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("spoil", "is_repaired", "has_choices"),
    [
        (None, False, True),
        (missing, True, True),
        (empty, True, True),
        (to_version_3, False, False),
        (to_version_5, False, True),
        (to_version_3, True, False),
        (lost_in_version_3, True, False),
    ],
)
def test_the_part_of_a_video_outlives_its_database(
    tmp_path: Path,
    spoil: Callable[[Path, Path], None] | None,
    is_repaired: bool,
    has_choices: bool,
) -> None:
    """Its copy has it, too; what else was chosen is not known of a store of the version before."""

    async def made() -> str:
        async with serving(tmp_path) as (service, _):
            session = await finished(service, choices=CHOICES)
            branch = await service.branch("", session.id, 1)
            assert session.window == branch.window == "last"
            return session.id

    async def look() -> None:
        async with serving(tmp_path) as (service, _):
            session = await service.session("", name)
            chosen = (12.5, "white", "crop") if has_choices else (None, None, None)
            assert (session.asked_fps, session.alpha, session.fit) == chosen
            assert (await ended(service, await asked(service, session))).number == 2
            windows = {one.window for one in (await service.sessions("")).items}
            assert windows == {"last"}

    async def look_again() -> None:
        async with serving(tmp_path) as (service, _):
            assert [turn.number for turn in await service.turns("", name)] == [1, 2]

    name = asyncio.run(made())
    if spoil is not None:
        spoil(tmp_path, tmp_path)
    assert main(["store", "check", str(tmp_path)]) == int(is_repaired and spoil != to_version_3)
    if is_repaired:
        assert main(["store", "repair", str(tmp_path)]) == 0
    asyncio.run(look())
    asyncio.run(look_again())
    shutil.rmtree(tmp_path / "set-aside", ignore_errors=True)
    check_store(tmp_path)


@in_loop
async def test_a_kill_between_the_two_generations_is_none_of_its_own(tmp_path: Path) -> None:
    service = await started(tmp_path, FakeBackend())
    await finished(service)
    await abandon(service)
    with edited_json(tmp_path / "store.json") as value:
        value["generation"] -= 1
    async with serving(tmp_path) as (service, _):
        (session,) = (await service.sessions("")).items
        assert (await refused(service.turn_file("", session.id, 2, "video"))).code == "not_found"
    check_store(tmp_path)
