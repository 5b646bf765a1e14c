"""Sessions made of an upload, branched, exported, removed: their folders and their rows.

What is made is built in uploads and moved into place whole, before its row; what is removed is
marked in the database first. A kill in between leaves nothing that the next start does not know.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import sqlite3
import time
from collections.abc import Awaitable, Callable, Mapping, Set
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, get_args

from mv2v_engine.config import Alpha
from mv2v_engine.engine.folder import SessionFolder
from mv2v_engine.engine.guides import check_mask
from mv2v_engine.errors import VideoError
from mv2v_engine.files import chunks_of, file_digest, flush, make_folder, move, share_file
from mv2v_engine.serving.config import Limits, ServingConfig
from mv2v_engine.serving.errors import ApiError, client_words, disk_errors
from mv2v_engine.serving.exporting import write_export
from mv2v_engine.serving.store import history, jobs, tables
from mv2v_engine.serving.store.audit import Audit
from mv2v_engine.serving.store.database import Database, is_disk_full
from mv2v_engine.serving.store.digests import promised
from mv2v_engine.serving.store.folders import (
    RESULTS,
    Store,
    result_path,
)
from mv2v_engine.serving.store.mirror import mirror
from mv2v_engine.serving.store.records import (
    MASK,
    SOURCE,
    Choices,
    ProbedVideo,
    SessionRecord,
    TurnFile,
    TurnRecord,
    Uploads,
    new_id,
)
from mv2v_engine.serving.work.publishing import Publisher
from mv2v_engine.serving.work.scheduler import Scheduler
from mv2v_engine.serving.work.turn_request import made_size, pixels, session_window
from mv2v_engine.video.scan import rate_notes
from mv2v_engine.video.transforms import crop_report, select_window


class Probe(Protocol):
    """Decodes an owner's upload within the limits; raises ApiError with the limit's own code.

    name: as in `Uploads.named`, given of what is no video alone.
    """

    def __call__(
        self, owner: str, path: Path, limits: Limits, alpha: Alpha, name: str = SOURCE, /
    ) -> Awaitable[ProbedVideo]: ...


# share of a picture; less is what rounding a size to the model's takes, and is in the report alone
_MUCH_CROPPED = 0.01
_MAX_NAME = 200


class Sessions:
    """What `Service` does to whole sessions, each method from its beginning to its end."""

    def __init__(
        self,
        config: ServingConfig,
        store: Store,
        database: Database,
        scheduler: Scheduler,
        publisher: Publisher,
        audit: Audit,
        probe: Probe,
    ) -> None:
        self.config, self.store, self.database = config, store, database
        self.scheduler, self.publisher = scheduler, publisher
        self.audit, self.probe = audit, probe

    async def create(
        self,
        owner: str,
        uploads: Uploads,
        name: str,
        key: str | None,
        about: dict[str, Any],
        choices: Choices,
    ) -> SessionRecord:
        """Make a session; its uploads are moved or removed in any case. See `Service`."""
        async with AsyncExitStack() as stack:
            stack.push_async_callback(asyncio.to_thread, uploads.remove)
            stack.enter_context(disk_errors())
            self.store.require_free(self.config.min_free_bytes)
            digest = None
            if key is not None:
                digest = await asyncio.to_thread(_upload_digest, uploads, name, choices)
                known = await self.database.read(tables.session_of_key, owner, key, digest)
                if known is not None:
                    return known
            most = self.config.limits.sessions
            await self.database.read(tables.require_room, owner, most)
            # kept with the session: a service that is told otherwise later reads the same video
            alpha: Alpha = choices.alpha or about.get("source_alpha", "black")
            fit, size = choices.fit or about.get("source_fit", "crop"), choices.size
            choices = replace(choices, alpha=alpha, fit=fit, size=made_size(about, size))
            video = await self.probe(owner, uploads.video, self.config.limits, alpha)
            await self._check_guides(owner, uploads, video, alpha)
            session = _new_session(owner, name, uploads, video, about, choices)
            files = await asyncio.to_thread(_place_uploads, self.store, uploads, session.id)
            session = replace(session, files=files)
            kept = await self._added(_add_session, session, most, key, digest)
            if kept.id != session.id:
                # the same request was a little faster
                await asyncio.to_thread(self._discard, session.id)
            else:
                await mirror(self.database, self.store.session(session.id), session.id)
                await asyncio.to_thread(self.store.spare.keep)
                self.scheduler.tell(lambda listener: listener.session_created(session))
        return kept

    async def _check_guides(
        self, owner: str, uploads: Uploads, video: ProbedVideo, alpha: Alpha
    ) -> None:
        """Refuse references and a mask that cannot be read, or do not fit the video.

        Raises the probe's codes.
        """
        for name, path in uploads.named().items():
            if name == SOURCE:
                continue
            found = await self.probe(owner, path, self.config.limits, alpha, name)
            if name != MASK:
                continue
            size, source = (found.height, found.width), (video.height, video.width)
            try:
                check_mask("the mask", size, found.frames, source, video.frames)
            except VideoError as error:
                raise ApiError("unreadable_video", str(error), param=MASK) from error

    async def branch(
        self, parent: SessionRecord, number: int, about: dict[str, Any], window: str | None
    ) -> SessionRecord:
        """Make a branch; see `Service.branch`."""
        turns = await self.database.read(tables.list_turns, parent.id, with_deleted=True)
        branch = _branch_record(parent, number, len(turns), about, window)
        gone = {turn.number for turn in turns if turn.deleted is not None}
        self.store.require_free(self.config.min_free_bytes)
        with disk_errors():
            await self._require_whole(parent, number)
            source_bytes = await asyncio.to_thread(_place_branch, self.store, parent, branch, gone)
            branch = replace(branch, bytes=source_bytes)
            made = await self._added(_add_branch, branch, self.config.limits.sessions)
        await mirror(self.database, self.store.session(made.id), made.id)
        self.publisher.wake()
        self.scheduler.tell(lambda listener: listener.session_created(made))
        return made

    async def _require_whole(self, parent: SessionRecord, number: int) -> None:
        """Refuse to branch from what is not whole. Raises damaged."""
        now = await self.audit.session(parent)
        if now.damage is not None:
            raise ApiError("damaged", f"session {parent.id} takes no branch: {now.damage}")
        for turn in await self.database.read(tables.list_turns, parent.id):
            if turn.number <= number and turn.damage is not None:
                raise ApiError(
                    "damaged",
                    f"turn {turn.number} of the session is damaged ({turn.damage}); branch from "
                    f"turn {turn.number - 1}",
                    param="turn",
                )

    async def _added(
        self, add: Callable[..., SessionRecord], session: SessionRecord, *more: Any
    ) -> SessionRecord:
        """Add the row of a folder that is in place; without the row, the folder goes again."""
        try:
            return await self.database.write(add, session, *more)
        except (ApiError, sqlite3.Error):
            await asyncio.to_thread(self._discard, session.id)
            raise

    async def remove(self, owner: str, session_id: str, *, is_idle: bool) -> None:
        """Delete a session. is_idle: only if it has no turn that waits or runs. See `Service`."""
        begin = partial(
            self.database.must_write,
            partial(jobs.delete_session, now=time.time(), is_idle=is_idle),
            owner,
            session_id,
        )
        with disk_errors():
            try:
                ended, running = await begin()
            except sqlite3.OperationalError as error:
                if not is_disk_full(error):
                    raise
                # not even those bytes are left: make room of what could be made again
                await self.database.read(tables.find_session, owner, session_id)
                results = self.store.session(session_id) / "results"
                await asyncio.to_thread(shutil.rmtree, results, ignore_errors=True)
                ended, running = await begin()
        for job in ended:
            self.scheduler.ended(job)
        for job in running:
            self.scheduler.end_at_next_step(job.id)
        await self.scheduler.announce_positions()
        await self.scheduler.session_idle(session_id)
        await self.publisher.leave(session_id)
        await self.scheduler.backend.release(session_id)
        self.scheduler.memory.pop(session_id, None)
        await asyncio.to_thread(self._discard, session_id)
        remove = partial(self.database.must_write, tables.remove_session, session_id)
        await self.scheduler.until_written(remove)
        await asyncio.to_thread(self.store.spare.keep)
        self.publisher.forget(session_id)
        self.scheduler.tell(lambda listener: listener.session_deleted(session_id))

    async def edit(
        self, owner: str, session_id: str, changes: Mapping[str, Any], number: int | None = None
    ) -> SessionRecord | TurnRecord:
        """Change what is said of a session, or of its turn of a number. See `Service`."""
        now = time.time()
        with disk_errors():
            if number is None:
                found: SessionRecord | TurnRecord = await self.database.write(
                    history.edit_session, owner, session_id, changes, now
                )
            else:
                found = await self.database.write(
                    history.edit_turn, owner, session_id, number, changes, now
                )
        await mirror(self.database, self.store.session(session_id), session_id, number=number)
        return found

    async def delete_turn(self, owner: str, session_id: str, number: int) -> history.Deleted:
        """Delete a turn. See `Service`."""
        # no turn of the session begins before the worker has forgotten this one
        async with self.scheduler.queueing:
            with disk_errors():
                gone = await self.database.must_write(
                    history.delete_turn, owner, session_id, number, time.time()
                )
            await self.publisher.idle(session_id)
            await self.scheduler.backend.release(session_id)
            self.scheduler.memory.pop(session_id, None)
            await asyncio.to_thread(history.discard_files, self.store, session_id, number)
            await asyncio.to_thread(self.store.empty_trash)
        await mirror(self.database, self.store.session(session_id), session_id)
        return gone

    async def export(self, session: SessionRecord) -> Path:
        """Write an archive of a session; see `Service.export`."""
        self.store.require_free(self.config.min_free_bytes + session.bytes)
        with disk_errors():
            # what is not as recorded is left out
            await self.audit.session(session)
        turns = await self.database.read(tables.list_turns, session.id)
        path, folder = self.store.new_upload(), self.store.session(session.id)
        whole = [
            [which for which in RESULTS if await self.audit.problem(turn, which) is None]
            for turn in turns
        ]
        with disk_errors():
            await asyncio.to_thread(write_export, path, folder, session, turns, whole)
        return path

    def _discard(self, session_id: str) -> None:
        """Take a session's folder out of its place at once, then from the disk."""
        self.store.remove(self.store.session(session_id))


def _upload_digest(uploads: Uploads, name: str, choices: Choices) -> str:
    """The identity of uploads' bytes, their session's name and choices, for idempotency."""
    said = name if choices.window is None else f"{name}\0{choices.window}"
    for key, value in asdict(choices).items():
        # a window alone stands as it did when there was no other choice
        if key != "window" and value is not None:
            said += f"\0{key}={value}"
    for place, path in uploads.named().items():
        # a video alone stands as it did when there was nothing else
        if place != SOURCE:
            said += f"\0{place}={file_digest(path)}"
    digest = hashlib.sha256(said.encode("utf-8", "surrogatepass") + b"\0")
    for chunk in chunks_of(uploads.video):
        digest.update(chunk)
    return digest.hexdigest()


def _new_session(
    owner: str,
    name: str,
    uploads: Uploads,
    video: ProbedVideo,
    about: dict[str, Any],
    choices: Choices,
) -> SessionRecord:
    """The record of a session to come. Raises unreadable_video: the model cannot take it."""
    now = time.time()
    return SessionRecord(
        id=new_id("session"),
        owner=owner,
        kind=about["kind"],
        name="".join(c for c in name if c.isprintable())[:_MAX_NAME],
        checkpoint=about["engine"]["checkpoint"],
        frames=video.frames,
        width=video.width,
        height=video.height,
        fps=choices.fps or video.fps,
        created=now,
        touched=now,
        bytes=sum(path.stat().st_size for path in uploads.named().values()),
        num_turns=0,
        warnings=(
            *_warnings(about, video.frames, choices.window),
            *video.notes,
            *rate_notes(video.fps, choices.fps),
            *_cropping(video, choices),
        ),
        window=choices.window,
        asked_fps=choices.fps,
        alpha=choices.alpha,
        fit=choices.fit,
        size=choices.size,
    )


def _warnings(about: dict[str, Any], num_frames: int, window: str | None) -> tuple[str, ...]:
    """What the model does not see of a video, in words.

    Raises unreadable_video, invalid_request: the video has no such window.
    """
    if num_frames < 2:
        raise ApiError(
            "unreadable_video", f"the video has {num_frames} frame, at least 2 are needed"
        )
    wanted = about["sampling"]["num_frames"]
    if about["kind"] == "edits" and window is not None:
        message = "edits take the whole video; leave window out, or upload the part"
        raise ApiError("invalid_request", message, param="window")
    if about["kind"] == "edits" or (num_frames == wanted and window is None):
        return ()
    try:
        chosen = select_window(num_frames, wanted, session_window(num_frames, wanted, window))
    except VideoError as error:
        if window is not None:
            raise ApiError("invalid_request", client_words(str(error)), param="window") from error
        raise ApiError("unreadable_video", str(error)) from error
    if chosen.indices == tuple(range(num_frames)):
        return ()
    return (f"the model takes {wanted} frames: {chosen.description}",)


def _cropping(video: ProbedVideo, choices: Choices) -> tuple[str, ...]:
    """What the model's size cuts off a video or adds to it, if that is worth a warning."""
    size = pixels(choices.size)
    assert size is not None
    height, width = size
    report = crop_report((video.height, video.width), size, choices.fit or "crop")
    top, bottom, left, right = report.cropped
    kept = height * width / ((height + top + bottom) * (width + left + right))
    is_much = 1 - kept > _MUCH_CROPPED or any(report.padded)
    return (report.description,) if is_much else ()


def _place_uploads(store: Store, uploads: Uploads, session_id: str) -> dict[str, Any]:
    """Move uploads into their session's folder, which appears whole; what its row promises."""
    staging, placed = store.new_upload(), list[Path]()
    for name, upload in uploads.named().items():
        placed.append(staging / name)
        make_folder(placed[-1].parent)
        flush(upload)
        move(upload, placed[-1])
    files = promised(staging, placed)
    move(staging, store.session(session_id))
    return files


def _add_session(
    db: sqlite3.Connection, session: SessionRecord, most: int, key: str | None, digest: str | None
) -> SessionRecord:
    """Add a session's row; another session, if its idempotency key has made that."""
    if key is not None and digest is not None:
        known = tables.session_of_key(db, session.owner, key, digest)
        if known is not None:
            return known
    tables.add_session(db, session, key=key, digest=digest, most=most)
    return session


def _branch_record(
    parent: SessionRecord, number: int, last: int, about: dict[str, Any], window: str | None
) -> SessionRecord:
    """The record of a branch to come. last: number of the parent's last turn.

    Raises not_found, invalid_request.
    """
    if not 0 <= number <= last:
        raise ApiError("not_found", f"session {parent.id} has {last} turns, asked was {number}")
    if parent.kind == "edits" and number:
        raise ApiError(
            "invalid_request",
            "edits do not build on each other, so a branch takes none of them along; branch from "
            "turn 0",
            param="turn",
        )
    now, name = time.time(), new_id("session")
    branch = replace(
        parent, id=name, created=now, touched=now, parent=parent.id, parent_turn=number
    )
    branch = replace(branch, notes="", is_favourite=False, edited=None)
    if window is None:
        return branch
    if number:
        message = "turns are made of one part of a video; give a window with turn 0 alone"
        raise ApiError("invalid_request", message, param="window")
    # what the engine knows of the other part is not said of this one
    said = _warnings(about, parent.frames, parent.window)
    rest = tuple(words for words in parent.warnings if words not in said)
    warnings = (*_warnings(about, parent.frames, window), *rest)
    return replace(branch, window=window, warnings=warnings, identity=None)


def _place_branch(
    store: Store, parent: SessionRecord, branch: SessionRecord, gone: Set[int]
) -> int:
    """Build a branch's folder of its parent's files and move it into place; bytes of its uploads.

    gone: numbers of the parent's turns that were deleted.

    Raises not_found: the parent is gone.
    """
    old, staging, number = store.session(parent.id), store.new_upload(), branch.parent_turn or 0
    try:
        for name in parent.uploads:
            share_file(old / name, staging / name)
        if number:
            SessionFolder(old).branch(staging, id=branch.id, count=number, without=gone)
        for turn in range(1, number + 1):
            for which in get_args(TurnFile):
                path = result_path(old, turn, which)
                if path.exists():
                    share_file(path, result_path(staging, turn, which))
        move(staging, store.session(branch.id))
        return sum((store.session(branch.id) / name).stat().st_size for name in parent.uploads)
    except OSError as error:
        if old.exists():
            raise
        # its owner, or retention, was faster
        raise tables.no_session(parent.id) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _add_branch(db: sqlite3.Connection, branch: SessionRecord, most: int) -> SessionRecord:
    """Add a branch's row and its turns'. Raises not_found, too_many_sessions."""
    assert branch.parent is not None and branch.parent_turn is not None
    tables.find_session(db, branch.owner, branch.parent)
    tables.add_session(db, branch, most=most)
    tables.copy_turns(db, branch.parent, branch.id, branch.parent_turn)
    return tables.find_session(db, branch.owner, branch.id)
