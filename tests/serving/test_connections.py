"""Connections without a request: headers that do not end, more of them than there is room for."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import httpx

from mv2v_engine.serving.config import ServingConfig
from mv2v_engine.serving.http import connections
from mv2v_engine.serving.server import DrainingServer, bound_socket, num_connections, running_app
from tests.serving.fake_backend import FakeBackend
from tests.serving.in_process import asked, in_loop, until

ROOT = Path(__file__).resolve().parents[2]
HEADER = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n"
Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter


class Listening:
    """A service that listens in this loop."""

    def __init__(self, app: Any, port: int) -> None:
        self.service, self.port = app.state.service, port
        self.writers: list[Writer] = []

    async def connect(
        self, data: bytes = b"", *, address: str = "127.0.0.1"
    ) -> tuple[Reader, Writer]:
        """From an address of this machine."""
        local = (address, 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, local_addr=local)
        self.writers.append(writer)  # one that nobody holds is closed
        writer.write(data)
        await writer.drain()
        return reader, writer

    async def get(self, path: str = "/healthz") -> tuple[int, dict[str, Any]]:
        async with httpx.AsyncClient(timeout=600) as client:
            answer = await client.get(f"http://127.0.0.1:{self.port}{path}")
            return answer.status_code, answer.json()


@asynccontextmanager
async def listening(
    store: Path, backend: FakeBackend, *, header_seconds: float = 60.0, **settings: Any
) -> AsyncIterator[Listening]:
    config = ServingConfig(store=store, min_free_bytes=0, grace=60.0, **settings)
    async with running_app(config, backend) as app:
        with bound_socket("127.0.0.1", 0) as bound:
            server = DrainingServer(app, app.state.service.drain, header_seconds=header_seconds)
            serving = asyncio.create_task(server.serve([bound]))
            while not server.started:
                await asyncio.sleep(0.01)
            yield Listening(app, bound.getsockname()[1])
            backend.go.set()
            server.begin_drain()
            await serving


async def answer_of(reader: Reader) -> tuple[int, dict[str, Any]]:
    """The one answer of a connection that then ends."""
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@in_loop
async def test_a_header_has_its_time_from_its_first_byte_to_its_last(tmp_path: Path) -> None:
    async with listening(tmp_path, FakeBackend(), header_seconds=0.5) as service:
        silent, _ = await service.connect()
        half, _ = await service.connect(HEADER)
        dripping, drops = await service.connect()
        # one that has had an answer, and one of whose bodies nobody reads the rest
        second, more = await service.connect(HEADER + b"\r\n")
        assert (await second.readline()).startswith(b"HTTP/1.1 200")
        more.write(HEADER)

        async def drip() -> None:
            with contextlib.suppress(ConnectionError):
                for byte in HEADER * 1000:
                    drops.write(bytes([byte]))
                    await drops.drain()
                    await asyncio.sleep(0.05)

        dripper = asyncio.create_task(drip())
        assert await silent.read() == b""
        status, body = await answer_of(half)
        assert (status, body["error"]["code"]) == (408, "request_timeout")
        assert "0.5 s" in body["error"]["message"]
        # one that sends on may not get to read it
        with contextlib.suppress(ConnectionResetError):
            await dripping.read()
        await second.read()
        dripper.cancel()
        assert (await service.get())[0] == 200


@in_loop
async def test_what_is_no_http_is_refused_in_the_shape_of_every_error(tmp_path: Path) -> None:
    async with listening(tmp_path, FakeBackend()) as service:
        reader, _ = await service.connect(b"\x16\x03\x01 hello\r\n\r\n")
        status, body = await answer_of(reader)
        assert (status, body["error"]["code"]) == (400, "malformed_request")


@in_loop
async def test_the_oldest_that_waits_makes_room(tmp_path: Path) -> None:
    async with listening(tmp_path, FakeBackend(), max_connections=3) as service:
        first, second, third = [await service.connect(HEADER) for _ in range(3)]
        assert (await service.get())[0] == 200
        assert await first[0].read() == b""
        # the client has closed its own connection, so the two others are still here
        for reader, writer in (second, third):
            writer.write(b"Connection: close\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 200")


@in_loop
async def test_the_address_that_has_most_makes_room(tmp_path: Path) -> None:
    async with listening(tmp_path, FakeBackend(), max_connections=4) as service:
        alone = await service.connect(HEADER)
        crowd = [await service.connect(HEADER, address="127.0.0.2") for _ in range(3)]
        # one that was answered waits from then on
        crowd[0][1].write(b"\r\n")
        assert (await crowd[0][0].readline()).startswith(b"HTTP/1.1 200")
        assert (await service.get())[0] == 200
        assert await crowd[1][0].read() == b""
        for reader, writer in (alone, crowd[2]):
            writer.write(b"Connection: close\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 200")
        crowd[0][1].write(HEADER + b"Connection: close\r\n\r\n")
        assert b"HTTP/1.1 200" in await crowd[0][0].read()


@in_loop
async def test_a_flood_is_as_cheap_where_many_wait_as_where_few_do(tmp_path: Path) -> None:
    """Else whoever opens connections holds up everybody else by more than it costs."""
    calls = []
    for places in (4, 128):
        async with listening(tmp_path / str(places), FakeBackend(), max_connections=places) as it:
            for _ in range(places):
                await it.connect(HEADER)
            await it.get()
            count = 0

            def called(frame: FrameType, event: str, argument: object) -> None:
                nonlocal count
                count += frame.f_code.co_filename == connections.__file__

            sys.setprofile(called)
            for _ in range(40):
                reader, _ = await it.connect(HEADER)
            await it.get()
            sys.setprofile(None)
            calls.append(count)
            # the newest was left alone
            assert not reader.at_eof()
    few, many = calls
    assert many < 1.2 * few, calls


@in_loop
async def test_where_all_are_busy_one_more_is_refused(
    tmp_path: Path, held: FakeBackend, source_clip: Path
) -> None:
    async with listening(tmp_path / "store", held, max_connections=2) as service:
        upload = await service.service.upload_path()
        upload.write_bytes(source_clip.read_bytes())
        session = await service.service.create_session("", upload, "clip.mp4")
        job = await asked(service.service, session)
        await until(service.service, job, "started")
        # or they would stay open as long as connections may that ask for nothing more
        events = f"GET /v1/jobs/{job.id}/events HTTP/1.1\r\nHost: 127.0.0.1\r\n".encode()
        events += b"Connection: close\r\n\r\n"
        readers = [(await service.connect(events))[0] for _ in range(2)]
        for reader in readers:
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        reader, _ = await service.connect()
        head = await reader.read()
        assert head.startswith(b"HTTP/1.1 503") and b"Retry-After: 5" in head
        assert b"too_many_connections" in head
        held.go.set()
        for reader in readers:
            assert b"event: finished" in await reader.read()
        assert (await service.get())[0] == 200


def test_no_more_connections_than_there_are_files_for() -> None:
    assert num_connections(1) == 1
    assert num_connections(10**9) < 10**9


def test_a_thousand_headers_that_do_not_end_delay_nobody(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mv2v_engine.run", "serve", "--store", str(tmp_path / "store")]
    command += ["--port", "0", "--device", "cpu", "--min-free", "0"]
    with ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(
                ["sh", "-c", 'ulimit -n 1024 && exec "$@"', "sh", *command],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                cwd=ROOT,
            )
        )
        stack.callback(process.kill)
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        port = httpx.URL(address).port
        for _ in range(1100):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=600))
            sock.sendall(HEADER)
        seconds = []
        for _ in range(20):
            began = time.monotonic()
            assert httpx.get(f"{address}/healthz", timeout=600).status_code == 200
            seconds.append(time.monotonic() - began)
        # whoever waits for a place waits until a header has had its time
        assert statistics.median(seconds) < connections.HEADER_SECONDS / 2, seconds
