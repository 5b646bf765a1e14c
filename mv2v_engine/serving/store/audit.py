"""Whether files are those that rows promise; what is to be made again, and what is lost.

found                                       what becomes of it
a video or thumbnail is not as recorded     removed, and made again from the latents
latents are not as recorded                 the turn is damaged; what is whole of it is served
an upload is not as recorded                the session takes no more turns
session.json is not what the rows say       written again from the rows, else as the upload

Sizes of all files are compared before a start is over, contents too until `START_BYTES` were read;
the rest right after, in the background. A file that is asked for is compared before it is served.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mv2v_engine.engine.folder import SessionFolder, current_row
from mv2v_engine.errors import InUseError, StorageError
from mv2v_engine.serving.errors import ApiError, client_words
from mv2v_engine.serving.store import tables
from mv2v_engine.serving.store.claims import taken
from mv2v_engine.serving.store.database import Database
from mv2v_engine.serving.store.digests import Verifier
from mv2v_engine.serving.store.folders import (
    RESULTS,
    Store,
    reading,
    result_name,
    result_paths,
)
from mv2v_engine.serving.store.records import MASK, SOURCE, SessionRecord, TurnFile, TurnRecord

log = logging.getLogger("mv2v_engine.serving")

START_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class TurnState:
    """What is found of a turn. damage: what is lost. wrong: results that are not as recorded."""

    damage: str | None
    wrong: tuple[str, ...]

    @property
    def is_published(self) -> bool:
        return not self.wrong


class Audit:
    """One store's. All methods belong to one event loop.

    put_away: what becomes of a video or thumbnail that is not as recorded. release: lets a worker
        close a session, for its manifest to be mended.
    """

    def __init__(
        self,
        store: Store,
        database: Database,
        put_away: Callable[[Path], object] | None = None,
        release: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self.store, self.database = store, database
        self._release = release
        self._put_away = put_away or store.remove
        self.verifier = Verifier()
        self._changing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Compare everything, as far as a start waits for it; no session's damage ends it."""
        await self._all(mends=True)

    def go_on(self) -> None:
        """Compare what the start left, in the background."""
        if not self._is_deep():
            self._task = asyncio.create_task(self._rest(), name="audit")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def session(
        self, session: SessionRecord, *, is_deep: bool = True, mends: bool = False
    ) -> SessionRecord:
        """Compare a session's files; the session as it is now.

        mends: its manifest too, which nobody may write meanwhile.
        """
        every = await self.database.read(tables.list_turns, session.id, with_deleted=True)
        turns = [turn for turn in every if turn.deleted is None]
        folder = self.store.session(session.id)
        states = await asyncio.to_thread(self._states, folder, turns, is_deep)
        for turn, state in zip(turns, states, strict=True):
            await self._found(turn, state)
        damage = await asyncio.to_thread(self._source_damage, folder, session, is_deep)
        if damage is None and not mends:
            # what was found of the manifest holds until it is looked at again
            damage = session.damage
        elif damage is None:
            damage = await self._mended(folder, session, every)
        if damage != session.damage:
            _say(f"session {session.id}", damage)
            await self.database.must_write(tables.set_session_damage, session.id, damage)
        return await self.database.read(tables.session_by_id, session.id) or session

    async def turn(self, turn: TurnRecord) -> TurnRecord:
        """Compare a turn's files; the turn as it is now."""
        folder = self.store.session(turn.session)
        while True:
            (state,) = await asyncio.to_thread(self._states, folder, [turn], True)
            found = await self._found(turn, state)
            if found.damage == state.damage and not (found.is_published and state.wrong):
                return found
            # the row was written meanwhile, by who makes files again: that one is compared, too
            turn = found

    async def _found(self, turn: TurnRecord, state: TurnState) -> TurnRecord:
        """Write down what was found of a turn; the turn as it is now."""
        folder = self.store.session(turn.session)
        is_published = turn.is_published and state.is_published
        if (state.damage, is_published) == (turn.damage, turn.is_published):
            return turn
        async with self._changing:
            place = (turn.session, turn.number)
            now = await self.database.read(tables.find_turn, *place)
            if now == turn:
                _say(f"turn {turn.number} of {turn.session}", state.damage)
                if state.damage is None:
                    words = "; ".join(state.wrong)
                    log.warning("turn %d of %s: %s; made again", turn.number, turn.session, words)
                    await asyncio.to_thread(self._remove_wrong, folder, turn)
                await self.database.must_write(
                    tables.set_turn_state, *place, damage=state.damage, is_published=is_published
                )
                now = await self.database.read(tables.find_turn, *place)
        return now

    async def problem(self, turn: TurnRecord, which: TurnFile) -> str | None:
        """What is wrong with one result of a turn; None if it can be served."""
        folder = self.store.session(turn.session)
        name = result_name(turn.number, which)
        return await asyncio.to_thread(self.verifier.problem, folder, name, turn.files)

    async def source_problem(self, session: SessionRecord) -> str | None:
        """What is wrong with an upload; None if it can be served."""
        folder = self.store.session(session.id)
        return await asyncio.to_thread(self.verifier.problem, folder, SOURCE, session.files)

    async def _rest(self) -> None:
        try:
            await self._all(mends=False)
        except sqlite3.Error as error:
            log.error("not all files were compared with their rows: %s", error)

    async def _all(self, *, mends: bool) -> None:
        """mends: as at a start, which does not wait for the contents of everything."""
        for session in await self.database.read(tables.kept_sessions):
            is_deep = not mends or self._is_deep()
            try:
                await self.session(session, is_deep=is_deep, mends=mends)
            except (ApiError, OSError) as error:
                # it was deleted meanwhile, or its folder lets nobody do anything
                log.error("%s could not be compared with its rows: %s", session.id, error)

    def _is_deep(self) -> bool:
        return self.verifier.num_read < START_BYTES

    def _states(self, folder: Path, turns: Sequence[TurnRecord], is_deep: bool) -> list[TurnState]:
        return [turn_state(self.verifier, folder, turn, is_deep=is_deep) for turn in turns]

    def _remove_wrong(self, folder: Path, turn: TurnRecord) -> None:
        for path in result_paths(folder, turn.number):
            name = path.relative_to(folder).as_posix()
            if self.verifier.problem(folder, name, turn.files) is not None:
                self._put_away(path)

    def _source_damage(self, folder: Path, session: SessionRecord, is_deep: bool) -> str | None:
        for name in session.uploads:
            problem = self.verifier.problem(folder, name, session.files, is_deep=is_deep)
            if problem is not None:
                return upload_lost(name, problem)
        return None

    async def _mended(
        self, folder: Path, session: SessionRecord, turns: Sequence[TurnRecord]
    ) -> str | None:
        """Mend a session's manifest; what is wrong with it if that cannot be done."""
        wrong = await asyncio.to_thread(manifest_problem, folder, session, turns)
        if wrong is None:
            return None
        if self._release is not None:
            await self._release(session.id)
        try:
            return await asyncio.to_thread(self._mend_manifest, folder, session, turns, wrong)
        except InUseError as error:
            log.error("session.json of %s (%s) is not mended now: %s", session.id, wrong, error)
            return session.damage
        except (StorageError, OSError) as error:
            return f"session.json cannot be mended: {client_words(str(error))}"

    def _mend_manifest(
        self, folder: Path, session: SessionRecord, turns: Sequence[TurnRecord], wrong: str
    ) -> str | None:
        """turns: the deleted ones too, for their numbers stay taken."""
        manifest = SessionFolder(folder)
        entries = [turn.entry for turn in turns]
        if turns and (session.identity is None or None in entries):
            return f"session.json is damaged, and the rows do not have what it held: {wrong}"
        with taken(folder):
            rows = _rows(manifest, turns) if turns else []
            if manifest.manifest.exists():
                place = self.store.set_aside(manifest.manifest, f"{session.id}.session.json")
                log.error(
                    "session.json of %s is damaged (%s); it is kept as %s", folder, wrong, place
                )
            if session.identity is not None and turns:
                manifest.create(session.id, session.identity, rows)
                log.warning("session.json of %s was written again from the database", session.id)
        return None


def _rows(manifest: SessionFolder, turns: Sequence[TurnRecord]) -> list[dict[str, Any]]:
    """A manifest's rows, to be written again: the turns', and its others if it is whole.

    Raises:
        StorageError: that leaves gaps.
    """
    rows: dict[int, dict[str, Any]] = {}
    try:
        rows = {row["number"]: row for row in manifest.read()["turns"]}
    except StorageError as error:
        log.warning("of session.json nothing but what the database has is left: %s", error)
    for turn in turns:
        if turn.deleted is None or turn.number not in rows:
            rows[turn.number] = _row(turn)
    for number in range(1, max(rows)):
        if number not in rows and rows[max(rows)]["camera"] is None:
            # an edit that was unfinished: without settings, no request goes on with it
            nothing: dict[str, Any] = {"settings": {}, "windows": [], "report": None}
            rows[number] = {**rows[max(rows)], **nothing, "number": number}
    if set(rows) != set(range(1, len(rows) + 1)):
        raise StorageError(f"turns {sorted(rows)} are left, and some between them are not")
    return [rows[number] for number in sorted(rows)]


def upload_lost(name: str, problem: str) -> str:
    """What is said of an upload that is not as recorded. name: its path in the folder."""
    what = "video" if name == SOURCE else "mask" if name == MASK else "reference"
    return f"the uploaded {what} is lost: {problem}"


def turn_state(
    verifier: Verifier, folder: Path, turn: TurnRecord, *, is_deep: bool = True
) -> TurnState:
    """Compare a turn's files with what its row promises."""
    latents = sorted(name for name in turn.files if name.startswith("turns/"))
    results = [result_name(turn.number, which) for which in RESULTS]
    lost, wrong = (
        [verifier.problem(folder, name, turn.files, is_deep=is_deep) for name in names]
        for names in (latents, results)
    )
    damage = "; ".join(filter(None, lost if latents else ["its latents are not recorded"]))
    return TurnState(damage or None, tuple(filter(None, wrong)))


def manifest_problem(
    folder: Path, session: SessionRecord, turns: Sequence[TurnRecord]
) -> str | None:
    """How a session's manifest differs from the rows, in words; None if it does not."""
    try:
        return _difference(folder, session, turns)
    except (StorageError, OSError) as error:
        return client_words(str(error))


def _difference(folder: Path, session: SessionRecord, turns: Sequence[TurnRecord]) -> str | None:
    store = SessionFolder(folder)
    if not store.exists():
        return "it is missing" if turns else None
    with reading(folder):
        manifest = store.read()
        store.listed_files()
        by_number = {row["number"]: row for row in manifest["turns"]}
        if session.identity is not None and manifest["identity"] != session.identity:
            return "it is another session's"
        for turn in turns:
            if turn.number not in by_number:
                return f"it does not list turn {turn.number}"
            if turn.deleted is not None:
                continue
            row = by_number[turn.number]
            entry = {} if turn.entry is None else _row(turn)
            wrong = [name for name in entry.keys() - {"report"} if row[name] != entry[name]]
            if wrong:
                return f"turn {turn.number} has another {wrong[0]}"
            if not isinstance(row.get("report"), dict):
                return f"turn {turn.number} has no report"
    return None


def _row(turn: TurnRecord) -> dict[str, Any]:
    """A turn's row of the manifest; the reports of an edit's windows lie beside them."""
    report = {name: value for name, value in turn.report.items() if name != "windows"}
    return current_row({**(turn.entry or {}), "report": report})


def _say(what: str, damage: str | None) -> None:
    if damage is None:
        return
    log.error("%s is damaged: %s", what, damage)
