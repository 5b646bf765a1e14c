"""Streams of a service over a backend without a model: readers, limits, ends, what survives."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

from mv2v_engine.serving.config import Limits
from mv2v_engine.serving.http.stream_schemas import status_of
from mv2v_engine.serving.service import Service
from mv2v_engine.serving.store.retention import expired
from mv2v_engine.serving.store.streams import read_records, stream_folder, video_path
from mv2v_engine.serving.watch.metrics import Metrics
from mv2v_engine.serving.work.streaming import NOTHING, Stream
from tests.serving.fake_streams import BLOCK_FRAMES, CRASHED, FPS, HEAD, StreamBackend
from tests.serving.in_process import abandon, in_loop, refused, serving, started

PATIENCE = 60.0
FULL = {"type": "failed", "code": "disk_full", "message": "no space is left"}


async def begun(service: Service, owner: str = "", **request: Any) -> Stream:
    stream, is_new = await service.begin_stream(owner, {"prompt": "a ball", **request})
    assert is_new
    return stream


async def until(stream: Stream, is_so: Callable[[], bool]) -> None:
    async def wait() -> None:
        while not is_so():
            await stream.change(0.05)

    await asyncio.wait_for(wait(), PATIENCE)


async def ended(stream: Stream) -> None:
    await until(stream, lambda: stream.record.is_ended)


async def read(service: Service, stream: Stream, first: int | None = None) -> bytes:
    parts = await service.stream_video("", stream.record.id, first, None, 10.0)
    return b"".join([part async for part in parts])


def video(service: Service, stream: Stream) -> bytes:
    return video_path(stream_folder(service.store, stream.record.id)).read_bytes()


@in_loop
async def test_a_stream_waits_for_its_furthest_reader(tmp_path: Path) -> None:
    backend = StreamBackend()
    async with serving(tmp_path, backend, stream_ahead=3.0) as (service, _):
        stream = await begun(service)
        await until(stream, lambda: stream.waits_for == "reader")
        # the first block has three frames fewer, so three seconds are three blocks and a part
        assert stream.num_blocks == 4
        # what is not asked for is the model's own, and its bytes are counted as they come
        told = status_of(stream)
        assert told.policy == "memrope" and told.bytes > backend.size
        parts = await service.stream_video("", stream.record.id, 1, None, 10.0)
        assert await anext(parts) == HEAD
        for number in range(1, 4):
            await anext(parts)  # whoever asks has taken the block before
            wanted = max(4, number + 2)
            await until(stream, lambda wanted=wanted: stream.num_blocks >= wanted)  # type: ignore[misc]
            await asyncio.sleep(0.02)
            assert (stream.furthest, stream.num_blocks) == (number - 1, wanted)
        await parts.aclose()
        assert stream.num_readers == 0
        # another one, behind, reads what there is and moves nothing
        behind = await service.stream_video("", stream.record.id, 1, 2, 10.0)
        assert b"".join([part async for part in behind]) == video(service, stream)[: stream.ends[1]]
        assert (stream.furthest, stream.num_blocks) == (2, 5)


@in_loop
async def test_a_stream_that_nobody_reads_ends(tmp_path: Path) -> None:
    settings = {"stream_ahead": 1.0, "stream_unread": 0.2}
    async with serving(tmp_path, StreamBackend(), **settings) as (service, backend):
        stream = await begun(service)
        bounded = await begun(service, blocks=9)
        await ended(stream)
        await ended(bounded)
        assert (stream.record.state, stream.num_blocks) == ("cancelled", 2)
        assert stream.record.error is not None and stream.record.error["code"] == "unread"
        # one with an end is made to it, whoever reads
        assert (bounded.record.state, bounded.num_blocks) == ("finished", 9)
        assert await read(service, stream) == video(service, stream)
        assert {stream.record.id, bounded.record.id} <= set(backend.released)


@in_loop
async def test_nothing_to_send_is_an_empty_box(tmp_path: Path, held: Any) -> None:
    backend = StreamBackend()
    async with serving(tmp_path, backend) as (service, _):
        stream = await begun(service, blocks=2)
        parts = await service.stream_video("", stream.record.id, 1, None, 0.05)
        assert await anext(parts) == HEAD
        await ended(stream)
        assert b"".join([part async for part in parts]) == video(service, stream)[len(HEAD) :]
        backend.go.clear()
        stream = await begun(service, blocks=2)
        parts = await service.stream_video("", stream.record.id, 1, None, 0.05)
        first = asyncio.ensure_future(anext(parts))
        await asyncio.sleep(0.2)
        assert not first.done()  # before the head nothing can be sent
        backend.go.set()
        assert await first == HEAD
        await anext(parts)
        backend.go.clear()
        # the second may be made by now
        rest = [await anext(parts)]
        if stream.num_blocks < 2:
            assert rest == [NOTHING]
        backend.go.set()


@in_loop
async def test_limits_of_a_token(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "tokens": ("a", "b"),
        "max_streams": 3,
        "limits": Limits(stream_seconds=4.0),
        "stream_ahead": 1.0,
    }
    async with serving(tmp_path, StreamBackend(), **settings) as (service, _):
        first = await begun(service, "a")
        error = await refused(begun(service, "a"))
        assert (error.code, error.status) == ("too_many_streams", 429)
        assert error.headers["Retry-After"]
        await begun(service, "b")
        # for another token it does not exist
        assert (await refused(service.cancel_stream("b", first.record.id))).code == "not_found"
        await service.cancel_stream("a", first.record.id)
        assert first.num_blocks == 2  # 13 frames, 1.6 seconds
        second = await begun(service, "a", blocks=99)
        await ended(second)
        # 13 and 21 frames are 4.25 seconds: what was begun is made whole
        assert (second.record.state, second.num_blocks) == ("finished", 3)
        assert second.record.error is not None and second.record.error["code"] == "stream_limit"
        error = await refused(begun(service, "a"))
        assert (error.code, error.status) == ("stream_limit", 429)
        await service.delete_stream("a", second.record.id)
        await begun(service, "a")
        assert not stream_folder(service.store, second.record.id).exists()
        assert (await refused(service.cancel_stream("a", second.record.id))).code == "not_found"


@in_loop
async def test_all_tokens_have_so_many_places(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tokens": ("a", "b", "c"), "max_streams": 2, "stream_ahead": 1.0}
    async with serving(tmp_path, StreamBackend(), **settings) as (service, _):
        for owner in ("a", "b"):
            await begun(service, owner)
        assert (await refused(begun(service, "c"))).code == "too_many_streams"


@in_loop
async def test_a_worker_that_ends_costs_no_block(tmp_path: Path) -> None:
    backend = StreamBackend()
    async with serving(tmp_path, backend) as (service, _):
        backend.failures = [CRASHED]
        stream = await begun(service, blocks=3)
        await ended(stream)
        assert (stream.record.state, stream.record.restarts) == ("finished", 1)
        assert [number for _, number, _ in backend.asked] == [1, 1, 2, 3]
        # twice at one block is too often
        backend.failures = [CRASHED, CRASHED]
        stream = await begun(service, blocks=3)
        await ended(stream)
        assert stream.record.state == "failed" and stream.record.error is not None
        assert stream.record.error["code"] == "worker_crashed"
        assert "2 times while it made block 1" in stream.record.error["message"]
        backend.failures = [FULL]
        stream = await begun(service, blocks=3)
        await ended(stream)
        assert stream.record.error is not None and stream.record.error["code"] == "disk_full"


@in_loop
async def test_a_killed_service_goes_on(tmp_path: Path) -> None:
    service = await started(tmp_path, StreamBackend(), stream_ahead=1.0)
    stream = await begun(service)
    done = await begun(service, blocks=2, seed=5)
    await ended(done)
    await until(stream, lambda: stream.waits_for == "reader")
    await service.stream_prompt("", stream.record.id, "another ball")
    assert stream.task is not None
    stream.task.cancel()
    await abandon(service)
    # what a kill in the middle of a fragment leaves
    with video_path(stream_folder(service.store, stream.record.id)).open("ab") as file:
        file.write(b"\0\0\0\x08moof\0\0")
    (tmp_path / "streams" / "stray").mkdir()
    (tmp_path / "streams" / "stray" / "record.json").write_text("{")
    backend = StreamBackend()
    async with serving(tmp_path, backend, stream_ahead=1.0) as (service, _):
        assert (tmp_path / "set-aside" / "stray").is_dir()
        again = service.streams.find("", stream.record.id)
        await until(again, lambda: again.waits_for == "reader")
        assert (again.num_blocks, again.record.restarts) == (stream.num_blocks, 1)
        assert again.codec == "avc1.64001f"
        old = service.streams.find("", done.record.id)
        assert old.record == done.record and old.num_blocks == 2
        assert [one.record.id for one in service.streams.listed("", **ALL).items] == [
            stream.record.id,
            done.record.id,
        ]
        (path,) = [service.store.streams / done.record.id / "video.mp4"]
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        assert (await refused(read(service, old))).code == "damaged"


ALL: dict[str, Any] = {"limit": 9, "after": None, "is_newest_first": False}


@in_loop
async def test_a_service_that_stops_ends_no_stream(tmp_path: Path) -> None:
    backend = StreamBackend()
    async with serving(tmp_path, backend) as (service, _):
        stream = await begun(service, blocks=5)
        backend.go.clear()
        parts = await service.stream_video("", stream.record.id, 1, None, 10.0)
        reader = asyncio.ensure_future(_all(parts))
        await asyncio.sleep(0)
        await service.stop()
        await asyncio.wait_for(reader, PATIENCE)
    (record,) = read_records(service.store)
    assert record.state == "running"
    async with serving(tmp_path, StreamBackend()) as (service, _):
        again = service.streams.find("", stream.record.id)
        await ended(again)
        assert (again.record.state, again.num_blocks) == ("finished", 5)


async def _all(parts: Any) -> bytes:
    return b"".join([part async for part in parts])


@in_loop
async def test_retention_is_of_streams_too(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"keep_bytes": 6_000}
    async with serving(tmp_path, StreamBackend(size=2_000), **settings) as (service, _):
        streams = []
        for _ in range(3):
            streams.append(await begun(service, blocks=1))
            await ended(streams[-1])
        due = await service._database.read(
            lambda db: expired(db, service.config, service.streams.ended_records())
        )
        assert due == [("", streams[0].record.id)]
        parts = await service.stream_video("", streams[0].record.id, None, None, 10.0)
        await anext(parts)
        # one that is being read stays
        assert await service._retention.sweep() == [streams[1].record.id]
        await parts.aclose()


@in_loop
async def test_metrics_of_streams(tmp_path: Path) -> None:
    metrics = Metrics(queue_capacity=1, store=tmp_path)
    async with serving(tmp_path, StreamBackend(), metrics) as (service, _):
        stream = await begun(service, blocks=2)
        await ended(stream)
    said = metrics.render().decode()
    assert "mv2v_streams_live 0.0" in said
    assert 'mv2v_streams_total{code="",outcome="finished"} 1.0' in said
    assert f"mv2v_stream_frames_total {2 * BLOCK_FRAMES - 3}.0" in said
    assert "mv2v_stream_block_seconds_count 2.0" in said


def test_a_reader_that_stops_reading_takes_no_memory(
    serving: Callable[..., Any], tmp_path: Path
) -> None:
    """Neither does it hold up another one, nor the stream beyond its seconds ahead."""
    size = 4 << 20
    ahead = 8 * BLOCK_FRAMES / FPS
    backend = StreamBackend(size)
    with serving(tmp_path, backend, stream_ahead=ahead) as live, live.client() as client:
        path = f"/v1/streams/{_begun(client)}"
        host, port = live.address.removeprefix("http://").split(":")
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect((host, int(port)))
            slow.sendall(f"GET {path}/video?first=1 HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert slow.recv(12) == b"HTTP/1.1 200"
            now = _waiting(client, path)
            assert now["readers"] == 1 and now["blocks"] <= 10
            _until(lambda: _buffered(live) > 0)
            for _ in range(20):  # a chunk, and what the transport holds before it asks to wait
                assert _buffered(live) < 1 << 20
                time.sleep(0.01)
            with client.stream("GET", f"{path}/video?first=1&last=12") as fast:
                taken = sum(len(part) for part in fast.iter_raw())
            assert taken > 12 * size
            later = _waiting(client, path)
            assert later["blocks"] > 12 and later["readers"] == 1
        _until(lambda: not client.get(path).json()["readers"])
        assert client.delete(path).status_code == 204


def _buffered(live: Any) -> int:
    """Bytes that the service holds for clients that do not take them."""
    connections = list(live.server.server_state.connections)
    return sum(one.transport.get_write_buffer_size() for one in connections)


def _until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _begun(client: httpx.Client) -> str:
    answer = client.post(
        "/v1/streams",
        content=json.dumps({"prompt": "a ball"}),
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def _waiting(client: httpx.Client, path: str) -> dict[str, Any]:
    """Its status once it waits for a reader."""
    _until(lambda: client.get(path).json()["waits_for"] == "reader")
    return dict(client.get(path).json())
