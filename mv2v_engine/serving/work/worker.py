"""The process that owns the engine, started by the server.

It is `python -m mv2v_engine.serving.work.worker`.

The main thread makes turns one after the other; another one reads stdin, so that a turn can be
cancelled while it is made. What libraries print goes to stderr: the pipe to the server is the
stdout that the process was given, moved away at the start.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mv2v_engine.errors import MV2VError
from mv2v_engine.locks import Lock
from mv2v_engine.progress import CancelToken
from mv2v_engine.serving.store.folders import worker_lock
from mv2v_engine.serving.watch.logs import configure_logs
from mv2v_engine.serving.watch.tracing import OpenJob, flush_traces, open_traces
from mv2v_engine.serving.work.host import Host
from mv2v_engine.serving.work.hosting import open_host, turn_events
from mv2v_engine.serving.work.protocol import decode, encode

log = logging.getLogger("mv2v_engine.serving.worker")

# without a server, the turn under way has so long to reach its next step
_LAST_STEP_SECONDS = 10.0
# that the worker of a service which was killed has to end
_LOCK_SECONDS = 60.0


class Orders:
    """What the server asks for, read by a thread of its own. tokens: of the jobs to come."""

    def __init__(self, stdin: BinaryIO) -> None:
        self._stdin = stdin
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._tokens: dict[str, CancelToken] = {}
        self._is_closed = False

    def start(self) -> None:
        threading.Thread(target=self._read, name="orders", daemon=True).start()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """In order, until stdin ends; cancellations have been dealt with."""
        while not self._is_closed:
            order = self._queue.get()
            if order is None:
                return
            yield order

    @contextmanager
    def token(self, job_id: str) -> Iterator[CancelToken]:
        """What cancels a job, for as long as it lasts."""
        with self._lock:
            token = self._tokens.setdefault(job_id, CancelToken())
        try:
            yield token
        finally:
            with self._lock:
                self._tokens.pop(job_id, None)

    def _read(self) -> None:
        for line in self._stdin:
            order = decode(line)
            if order["type"] == "cancel":
                with self._lock:
                    token = self._tokens.get(order["job"])
                if token is not None:
                    token.cancel()
                continue
            if order["type"] == "run":
                # here, not where it begins: a cancellation may follow at once
                with self._lock:
                    self._tokens[order["job"]["id"]] = CancelToken()
            self._queue.put(order)
        self._end()

    def _end(self) -> None:
        """The server is gone, or wants this process to end: at the next step."""
        self._is_closed = True
        with self._lock:
            for token in self._tokens.values():
                token.cancel()
        self._queue.put(None)
        time.sleep(_LAST_STEP_SECONDS)
        log.error("the turn did not end within %g s; the worker ends", _LAST_STEP_SECONDS)
        os._exit(1)


def main() -> int:
    """Serve until stdin ends; returns the exit code."""
    configure_logs()
    pipe = _private_pipe()
    orders = Orders(sys.stdin.buffer)
    first = decode(sys.stdin.buffer.readline() or b'{"type": "none"}')
    if first["type"] != "setup":
        return 1
    orders.start()
    lock = Lock(worker_lock(Path(first["store"])))
    if not lock.acquire(_LOCK_SECONDS):
        pipe.write(encode(_broken(f"process {lock.holder()} still works in {first['store']}")))
        return 1
    try:
        open_job = open_traces()
        host = open_host(first)
    except MV2VError as error:
        pipe.write(encode(_broken(str(error))))
        return 1
    pipe.write(encode({"type": "ready", "about": host.about}))
    try:
        for order in orders:
            _obey(order, host, orders, pipe, open_job)
    except BrokenPipeError:
        return 1  # the server is gone, and so is the turn under way
    host.close()
    flush_traces()
    return 0


def _private_pipe() -> BinaryIO:
    """The stdout that this process was given; what prints from now on goes to stderr."""
    sys.stdout.flush()
    pipe = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    return pipe


def _obey(
    order: dict[str, Any], host: Host, orders: Orders, pipe: BinaryIO, open_job: OpenJob
) -> None:
    kind = order["type"]
    if kind == "run":
        job_id = order["job"]["id"]
        with orders.token(job_id) as token:
            for event in turn_events(order, host, token, open_job):
                pipe.write(encode({"type": "event", "job": job_id, "event": event}))
    elif kind == "publish":
        answer = host.publish(order["session"], Path(order["folder"]), order["number"])
        pipe.write(encode({"type": "answer", "call": order["call"], "answer": answer}))
    elif kind == "release":
        host.release(order["session"])


def _broken(message: str) -> dict[str, Any]:
    return {"type": "broken", "message": message}


if __name__ == "__main__":
    code = 1
    try:
        code = main()
    except BaseException:
        log.exception("the worker ends")
        raise
    finally:
        logging.shutdown()
        # all is written; taking torch down in order would keep the store's lock for seconds, and
        # Python aborts where it ends while a thread, as the one of orders does, reads stdin
        os._exit(code)
