"""The process that owns the engine, started by the server.

It is `python -m mv2v_engine.serving.work.worker`.

The main thread makes turns, the steps of several sessions' views in one forward where the engine
has room for them; another one reads stdin, so that a turn can be cancelled while it is made. What
libraries print goes to stderr: the pipe to the server is the stdout that the process was given,
moved away at the start.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from mv2v_engine.errors import MV2VError
from mv2v_engine.locks import Lock
from mv2v_engine.progress import CancelToken
from mv2v_engine.serving.store.folders import worker_lock
from mv2v_engine.serving.watch.logs import configure_logs, log_ids
from mv2v_engine.serving.watch.tracing import OpenJob, flush_traces, open_traces
from mv2v_engine.serving.work.host import Host
from mv2v_engine.serving.work.hosting import apart, is_final, open_host, turn_made
from mv2v_engine.serving.work.protocol import decode, encode

log = logging.getLogger("mv2v_engine.serving.worker")

# without a server, the turns under way have so long to reach their next step
_LAST_STEP_SECONDS = 10.0
# seconds that the worker of a service which was killed has to end
_LOCK_SECONDS = 60.0
_END = object()
# orders that are made step by step, and where they name what may cancel them
_LONG = {"run": "job", "block": "stream"}


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

    @property
    def is_closed(self) -> bool:
        """Whether stdin has ended."""
        return self._is_closed

    def come(self, *, waits: bool) -> list[dict[str, Any]]:
        """Those that have come, in order; cancellations have been dealt with.

        waits: for the first of them. None comes after stdin's end.
        """
        orders: list[dict[str, Any]] = []
        while not self._queue.empty() or (waits and not orders):
            order = self._queue.get()
            if order is None:
                break
            orders.append(order)
        return [] if self._is_closed else orders

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
            if order["type"] in _LONG:
                # here, not where it begins: a cancellation may follow at once
                with self._lock:
                    self._tokens[order[_LONG[order["type"]]]["id"]] = CancelToken()
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
        log.error("a turn did not end within %g s; the worker ends", _LAST_STEP_SECONDS)
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
        pipe.write(encode(_broken(str(error), is_final=is_final(error))))
        return 1
    pipe.write(encode({"type": "ready", "about": host.about, "capacity": host.capacity}))
    try:
        serve(orders, host, pipe, open_job)
    except BrokenPipeError:
        return 1  # the server is gone, and so are the turns under way
    host.close()
    flush_traces()
    return 0


def _private_pipe() -> BinaryIO:
    """The stdout that this process was given; what prints from now on goes to stderr."""
    sys.stdout.flush()
    pipe = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    return pipe


def serve(orders: Orders, host: Host, pipe: BinaryIO, open_job: OpenJob) -> None:
    """Obey until stdin ends and the turns under way have come to their end.

    What is asked of a session waits until its turn is made, whatever other sessions have asked.
    Turns and streams' blocks that are under way make a step each, one after the other, so that
    none holds up another for longer than a step.
    """
    pending: list[dict[str, Any]] = []
    under_way: dict[str, Iterator[None]] = {}
    while under_way or not orders.is_closed:
        pending += orders.come(waits=not under_way)
        busy, later = set(under_way), []
        for order in pending:
            session: str = _session_of(order)
            if session in busy:
                later.append(order)
            elif order["type"] in _LONG:
                busy.add(session)
                make = partial(_turn, open_job=open_job) if order["type"] == "run" else _block
                under_way[session] = make(order, host, orders, pipe)
            else:
                _obey(order, host, pipe)
        pending = [] if orders.is_closed else later
        for session, turn in list(under_way.items()):
            if next(turn, _END) is _END:
                del under_way[session]
        host.tick()


def _session_of(order: dict[str, Any]) -> str:
    if order["type"] in ("block", "check"):
        return str(order.get("stream", {}).get("id", ""))
    session = order["session"]
    name: str = session if order["type"] == "release" else session["id"]
    return name


def _turn(
    order: dict[str, Any], host: Host, orders: Orders, pipe: BinaryIO, open_job: OpenJob
) -> Iterator[None]:
    job_id = order["job"]["id"]

    def tell(event: dict[str, Any]) -> None:
        pipe.write(encode({"type": "event", "job": job_id, "event": event}))

    with orders.token(job_id) as token:
        yield from turn_made(order, host, token, open_job, tell)


def _block(order: dict[str, Any], host: Host, orders: Orders, pipe: BinaryIO) -> Iterator[None]:
    stream_id = order["stream"]["id"]
    answer = partial(_answer, order, pipe)

    def make() -> Generator[None, None, None]:
        with log_ids(stream=stream_id):
            yield from host.block(order["stream"], Path(order["folder"]), token, answer)

    with orders.token(stream_id) as token:
        yield from apart(make())


def _answer(order: dict[str, Any], pipe: BinaryIO, answer: dict[str, Any]) -> None:
    pipe.write(encode({"type": "answer", "call": order["call"], "answer": answer}))


def _obey(order: dict[str, Any], host: Host, pipe: BinaryIO) -> None:
    if order["type"] == "publish":
        answer = host.publish(order["session"], Path(order["folder"]), order["number"])
        _answer(order, pipe, answer)
    elif order["type"] == "check":
        _answer(order, pipe, host.check(order["prompt"]))
    elif order["type"] == "release":
        host.release(order["session"])


def _broken(message: str, *, is_final: bool = False) -> dict[str, Any]:
    return {"type": "broken", "message": message, "is_final": is_final}


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
