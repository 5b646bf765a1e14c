"""A service from its configuration to its last answer: started, listened for, drained, stopped."""

from __future__ import annotations

import asyncio
import gc
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI

from mv2v_engine.errors import RequestError
from mv2v_engine.serving.config import ServingConfig
from mv2v_engine.serving.http.app import create_app
from mv2v_engine.serving.http.connections import HEADER_SECONDS, BoundedConnection, Places
from mv2v_engine.serving.service import Service
from mv2v_engine.serving.watch.listener import Listener
from mv2v_engine.serving.watch.metrics import Metrics
from mv2v_engine.serving.watch.percent import Percentages
from mv2v_engine.serving.work.backend import Backend
from mv2v_engine.serving.work.prober import Prober

# connections that the system holds for the loop, behind all of which a new one waits, and that it
# takes up at once: what is over the bound is closed before more are taken
_BACKLOG, _ACCEPTED_AT_ONCE = 512, 32
# a client that takes nothing of its answer for so long is gone
_UNREAD_SECONDS = 120
# a connection that asks for nothing more; and what open answers may still take at the end
_KEEP_ALIVE_SECONDS, _CLOSING_SECONDS = 30, 5
# bytes of one message of a WebSocket at most: a raw frame of 4096x2160 pixels
_FRAME_BYTES = 32 << 20
# seconds between two looks at whether turns are made, until they are
_READY_SECONDS = 0.2


@asynccontextmanager
async def running_app(
    config: ServingConfig, backend: Backend, listeners: Sequence[Listener] = ()
) -> AsyncIterator[FastAPI]:
    """The application over a service that runs as long as the block.

    Raises:
        StorageError: another service runs on the store, or it cannot be written.
    """
    metrics = Metrics(queue_capacity=config.max_queue, store=config.store)
    percentages = Percentages()
    prober = Prober()
    service = Service(config, backend, prober.probe, (metrics, percentages, *listeners))
    metrics.watch_ready(lambda: service.ready)
    await service.start()
    try:
        await prober.start()
        app = create_app(service, config, metrics, percentages)
        try:
            yield app
        finally:
            app.state.stopping.set()
    finally:
        await service.stop()
        await prober.stop()


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; port 0 takes any that is free.

    Raises:
        RequestError: the address is taken or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise RequestError(
            f"cannot listen on {host}: {error.strerror}; give an address of this machine as --host"
        ) from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # Linux has it; every connection has it from the socket that took it
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_SECONDS * 1000)
        bound.bind(address)
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise RequestError(
            f"cannot listen on port {port} of {host}: {error.strerror}; give another --port or "
            "--host"
        ) from error
    return bound


def address_of(bound: socket.socket) -> str:
    """Where a browser finds what listens there."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def num_connections(most: int) -> int:
    """The connections that a configuration allows, as many as this process has files for.

    Each may read a file, and the service has some of its own.
    """
    return max(1, min(most, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))


class DrainingServer(uvicorn.Server):
    """Answers on while it drains: the first signal starts that, the second cuts it short."""

    def __init__(
        self,
        app: FastAPI,
        drain: Callable[[], Awaitable[None]],
        *,
        header_seconds: float = HEADER_SECONDS,
    ) -> None:
        connection = partial(
            BoundedConnection,
            places=Places(num_connections(app.state.config.max_connections)),
            header_seconds=header_seconds,
        )
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                loop="asyncio",
                # what makes a protocol is all that is asked of it
                http=connection,  # type: ignore[arg-type]
                backlog=_ACCEPTED_AT_ONCE,
                ws="websockets-sansio",
                # a client that sends frames is slowed by not being read, and answers no pings then
                ws_ping_interval=None,
                ws_max_size=_FRAME_BYTES,
                log_config=None,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=_CLOSING_SECONDS,
            )
        )
        self._drain = drain
        self._draining: asyncio.Task[None] | None = None

    def begin_drain(self) -> None:
        """Drain, then stop listening. From the loop's own thread."""
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drained())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """What a signal does."""
        if self._draining is not None:
            super().handle_exit(sig, frame)
            return
        # signals come between any two instructions; the loop takes it up where it is safe
        self._loop.call_soon_threadsafe(self.begin_drain)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen; how many wait is not how many are taken up at once."""
        await super().startup(sockets)
        for bound in sockets or ():
            bound.listen(_BACKLOG)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen until it is told to end."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)
        if self._draining is not None:
            self._draining.cancel()

    async def _drained(self) -> None:
        try:
            await self._drain()
        finally:
            self.should_exit = True


async def serve(
    config: ServingConfig,
    backend: Backend,
    listeners: Sequence[Listener] = (),
    *,
    on_listening: Callable[[str], None],
    on_ready: Callable[[str, str], None],
) -> None:
    """Serve until a signal has ended it: then the turn under way has its grace.

    on_listening: called with the address once requests are answered. on_ready: called once, with
        the address and the model's name, when the first turn could be made.

    Raises:
        StorageError, RequestError: the store or the address cannot be used, or the engine cannot be
            had with these settings, however often it is tried.
    """
    bound = bound_socket(config.host, config.port)
    try:
        async with running_app(config, backend, listeners) as app:

            async def drain() -> None:
                await app.state.service.drain()
                app.state.stopping.set()

            server = DrainingServer(app, drain)
            address = address_of(bound)
            # a full collection of what is imported by now would hold up every answer meanwhile
            gc.collect()
            gc.freeze()
            on_listening(address)
            waiting = asyncio.create_task(_tell_ready(app, address, on_ready, server))
            try:
                await server.serve([bound])
            finally:
                waiting.cancel()
            if backend.refusal:
                raise RequestError(backend.refusal)
    finally:
        bound.close()


async def _tell_ready(
    app: FastAPI, address: str, tell: Callable[[str, str], None], server: DrainingServer
) -> None:
    while not app.state.service.ready:
        if app.state.service.backend.refusal:
            server.begin_drain()
            return
        await asyncio.sleep(_READY_SECONDS)
    tell(address, app.state.service.about["engine"]["checkpoint"])
