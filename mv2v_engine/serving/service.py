"""The service without HTTP: its start, what routes call, its stop.

Owners come first, and refusals are `ApiError`s: a session of another owner does not exist. All
methods belong to one event loop; SQLite and files are worked on by other threads. What changes
something is done to its end even if the caller is cancelled.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from mv2v_engine.engine.guides import require_guides
from mv2v_engine.errors import CameraError, MV2VError, RequestError
from mv2v_engine.serving.config import ServingConfig
from mv2v_engine.serving.errors import ApiError, client_words, disk_errors, full_disk
from mv2v_engine.serving.sessions import Probe, Sessions
from mv2v_engine.serving.store import jobs, tables
from mv2v_engine.serving.store.audit import Audit
from mv2v_engine.serving.store.database import Given, Result, Work
from mv2v_engine.serving.store.folders import Store, result_path, source_path
from mv2v_engine.serving.store.history import Deleted
from mv2v_engine.serving.store.identity import admit
from mv2v_engine.serving.store.records import (
    Choices,
    Footprint,
    JobEvent,
    JobRecord,
    Page,
    SessionRecord,
    TurnFile,
    TurnRecord,
    Uploads,
    is_id,
    new_job,
)
from mv2v_engine.serving.store.recovery import recover
from mv2v_engine.serving.store.retention import Retention
from mv2v_engine.serving.store.streams import stream_folder, video_path
from mv2v_engine.serving.watch.events import EventLogs, ended
from mv2v_engine.serving.watch.listener import Listener
from mv2v_engine.serving.work.backend import Backend
from mv2v_engine.serving.work.outbound import Hosts, RefusedError
from mv2v_engine.serving.work.publishing import Publisher
from mv2v_engine.serving.work.scheduler import Scheduler
from mv2v_engine.serving.work.streaming import Stream, Streams
from mv2v_engine.serving.work.turn_request import kept_request, make_request, session_window
from mv2v_engine.serving.work.webhooks import Webhooks
from mv2v_engine.video.transforms import select_window

# seconds in Retry-After, where nothing says how long it takes
_RETRY_SECONDS = 5
_RETRY = {"Retry-After": str(_RETRY_SECONDS)}
# seconds that fetching a video may take, and each part of it
_FETCH_SECONDS, _FETCH_PART_SECONDS = 120.0, 10.0
# a session that is only looked at is touched no more often than that
_TOUCH_SECONDS = 3600.0


class Service:
    """The one door to a store, a backend, and the tasks that work on them.

    The queue is the scheduler's, whole sessions are `Sessions`', rows are `tables`' and `jobs`'. A
    method raises `ApiError` with the codes that its docstring names.

    probe: decodes an upload within the limits. listeners: told of everything that happens.
    """

    def __init__(
        self,
        config: ServingConfig,
        backend: Backend,
        probe: Probe,
        listeners: Sequence[Listener] = (),
    ) -> None:
        told = Hosts(config.webhook_hosts) if config.webhook_hosts else None
        self.webhooks = Webhooks(
            config.store / "webhooks",
            told,
            config.webhook_secret,
            lambda job_id: self._database.read(jobs.any_job, job_id),
        )
        self._fetched_from, self._fetching = Hosts(config.source_hosts), Counter[str]()
        self.config, self.backend = config, backend
        self.listeners = (*listeners, self.webhooks)
        self._probe = probe
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_stopping = self._is_stopped = False
        self._restarts = 0
        self._draining: asyncio.Task[None] | None = None
        # the store's clock when this began
        self._clock_at, self._began = 0.0, time.monotonic()

    async def start(self) -> None:
        """Lock the store, recover what a kill left behind, and begin to load the engine.

        Raises:
            StorageError: another service runs on the store, its parts do not belong together, or
                it cannot be written.
        """
        self.store = await asyncio.to_thread(Store, self.config.store)
        await asyncio.to_thread(self.store.lock)
        try:
            await asyncio.to_thread(self.store.make_ready)
            with full_disk(self.config.store):
                identity = await asyncio.to_thread(admit, self.store)
                self._database = await asyncio.to_thread(self.store.open_database)
        except BaseException:
            self.store.unlock()
            raise
        self._assemble(identity.generation)
        try:
            with full_disk(self.config.store):
                await recover(self.store, self._database, self._audit)
                await self._scheduler.recover()
                self._clock_at = await self._database.read(tables.clock)
                await self.streams.recover()
                await self.webhooks.start()
        except BaseException:
            self._database.close()
            self.store.unlock()
            raise
        self.backend.watch(self._backend_changed)
        await self.backend.start()
        self._scheduler.start()
        self.streams.start()
        self._publisher.start()
        self._retention.start()
        self._audit.go_on()

    def _assemble(self, generation: int) -> None:
        """The service's parts over its open store. generation: of the store."""
        config, store, database = self.config, self.store, self._database
        self._logs = EventLogs(generation)
        self._publisher = Publisher(store, database, self.backend)
        self._scheduler = Scheduler(
            config, store, database, self.backend, self._logs, self.listeners
        )
        self._scheduler.turns_to_publish = self._publisher.wake
        self._audit = Audit(store, database, release=self.backend.release)
        self._scheduler.compared = partial(self._audit.session, mends=True)
        self._sessions = Sessions(
            config, store, database, self._scheduler, self._publisher, self._audit, self._probe
        )
        self.streams = Streams(config, store, self.backend, self._scheduler.tell, self._clock)
        self._retention = Retention(config, database, self._expire, self.streams.ended_records)

    async def drain(self) -> None:
        """Take no more turns, give the one under way its grace, then put it back in the queue.

        What there is can be read until `stop`.
        """
        if self._draining is None:
            self._is_stopping = True
            self._draining = asyncio.create_task(self._drain())
        await asyncio.shield(self._draining)

    async def stop(self) -> None:
        """Drain, then close the database and let go of the store."""
        await self.drain()
        if self._is_stopped:
            return
        self._is_stopped = True
        await asyncio.to_thread(self._database.close)
        self.store.unlock()

    async def _drain(self) -> None:
        await self._audit.stop()
        await self._retention.stop()
        await self._publisher.stop()
        await self.streams.stop()
        await self._scheduler.stop()
        await self.streams.ended()
        await self.webhooks.stop()
        self._fetched_from.close()
        if self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def ready(self) -> bool:
        """Whether turns are made: the engine is warm and the service is not stopping."""
        return self.backend.ready and not self._is_stopping

    @property
    def reason(self) -> str:
        """Why it is not ready, in words."""
        return "the service is stopping" if self._is_stopping else client_words(self.backend.reason)

    @property
    def about(self) -> dict[str, Any] | None:
        """What the engine is, as `Backend.about`; None until it was ready once."""
        return self.backend.about

    @property
    def num_running(self) -> int:
        """Turns that are being made."""
        return self._scheduler.num_running

    def require_about(self) -> dict[str, Any]:
        """What the backend says of its engine. Raises not_ready before there is one, and after."""
        about = self.backend.about
        if self.backend.is_lost and not self._is_stopping:
            raise ApiError("not_ready", f"no work is taken: {self.reason}")
        if about is None or self._is_stopping:
            message = f"no work is taken now: {self.reason}; try again in {_RETRY_SECONDS} s"
            raise ApiError("not_ready", message, headers=_RETRY)
        return about

    async def queue_depth(self) -> int:
        """Turns that wait."""
        return await self._read(jobs.queue_depth)

    async def upload_path(self) -> Path:
        """A new path for a body to be streamed to; whoever asked removes it if it is not used.

        What a kill leaves there is removed at the next start. Raises disk_full, not_ready.
        """
        self.require_about()
        self.store.require_free(self.config.min_free_bytes)
        return self.store.new_upload()

    async def fetch(self, owner: str, url: str, field: str) -> Path:
        """The file of a URL in a new path; whoever asked removes it if it is not used.

        field: of the request, for errors.

        Raises host_not_allowed, not_fetched, too_large, too_many_uploads, disk_full, not_ready.
        """
        limits = self.config.limits
        self._fetched_from.check(url, field)
        if self._fetching[owner] >= limits.uploads:
            message = f"{limits.uploads} uploads are under way; try again when one has ended"
            raise ApiError("too_many_uploads", message, headers=_RETRY)
        path = await self.upload_path()
        self._fetching[owner] += 1
        try:
            with disk_errors():
                await asyncio.wait_for(
                    self._fetched_from.download(
                        url, path, limits.upload_bytes, seconds=_FETCH_PART_SECONDS
                    ),
                    _FETCH_SECONDS,
                )
            return path
        except (RefusedError, asyncio.TimeoutError) as error:
            await asyncio.to_thread(path.unlink, missing_ok=True)
            why = str(error) or f"it took more than {_FETCH_SECONDS:g} s"
            raise ApiError("not_fetched", f"{field}: {why}", param=field) from error
        except BaseException:
            await asyncio.to_thread(path.unlink, missing_ok=True)
            raise
        finally:
            self._fetching[owner] -= 1

    async def create_session(
        self,
        owner: str,
        upload: Path,
        name: str,
        *,
        references: Sequence[Path] = (),
        mask: Path | None = None,
        key: str | None = None,
        choices: Choices | None = None,
    ) -> SessionRecord:
        """Make a session of an uploaded video, which is moved into it, or removed on a refusal.

        references, mask: what edits are given beside the video, uploaded like it.
        key: of idempotency; the same key, name, choices and files give the same session again.

        Raises not_ready, disk_full, too_many_sessions, the probe's codes, idempotency_conflict,
        invalid_request: the video has no such window. unprocessable_turn: the model makes no turns,
        or takes no references or mask.
        """
        uploads = Uploads(upload, tuple(references), mask)
        try:
            about = self.require_about()
            model = about["engine"]["checkpoint"]
            if about["kind"] == "streams":
                message = f"{model} makes streams and no turns; POST /v1/streams instead"
                raise ApiError("unprocessable_turn", message)
            sent = {"references": bool(references), "mask": mask is not None}
            try:
                require_guides(about["guides"], model, **sent)
            except RequestError as error:
                param = "mask" if mask is not None and not about["guides"]["mask"] else "reference"
                raise ApiError("unprocessable_turn", str(error), param=param) from error
        except ApiError:
            await asyncio.to_thread(uploads.remove)
            raise
        return await self._whole(
            self._sessions.create(owner, uploads, name, key, about, choices or Choices())
        )

    async def sessions(
        self, owner: str, *, limit: int = 20, after: str | None = None, is_newest_first: bool = True
    ) -> Page[SessionRecord]:
        """Sessions in order of creation, those behind `after`. Raises not_found: no such one."""
        how: dict[str, Any] = {"limit": limit, "after": after, "is_newest_first": is_newest_first}
        return await self._read(tables.list_sessions, owner, **how)

    async def session(self, owner: str, session_id: str) -> SessionRecord:
        """Raises not_found."""
        session = await self._find(owner, session_id)
        now = time.time()
        if abs(now - session.touched) > _TOUCH_SECONDS:
            # on a full disk, what there is can still be read
            with suppress(sqlite3.OperationalError):
                await self._database.write(tables.touch, session_id, now)
        return session

    async def source(self, owner: str, session_id: str) -> Path:
        """The uploaded file. Raises not_found; damaged, if it is not the one that was uploaded."""
        session = await self.session(owner, session_id)
        problem = await self._audit.source_problem(session)
        if problem is not None:
            raise ApiError("damaged", f"the uploaded video is lost: {problem}")
        return source_path(self.store.session(session.id))

    async def turns(self, owner: str, session_id: str) -> tuple[TurnRecord, ...]:
        """Finished turns in order. Raises not_found."""
        await self.session(owner, session_id)
        return await self._read(tables.list_turns, session_id)

    async def turn(self, owner: str, session_id: str, number: int) -> TurnRecord:
        """Raises not_found."""
        await self.session(owner, session_id)
        return await self._read(tables.find_turn, session_id, number)

    async def turn_file(self, owner: str, session_id: str, number: int, which: TurnFile) -> Path:
        """A turn's mp4 or thumbnail, the one that was recorded.

        Raises not_found; not_finished with Retry-After while it is made again from the latents;
        damaged, if these are lost too.
        """
        session = await self.session(owner, session_id)
        turn = await self._read(tables.find_turn, session_id, number)
        if await self._audit.problem(turn, which) is None:
            return result_path(self.store.session(session_id), number, which)
        with disk_errors():
            turn = await self._audit.turn(turn)
        damage = turn.damage or session.damage
        if damage is not None:
            raise ApiError("damaged", f"turn {number} has no {which} any more: {damage}")
        self._publisher.wake()
        refused = self._publisher.refused.get((session_id, number))
        if refused is not None:
            raise ApiError(
                "internal", f"turn {number} is kept, and has no {which}: {client_words(refused)}"
            )
        message = f"the {which} of turn {number} is being written again; try in {_RETRY_SECONDS} s"
        raise ApiError("not_finished", message, headers=_RETRY)

    async def footprint(self, owner: str, session_id: str) -> Footprint:
        """Raises not_found."""
        session = await self.session(owner, session_id)
        memory = self._scheduler.memory.get(session_id, {})
        return Footprint(
            disk_bytes=session.bytes,
            memory_bytes=memory.get("bytes", 0),
            next_turn_tokens=memory.get("next_turn_tokens"),
        )

    async def delete_session(self, owner: str, session_id: str) -> None:
        """Cancel its jobs, wait until they have ended, remove everything.

        It does not exist for anybody from the beginning of the call on. Raises not_found.
        """
        await self._whole(self._sessions.remove(owner, session_id, is_idle=False))

    async def edit_session(
        self, owner: str, session_id: str, changes: Mapping[str, Any]
    ) -> SessionRecord:
        """Change a session's name, notes or is_favourite.

        changes: those of them that are set, and `edited` as it was read, where a change that was
            made elsewhere since is to be refused.

        Raises not_found, edit_conflict, disk_full.
        """
        found = await self._whole(self._sessions.edit(owner, session_id, changes))
        assert isinstance(found, SessionRecord)
        return found

    async def edit_turn(
        self, owner: str, session_id: str, number: int, changes: Mapping[str, Any]
    ) -> TurnRecord:
        """Change a turn's name, notes or is_favourite; as `edit_session`."""
        found = await self._whole(self._sessions.edit(owner, session_id, changes, number))
        assert isinstance(found, TurnRecord)
        return found

    async def delete_turn(self, owner: str, session_id: str, number: int) -> Deleted:
        """Delete a turn: its files go, no later turn remembers it, its number stays taken.

        Turns that remembered it stay as they are, and say so. Deleted once more, it is the same.

        Raises not_found, busy: a turn of the session is being made. disk_full.
        """
        return await self._whole(self._sessions.delete_turn(owner, session_id, number))

    async def branch(
        self, owner: str, session_id: str, number: int, window: str | None = None
    ) -> SessionRecord:
        """A new session of the same source with turns 1 to `number` (0: none).

        A session of edits branches with number 0 alone, for its turns do not build on each other.

        window: another part of the video, with number 0 alone.

        Raises not_ready, not_found, invalid_request, disk_full, too_many_sessions, damaged.
        """
        about = self.require_about()
        parent = await self._find(owner, session_id)
        return await self._whole(self._sessions.branch(parent, number, about, window))

    def source_frames(self, session: SessionRecord) -> tuple[int, ...] | None:
        """Which frames of the source the model sees; None before the engine was ready once."""
        about = self.about
        if about is None or about["kind"] == "streams":
            return None
        if session.kind == "edits":
            return tuple(range(session.frames))
        wanted = about["sampling"]["num_frames"]
        try:
            window = session_window(session.frames, wanted, session.window)
            return select_window(session.frames, wanted, window).indices
        except MV2VError:
            return None  # it was made for another model

    async def export(self, owner: str, session_id: str) -> Path:
        """A zip of its videos and reports; the caller removes it. Raises not_found, disk_full."""
        return await self._sessions.export(await self.session(owner, session_id))

    async def submit(
        self, owner: str, session_id: str, request: dict[str, Any], *, key: str | None = None
    ) -> tuple[JobRecord, bool]:
        """Ask for a turn.

        request: "camera" (a preset, moves, a trajectory as JSON, or files) or "prompt", and of
            "seed", "num_inference_steps", "guidance_scale", "memory" those that were set.
            "callback_url": who is told of its end.
        key: of idempotency; the same key and request give the same job again.

        Returns:
            the job, and whether it is new.

        Raises not_found, not_ready, unprocessable_turn, queue_full, idempotency_conflict, damaged,
        host_not_allowed.
        """
        about = self.require_about()
        session = await self._find(owner, session_id)
        if session.damage is not None:
            raise ApiError("damaged", f"the session takes no more turns: {session.damage}")
        name = about["engine"]["checkpoint"]
        if (session.checkpoint, session.kind) != (name, about["kind"]):
            raise ApiError(
                "unprocessable_turn",
                f"the session was made for {session.checkpoint}, this service runs {name}; make a "
                "session of the same video",
            )
        request = {name: value for name, value in request.items() if value is not None}
        try:
            made = await asyncio.to_thread(make_request, request, about, session.size)
        except MV2VError as error:
            param = "camera" if isinstance(error, CameraError) else None
            message = client_words(str(error))
            raise ApiError("unprocessable_turn", message, param=param) from error
        job = new_job(session, kept_request(request, made))
        self._require_running()
        if "callback_url" in request:
            self.webhooks.check(request["callback_url"])
            return await self._whole(self._submit_and_tell(job, key))
        return await self._whole(self._scheduler.submit(job, key))

    async def _submit_and_tell(self, job: JobRecord, key: str | None) -> tuple[JobRecord, bool]:
        """Queue a job whose end somebody is told of."""
        with disk_errors():
            await self.webhooks.expect(job)
        is_new = False
        try:
            kept, is_new = await self._scheduler.submit(job, key)
        finally:
            if not is_new:
                await self.webhooks.forget(job.id)
        return kept, is_new

    async def begin_stream(
        self, owner: str, request: dict[str, Any], *, key: str | None = None
    ) -> tuple[Stream, bool]:
        """Begin a stream; see `Streams.create`. Raises not_ready too."""
        about = self.require_about()
        return await self._whole(self.streams.create(owner, about, request, key=key))

    async def stream_prompt(self, owner: str, stream_id: str, prompt: str) -> int:
        """See `Streams.set_prompt`. Raises not_ready too."""
        self.require_about()
        return await self._whole(self.streams.set_prompt(owner, stream_id, prompt))

    async def cancel_stream(self, owner: str, stream_id: str) -> Stream:
        """See `Streams.cancel`."""
        return await self._whole(self.streams.cancel(owner, stream_id))

    async def delete_stream(self, owner: str, stream_id: str) -> None:
        """See `Streams.remove`."""
        await self._whole(self.streams.remove(owner, stream_id))

    async def stream_video(
        self, owner: str, stream_id: str, first: int | None, last: int | None, keep_alive: float
    ) -> AsyncIterator[bytes]:
        """See `Streams.read`. first: if not given, the newest block of one that is being made.

        Raises not_found, damaged: its video is not the one that was made.
        """
        stream = self.streams.find(owner, stream_id)
        if stream.record.is_ended:
            folder = stream_folder(self.store, stream_id)
            problem = await asyncio.to_thread(
                self._audit.verifier.problem, folder, video_path(folder).name, stream.record.files
            )
            if stream.num_blocks and problem is not None:
                raise ApiError("damaged", f"the video of the stream is lost: {problem}")
        newest = 1 if stream.record.is_ended else max(1, stream.num_blocks)
        return self.streams.read(stream, first or newest, last, keep_alive)

    async def job(self, owner: str, job_id: str) -> JobRecord:
        """A job with its newest progress, and its position while it waits. Raises not_found."""
        return self._logs.with_progress(await self._read(jobs.find_job, owner, job_id))

    def job_version(self, job_id: str) -> tuple[int, int] | None:
        """What is other once a job may be: what was read of it holds as long as this is the same.

        None where nothing may be read.
        """
        if self._is_stopped:
            return None
        return self._database.num_writes, self._logs.num_events(job_id)

    async def jobs(
        self,
        owner: str,
        *,
        session: str | None = None,
        limit: int = 20,
        after: str | None = None,
        is_newest_first: bool = True,
    ) -> Page[JobRecord]:
        """Jobs in order of creation, of one session or of all. Raises not_found."""
        how: dict[str, Any] = {"limit": limit, "after": after, "is_newest_first": is_newest_first}
        page = await self._read(jobs.list_jobs, owner, session=session, **how)
        return Page(tuple(self._logs.with_progress(job) for job in page.items), page.has_more)

    async def cancel(self, owner: str, job_id: str) -> JobRecord:
        """Cancel a job that waits at once, one that runs at its next step; nothing if it ended.

        Returns the job as it is then. Raises not_found.
        """
        self._require_running()
        return await self._whole(self._scheduler.cancel(owner, job_id))

    async def events(self, owner: str, job_id: str, *, after: int = 0) -> AsyncIterator[JobEvent]:
        """A job's events behind number `after`, then as they happen, to the job's end.

        Raises not_found when it is awaited, before the first event. A reader that leaves changes
        nothing.
        """
        job = await self.job(owner, job_id)
        found = self._logs.find(job_id)
        if found is None:
            # it ended before this process began, or long ago
            job = await self.job(owner, job_id)
            assert job.is_ended, f"{job_id} is {job.state} and has no log"
            return ended(job, after)
        return found.follow(after)

    def _clock(self) -> float:
        """The store's clock, in seconds."""
        return self._clock_at + time.monotonic() - self._began

    async def _find(self, owner: str, session_id: str) -> SessionRecord:
        return await self._read(tables.find_session, owner, session_id)

    async def _expire(self, owner: str, session_id: str) -> None:
        """Remove a session or stream that nobody uses; raises busy if somebody does."""
        if is_id("stream", session_id):
            await self._whole(self.streams.remove(owner, session_id, is_idle=True))
            return
        await self._whole(self._sessions.remove(owner, session_id, is_idle=True))

    async def _read(
        self, work: Work[Given, Result], *args: Given.args, **how: Given.kwargs
    ) -> Result:
        self._require_running()
        return await self._database.read(work, *args, **how)

    def _require_running(self) -> None:
        if self._is_stopped:
            raise ApiError("not_ready", "the service has stopped; ask when it is back")

    async def _whole(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Do work to its end, whether or not somebody still waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    def _backend_changed(self) -> None:
        restarts, reason = self.backend.restarts, self.backend.reason
        for _ in range(self._restarts, restarts):
            self._scheduler.tell(lambda listener: listener.worker_restarted(reason))
        self._restarts = restarts
        self._scheduler.wake()
        self.streams.wake()
        self._publisher.wake()
