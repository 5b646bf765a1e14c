"""Streams over HTTP, by a small causal model in a worker: read, told, limited, killed, resumed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import httpx
import pytest

from mv2v_engine import Engine
from mv2v_engine.serving.work.streaming import NOTHING
from mv2v_engine.video.fragments import FragmentWriter
from tests.serving.conftest import until

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

PATIENCE = 300.0
FPS = 16.0


@pytest.fixture(scope="module")
def live(
    serving_engine: Callable[..., Any],
    causal_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    store = tmp_path_factory.mktemp("store")
    with serving_engine(store, checkpoint=str(causal_folder), stream_ahead=2.0) as service:
        ready(service)
        yield service


def ready(service: Any) -> None:
    until(lambda: service.backend.ready or service.backend.is_lost)
    assert service.backend.ready, service.backend.reason


def begun(client: httpx.Client, **request: Any) -> dict[str, Any]:
    answer = client.post("/v1/streams", json={"prompt": "a red ball", **request})
    assert answer.status_code == 201, answer.text
    stream: dict[str, Any] = answer.json()
    return stream


def status(client: httpx.Client, stream: dict[str, Any]) -> dict[str, Any]:
    answer = client.get(f"/v1/streams/{stream['id']}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def ended(client: httpx.Client, stream: dict[str, Any]) -> dict[str, Any]:
    return until(lambda: (now := status(client, stream))["state"] != "running" and now)


def video(client: httpx.Client, stream: dict[str, Any], **params: int) -> bytes:
    answer = client.get(f"/v1/streams/{stream['id']}/video", params=params)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "video/mp4"
    return answer.content


def frames_of(data: bytes) -> list[float]:
    """When each frame of a video is shown, in seconds."""
    with av.open(BytesIO(data)) as file:
        return [float(frame.time) for frame in file.decode(video=0)]


def expected(checkpoint: Path, prompts: list[str], seed: int = 0) -> bytes:
    """The video that the engine makes by itself, a prompt for each block."""
    engine, made = Engine.from_pretrained(checkpoint, device="cpu"), BytesIO()
    writer = FragmentWriter(made, engine.sampling.fps)
    with engine.stream(prompts[0], seed=seed) as stream:
        for prompt in prompts:
            stream.prompt = prompt
            writer.add(next(stream.blocks(stream.num_blocks + 1)).frames)
    return made.getvalue()


def test_a_stream_is_the_engines_and_plays_while_it_grows(
    client: httpx.Client, causal_folder: Path
) -> None:
    stream = begun(client, seed=3, blocks=3)
    assert (stream["state"], stream["num_blocks"]) == ("running", 3)
    whole = video(client, stream, first=1)  # read from the first block on while it is made
    assert whole == expected(causal_folder, ["a red ball"] * 3, seed=3)
    times = frames_of(whole)
    assert times == pytest.approx([n / FPS for n in range(5 + 8 + 8)])
    now = ended(client, stream)
    assert (now["state"], now["error"], now["blocks"], now["frames"]) == ("finished", None, 3, 21)
    assert now["codec"].startswith("avc1.") and now["bytes"] > len(whole)
    latency = now["latency"]
    assert 0 < latency["engine_seconds_median"] <= latency["block_seconds_median"]
    assert latency["block_seconds_median"] <= latency["block_seconds_p99"]
    assert latency["frames_per_second"] > 0 and latency["first_frame_seconds"] > 0
    # a part of it: what a player needs, then the blocks that were asked for
    middle = video(client, stream, first=2, last=2)
    assert frames_of(middle) == pytest.approx([n / FPS for n in range(5, 13)])
    assert video(client, stream) == whole
    assert client.get(f"/v1/streams/{stream['id']}/video?first=3&last=2").status_code == 422


def test_a_prompt_holds_from_the_next_block_on(client: httpx.Client, causal_folder: Path) -> None:
    stream = begun(client)
    until(lambda: status(client, stream)["waits_for"] == "reader")
    made = status(client, stream)["blocks"]
    answer = client.post(f"/v1/streams/{stream['id']}/prompt", json={"prompt": "a blue box"})
    assert answer.json()["first_block"] == made + 1
    data = video(client, stream, first=1, last=made + 2)
    prompts = ["a red ball"] * made + ["a blue box"] * 2
    assert data == expected(causal_folder, prompts)
    refused = client.post(f"/v1/streams/{stream['id']}/prompt", json={"prompt": "a word " * 99})
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "unprocessable_turn")
    now = client.post(f"/v1/streams/{stream['id']}/cancel").json()
    assert (now["state"], now["error"]["code"]) == ("cancelled", "cancelled")
    again = client.post(f"/v1/streams/{stream['id']}/prompt", json={"prompt": "a green cup"})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "busy")


def test_a_later_reader_begins_with_the_newest_block(client: httpx.Client) -> None:
    stream = begun(client)
    until(lambda: status(client, stream)["waits_for"] == "reader")
    now = status(client, stream)
    # two seconds of video and what completes the block
    assert 2.0 <= now["seconds"] < 2.0 + 8 / FPS
    with client.stream("GET", f"/v1/streams/{stream['id']}/video") as answer:
        chunks = answer.iter_raw()
        data = next(chunks)
        while data.count(b"moof") < 2:
            data += next(chunks)
    assert frames_of(data[: data.rindex(b"moof") - 4])[0] == pytest.approx(
        (now["frames"] - 8) / FPS
    )
    # a reader that has read lets it go on; one that leaves does not end it
    until(lambda: status(client, stream)["blocks"] > now["blocks"])
    until(lambda: status(client, stream)["readers"] == 0)
    assert status(client, stream)["state"] == "running"
    assert client.delete(f"/v1/streams/{stream['id']}").status_code == 204
    assert client.get(f"/v1/streams/{stream['id']}").status_code == 404


def test_what_is_refused(client: httpx.Client, live: Any, source_clip: Path) -> None:
    for request, code in (
        ({"prompt": "a word " * 99}, "unprocessable_turn"),
        ({"policy": "all"}, "unprocessable_turn"),
        ({"policy": "history"}, "unprocessable_turn"),
        ({"blocks": 2, "frames": 3}, "invalid_request"),
        ({"blocks": 0}, "invalid_request"),
        ({"colour": "red"}, "invalid_request"),
        ({"policy": "none"}, "invalid_request"),
    ):
        answer = client.post("/v1/streams", json={"prompt": "a red ball", **request})
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, code), answer.text
    upload = {"video": source_clip.read_bytes()}
    answer = client.post("/v1/sessions", files=upload)
    assert answer.status_code == 422 and "/v1/streams" in answer.json()["error"]["message"]
    assert not [one for one in client.get("/v1/streams").json()["data"] if one["blocks"] == 0]


def test_a_key_begins_one_stream(client: httpx.Client) -> None:
    headers = {"Idempotency-Key": "once"}
    asked = {"prompt": "a red ball", "blocks": 1}
    first = client.post("/v1/streams", json=asked, headers=headers)
    again = client.post("/v1/streams", json=asked, headers=headers)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["id"] == again.json()["id"]
    other = client.post("/v1/streams", json=asked | {"seed": 1}, headers=headers)
    assert other.json()["error"]["code"] == "idempotency_conflict"
    # others follow in the list
    ids = [one["id"] for one in client.get("/v1/streams?limit=100").json()["data"]]
    assert ids[0] == first.json()["id"]
    page = client.get("/v1/streams", params={"after": ids[0], "limit": 1}).json()
    assert [one["id"] for one in page["data"]] == ids[1:2]


def test_a_killed_worker_costs_no_bit(live: Any, client: httpx.Client, causal_folder: Path) -> None:
    """Killed twice, wherever it was; who reads waits and gets every block once."""
    blocks = 8
    stream = begun(client, seed=9, blocks=blocks)
    reading: list[bytes] = []
    reader = threading.Thread(target=lambda: reading.append(_read_all(live, stream)))
    reader.start()
    for number in (2, 5):
        # a reader of a block waits for it
        assert video(client, stream, first=number, last=number)
        os.kill(live.backend.pid, signal.SIGKILL)
        until(lambda: not live.backend.ready)
    reader.join(PATIENCE)
    now = ended(client, stream)
    assert (now["state"], now["blocks"]) == ("finished", blocks)
    whole = expected(causal_folder, ["a red ball"] * blocks, seed=9)
    assert video(client, stream) == whole
    # a worker may take so long to start that the connection has to be kept
    assert reading[0].replace(NOTHING, b"") == whole


def _read_all(live: Any, stream: dict[str, Any]) -> bytes:
    with live.client() as client:
        return video(client, stream, first=1)
