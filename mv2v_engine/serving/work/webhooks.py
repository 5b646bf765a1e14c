"""Callbacks: a job's end is told to the URL that its request has, signed as Standard Webhooks does.

What is to be told is a file of the store from before the job is queued until it was taken, so that
neither a kill nor a restart loses it; it may be told twice, with the same `webhook-id`.

    webhooks/<job id>.json      {"url", "attempts"}

Each host has a queue of its own: one that hangs costs a try one timeout, and others nothing.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import re
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mv2v_engine.errors import RequestError
from mv2v_engine.files import make_folder, remove_matching, save_json
from mv2v_engine.serving.errors import ApiError
from mv2v_engine.serving.store.records import JobRecord, is_id
from mv2v_engine.serving.watch.listener import Listener
from mv2v_engine.serving.watch.logs import log_event
from mv2v_engine.serving.work.outbound import Hosts, RefusedError

# seconds between two tries, after the last of which it is given up: half a day in all
PAUSES = (5.0, 30.0, 120.0, 600.0, 3600.0, 4 * 3600.0, 8 * 3600.0)
TIMEOUT = 10.0
_PREFIX = "whsec_"
_GONE = 410


@dataclass(slots=True)
class _Waiting:
    """What is to be told of a job, and how often that was tried."""

    url: str
    attempts: int = 0


class Webhooks(Listener):
    """Tells of the end of jobs.

    folder: of the store. secret: `whsec_` and base64, as Standard Webhooks writes it. find: a job
    by its id, None if it is gone.

    Raises:
        RequestError: hosts without a secret, or no such secret.
    """

    def __init__(
        self,
        folder: Path,
        hosts: Hosts | None,
        secret: str | None,
        find: Callable[[str], Awaitable[JobRecord | None]],
    ) -> None:
        self._folder, self._hosts, self._find = folder, hosts, find
        self._key = signing_key(secret) if hosts is not None else b""
        self._waiting: dict[str, _Waiting] = {}
        self._queues: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Take up what is still to be told."""
        await asyncio.to_thread(make_folder, self._folder)
        unfinished = re.compile(r"\.job_.*")  # a kill's, while it was written
        await asyncio.to_thread(remove_matching, [self._folder], unfinished)
        for path in await asyncio.to_thread(lambda: sorted(self._folder.glob("job_*.json"))):
            job_id = path.stem
            try:
                kept = json.loads(await asyncio.to_thread(path.read_bytes))
                waiting = _Waiting(kept["url"], kept["attempts"])
            except (OSError, ValueError, KeyError, TypeError):
                waiting = None
            job = await self._find(job_id) if is_id("job", job_id) else None
            if waiting is None or job is None:
                await asyncio.to_thread(path.unlink, missing_ok=True)
                continue
            self._waiting[job_id] = waiting
            if job.is_ended:
                self.job_ended(job, None)

    async def stop(self) -> None:
        """What is not told yet is told after the next start."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._hosts is not None:
            self._hosts.close()

    def check(self, url: str) -> None:
        """Raises host_not_allowed: callbacks are off, or the list has no such host."""
        if self._hosts is None:
            message = "callback_url: this service was started without --webhook-host"
            raise ApiError("host_not_allowed", message, param="callback_url")
        self._hosts.check(url, "callback_url")

    async def expect(self, job: JobRecord) -> None:
        """Tell of a job's end once it has come; on the disk when this returns."""
        waiting = self._waiting[job.id] = _Waiting(job.request["callback_url"])
        await asyncio.to_thread(self._write, job.id, waiting)

    async def forget(self, job_id: str) -> None:
        """There is no such job, after all, or its end was told."""
        self._waiting.pop(job_id, None)
        await asyncio.to_thread(self._path(job_id).unlink, missing_ok=True)

    def job_ended(self, job: JobRecord, report: dict[str, Any] | None) -> None:
        """See `Listener`."""
        if job.id not in self._waiting or self._hosts is None:
            return
        task = asyncio.create_task(self._tell(job, self._waiting[job.id]), name="webhook")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self, job: JobRecord, waiting: _Waiting) -> None:
        body = json.dumps(event_of(job), ensure_ascii=False).encode()
        host = urlsplit(waiting.url).netloc
        while True:
            async with self._queues[host]:
                status, reason = await self._post(job.id, waiting.url, body)
            waiting.attempts += 1
            is_taken = status is not None and 200 <= status < 300
            is_last = status == _GONE or waiting.attempts > len(PAUSES)
            level = logging.INFO if is_taken else logging.WARNING
            log_event(
                "webhook",
                level=level,
                job=job.id,
                attempts=waiting.attempts,
                status=status,
                reason=reason,
            )
            if is_taken or is_last:
                await self.forget(job.id)
                return
            with suppress(OSError):  # a full disk: it may be told once more often
                await asyncio.to_thread(self._write, job.id, waiting)
            await asyncio.sleep(PAUSES[waiting.attempts - 1])

    async def _post(self, job_id: str, url: str, body: bytes) -> tuple[int | None, str | None]:
        """The status that came, or why none did."""
        assert self._hosts is not None
        headers = signed(self._key, f"msg_{job_id}", int(time.time()), body)
        headers["Content-Type"] = "application/json"
        try:
            async with self._hosts.request(
                "POST", url, seconds=TIMEOUT, content=body, headers=headers
            ) as answer:
                return answer.status_code, None
        except RefusedError as error:
            return None, type(error.__cause__ or error).__name__

    def _write(self, job_id: str, waiting: _Waiting) -> None:
        save_json(self._path(job_id), {"url": waiting.url, "attempts": waiting.attempts})

    def _path(self, job_id: str) -> Path:
        return self._folder / f"{job_id}.json"


def signing_key(secret: str | None) -> bytes:
    """The key of a secret.

    Raises:
        RequestError: there is none, or it is no base64 of 24 to 64 bytes.
    """
    advice = "set MV2V_WEBHOOK_SECRET to whsec_ and the base64 of 24 to 64 random bytes"
    if not secret:
        raise RequestError(f"--webhook-host needs a secret to sign with; {advice}")
    try:
        key = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except ValueError as error:
        raise RequestError(f"the secret of webhooks is no base64; {advice}") from error
    if not 24 <= len(key) <= 64:
        raise RequestError(f"the secret of webhooks has {len(key)} bytes; {advice}")
    return key


def signed(key: bytes, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The headers that Standard Webhooks has: HMAC-SHA256 of id, seconds and body."""
    content = f"{message_id}.{timestamp}.".encode() + body
    digest = base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{digest}",
    }


def event_of(job: JobRecord) -> dict[str, Any]:
    """What is told of a job that has ended."""
    ended = datetime.fromtimestamp(job.ended or time.time(), timezone.utc)
    return {
        "type": f"job.{job.state}",
        "timestamp": ended.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "data": {
            "id": job.id,
            "session": job.session,
            "state": job.state,
            "number": job.number,
            "error": job.error,
        },
    }
