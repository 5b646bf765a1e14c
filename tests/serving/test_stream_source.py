"""Frames that go up to a stream: by a body without an end or a WebSocket, no faster than it edits.

The model is a double, but in the last test: `Negatives`, which is given the frames as an engine
would be.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from torch import Tensor

from mv2v_engine import Engine
from mv2v_engine.engine.stream_folder import StreamFolder
from mv2v_engine.video.fragments import FragmentWriter

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

from starlette.websockets import WebSocket
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from mv2v_engine.serving.config import Limits
from mv2v_engine.serving.errors import ApiError
from mv2v_engine.serving.http.bodies import BodyLimit
from mv2v_engine.serving.http.routes.streams import source_socket
from mv2v_engine.serving.store.source_frames import MOST_BLOCKS, SourceFrames
from mv2v_engine.serving.store.streams import engine_folder
from mv2v_engine.serving.work.streaming import NOTHING, Stream
from mv2v_engine.serving.work.uploading import SourceUpload
from tests.serving.conftest import until
from tests.serving.fake_streams import BLOCK_FRAMES, Negatives, StreamBackend, stream_record

FRAME = 48 * 64 * 3
# frames of the first block, and of three
FIRST, THREE = BLOCK_FRAMES - 3, 3 * BLOCK_FRAMES - 3
PATIENCE = 300.0


@pytest.fixture
def backend() -> Negatives:
    return Negatives()


@pytest.fixture
def live(serving: Callable[..., Any], tmp_path: Path, backend: Negatives) -> Iterator[Any]:
    with serving(tmp_path, backend) as service:
        yield service


def begun(client: httpx.Client) -> str:
    answer = client.post("/v1/streams", json={"prompt": "a negative"})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def status(client: httpx.Client, stream: str) -> dict[str, Any]:
    return dict(client.get(f"/v1/streams/{stream}").json())


def pieces(data: bytes) -> Iterator[bytes]:
    """The same bytes in odd parts: frames begin and end anywhere in them."""
    random.seed(0)
    while data:
        size = random.randint(1, 3 * FRAME)
        yield data[:size]
        data = data[size:]


def test_a_body_of_frames_is_edited_block_by_block(
    client: httpx.Client, backend: Negatives, tmp_path: Path
) -> None:
    stream, data = begun(client), random.Random(1).randbytes(THREE * FRAME + 99)
    path = f"/v1/streams/{stream}/source"
    assert until(lambda: status(client, stream)["waits_for"]) == "source"
    half = data[: FIRST * FRAME]
    assert client.put(path, content=pieces(half)).status_code == 200
    until(lambda: status(client, stream)["blocks"] == 1)
    rest = pieces(data[len(half) :])
    assert client.put(path, content=rest, params={"end": "true"}).status_code == 200
    now = until(lambda: (s := status(client, stream))["state"] != "running" and s)
    # what fills no block is left out
    assert (now["state"], now["error"], now["frames"]) == ("finished", None, THREE)
    assert backend.given[stream] == data[: THREE * FRAME]
    assert [one.name for one in (tmp_path / "streams" / stream / "source").iterdir()] == ["end"]
    again = client.put(path, content=b"more")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "busy")
    typed = client.put(path, content=b"x", headers={"Content-Type": "video/mp4"})
    assert typed.status_code == 415 and "rawvideo" in typed.json()["error"]["message"]


def test_who_sends_faster_than_the_model_is_slowed(
    client: httpx.Client, live: Any, backend: Negatives, tmp_path: Path, monkeypatch: Any
) -> None:
    # frames are taken and no video is encoded: so many would take long
    monkeypatch.setattr(Negatives, "write", StreamBackend.write)
    stream, count, sent = begun(client), 200 * BLOCK_FRAMES - 3, 0
    until(lambda: status(client, stream)["waits_for"] == "source")
    backend.hold()
    frame = bytes(FRAME) * 16

    def frames() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(0, count, 16):
            yield frame
            sent += 16

    def send() -> None:
        with live.client() as other:
            other.put(f"/v1/streams/{stream}/source?end=true", content=frames())

    sender = threading.Thread(target=send)
    sender.start()
    folder = tmp_path / "streams" / stream / "source"
    until(lambda: len(list(folder.glob("block_*.rgb"))) == MOST_BLOCKS)
    before = -1
    while before != sent:  # what the system's own buffers take
        before = sent
        time.sleep(0.3)
    assert sent < count
    assert len(list(folder.glob("*.rgb"))) == MOST_BLOCKS
    with pytest.raises(InvalidStatus):  # one client at a time
        connect(address(live, stream), proxy=None).recv(PATIENCE)
    backend.let_go()
    sender.join(PATIENCE)
    assert not sender.is_alive()
    now = until(lambda: (s := status(client, stream))["state"] != "running" and s)
    assert (now["state"], now["frames"]) == ("finished", count)


def address(live: Any, stream: str) -> str:
    return f"{live.address.replace('http', 'ws', 1)}/v1/streams/{stream}/source"


def test_a_socket_takes_the_same_bytes(client: httpx.Client, live: Any, backend: Negatives) -> None:
    stream, data = begun(client), random.Random(2).randbytes(THREE * FRAME)
    with connect(address(live, stream), subprotocols=["mv2v"], proxy=None) as socket:  # type: ignore[list-item]
        assert socket.subprotocol == "mv2v"
        for at in range(0, len(data), FRAME):
            socket.send(data[at : at + FRAME])
        until(lambda: status(client, stream)["blocks"] == 3)
        socket.send("end")
        with pytest.raises(ConnectionClosed):
            socket.recv(PATIENCE)
    now = until(lambda: (s := status(client, stream))["state"] != "running" and s)
    assert (now["state"], backend.given[stream]) == ("finished", data)
    # the places that sockets have taken are given back
    places = live.server.server_state.connections
    until(lambda: len(places) <= 1)


def test_a_text_is_no_frame(client: httpx.Client, live: Any) -> None:
    """Frames that are sent as text would be lost; it is said."""
    with connect(address(live, begun(client)), proxy=None) as socket:  # type: ignore[arg-type]
        socket.send("AAAA")
        with pytest.raises(ConnectionClosed) as caught:
            socket.recv(PATIENCE)
    said = caught.value.rcvd
    assert said is not None and (said.code, said.reason) == (
        1003,
        "frames come in binary messages, and of texts there is end",
    )


@pytest.mark.parametrize("way", ["body", "socket"])
def test_who_sends_is_told_why_the_stream_ended(
    serving: Callable[..., Any], tmp_path: Path, way: str
) -> None:
    """A stream that nobody reads is made as far as its token's seconds go, and ends there."""
    frames = [bytes(BLOCK_FRAMES * FRAME)] * 9
    limits = Limits(stream_seconds=2.0)
    with serving(tmp_path, Negatives(), limits=limits) as live, live.client() as client:
        stream = begun(client)
        if way == "body":
            answer = client.put(f"/v1/streams/{stream}/source", content=iter(frames))
            assert answer.status_code == 409
            said = answer.json()["error"]["message"]
        else:
            opened = connect(address(live, stream), proxy=None)  # type: ignore[arg-type]
            with opened as socket, pytest.raises(ConnectionClosed) as caught:
                for frame in frames:
                    socket.send(frame)
                socket.recv(PATIENCE)
            assert caught.value.rcvd is not None
            said = caught.value.rcvd.reason
        expected = "the stream takes no more frames: the token's streams have 2 s of video"
        assert said.startswith(expected)
        now = until(lambda: (s := status(client, stream))["state"] != "running" and s)
        assert (now["state"], now["error"]["code"]) == ("finished", "stream_limit")
        # 5 and 8 and 8 frames, at 8 a second
        assert now["blocks"] == 3 and now["bytes"] > 0


def test_who_left_before_it_was_told_is_no_fault(live: Any) -> None:
    told: list[str] = []

    async def send(message: Any) -> None:
        told.append(message["type"])
        if message["type"] == "websocket.close":
            raise OSError  # as the server has it where nobody listens

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def ask() -> None:
        scope: dict[str, Any] = {"type": "websocket", "app": live.app, "subprotocols": []}
        scope |= {"state": {"owner": ""}, "path_params": {"stream_id": "stream_none"}}
        socket = WebSocket(scope, receive, send)
        await socket.accept()
        await source_socket(socket)

    asyncio.run(ask())
    assert told == ["websocket.accept", "websocket.close"]


def test_sockets_are_guarded_as_requests_are(
    serving: Callable[..., Any], live: Any, client: httpx.Client, tmp_path: Path
) -> None:
    """Who is refused at the door is told why, as over HTTP."""

    def refused(place: str, **options: Any) -> tuple[int, str]:
        with pytest.raises(InvalidStatus) as caught:
            connect(place, proxy=None, **options)  # type: ignore[arg-type]
        answer = caught.value.response
        return answer.status_code, json.loads(answer.body)["error"]["code"]

    stream = begun(client)
    elsewhere = refused(address(live, stream), origin="http://elsewhere.example")
    assert elsewhere == (403, "wrong_origin")
    assert refused(address(live, "stream_" + 24 * "0")) == (404, "not_found")
    with connect(address(live, stream), proxy=None):  # type: ignore[arg-type]
        assert refused(address(live, stream)) == (409, "busy")
    with serving(tmp_path / "other", Negatives(), tokens=("a secret",)) as closed:
        with closed.client("a secret") as known:
            stream = begun(known)
        for protocols in (None, ["mv2v", "token." + b"a guess".hex()], ["token.zz"]):
            said = refused(address(closed, stream), subprotocols=protocols)
            assert said == (401, "authentication_required")
        protocols = ["mv2v", "token." + b"a secret".hex()]
        with connect(address(closed, stream), subprotocols=protocols, proxy=None) as socket:  # type: ignore[arg-type]
            socket.send(bytes(FIRST * FRAME))
            with closed.client("a secret") as known:
                until(lambda: status(known, stream)["blocks"] == 1)


def test_an_editor_edits_what_is_sent(
    serving_engine: Callable[..., Any],
    causal_editor_folder: Path,
    moving_frames: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    """By both ways, the worker killed while it edits a block: to the bits of the engine alone."""
    frames, cuts = moving_frames(5 + 3 * 8), [0, 5 + 8, 5 + 2 * 8, 5 + 3 * 8]
    engine, made = Engine.from_pretrained(causal_editor_folder, device="cpu"), BytesIO()
    writer = FragmentWriter(made, engine.sampling.fps)
    for block in engine.stream("a negative", source=frames).blocks():
        writer.add(block.frames)
    first, second, third = (frames[a:b].numpy().tobytes() for a, b in pairwise(cuts))
    with (
        serving_engine(tmp_path, checkpoint=str(causal_editor_folder)) as live,
        live.client() as client,
    ):
        backend = live.backend
        until(lambda: backend.ready or backend.is_lost)
        assert backend.ready, backend.reason
        stream = begun(client)
        assert client.put(f"/v1/streams/{stream}/source", content=pieces(first)).status_code == 200
        # a reader waits for the block
        assert client.get(f"/v1/streams/{stream}/video?first=2&last=2").status_code == 200
        under_way = StreamFolder(engine_folder(tmp_path / "streams" / stream)).source_path(3)
        with connect(address(live, stream), proxy=None) as socket:
            socket.send(second)
            until(under_way.exists)
            os.kill(backend.pid, signal.SIGKILL)
            until(lambda: not backend.ready)
            socket.send(third)
            socket.send("end")
            whole = client.get(f"/v1/streams/{stream}/video?first=1").content
        assert whole.replace(NOTHING, b"") == made.getvalue()
        now = status(client, stream)
        assert (now["state"], now["error"], now["frames"]) == ("finished", None, len(frames))
        assert backend.restarts == 1 and now["restarts"] <= 1


@pytest.mark.parametrize("way", ["body", "socket"])
def test_frames_that_stop_coming_say_where_to_go_on(
    serving: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    idle, sent = 3.0, bytes((FIRST + 1) * FRAME)
    monkeypatch.setattr(BodyLimit.__init__, "__defaults__", (idle,))
    monkeypatch.setattr("mv2v_engine.serving.http.routes.streams._IDLE_SECONDS", idle)

    def frames() -> Iterator[bytes]:
        yield sent
        time.sleep(2 * idle)

    with serving(tmp_path, Negatives()) as live, live.client() as client:
        stream = begun(client)
        if way == "body":
            answer = client.put(f"/v1/streams/{stream}/source", content=frames())
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (408, "request_timeout")
            said = error["message"]
        else:
            opened = connect(address(live, stream), proxy=None)  # type: ignore[arg-type]
            with opened as socket, pytest.raises(ConnectionClosed) as caught:
                socket.send(sent)
                socket.recv(PATIENCE)
            assert caught.value.rcvd is not None and caught.value.rcvd.code == 1001
            said = caught.value.rcvd.reason
        assert f"go on from frame {FIRST}, counted from 0" in said
        assert said.endswith("are not kept")


def test_a_service_that_stops_says_where_to_go_on(tmp_path: Path) -> None:
    """Nothing is kept of a block that is not whole: the client is told the frame it begins with."""
    record = stream_record()
    stream = Stream(record)
    stream.source = SourceFrames(tmp_path, record)

    async def sent(upload: SourceUpload, frames: int) -> None:
        await upload.write(bytes(frames * 4 * 2 * 3))

    with SourceUpload(stream) as upload:
        asyncio.run(sent(upload, 1 + 4 + 3))
        stream.is_stopping = True
        with pytest.raises(ApiError, match=r"when it is back, go on from frame 5, counted from 0"):
            asyncio.run(sent(upload, 1))
    assert [stream.source.has(number) for number in (1, 2, 3)] == [True, True, False]
