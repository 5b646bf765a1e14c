"""Every number of a request has a range, and what is beyond it is one refusal at the door."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

Upload = Callable[..., dict[str, Any]]
JSON = {"Content-Type": "application/json"}
STILL = [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]


def trajectory(far: str) -> str:
    """A camera whose last pose is that far away."""
    camera = {"format": "mv2v-camera", "version": 1, "size": [48, 64], "poses": [STILL] * 9}
    before, _, after = json.dumps({"camera": camera}).rpartition("0.0")
    return before + far + after


def one(field: str, value: str) -> str:
    return f'{{"camera": "pan_right", "{field}": {value}}}'


TURNS = {
    "guidance above its range": one("guidance_scale", "100.5"),
    "guidance NaN": one("guidance_scale", "NaN"),
    "guidance infinite": one("guidance_scale", "-Infinity"),
    "guidance beyond floats": one("guidance_scale", "1e999"),
    "guidance negative": one("guidance_scale", "-1"),
    "steps no integer": one("num_inference_steps", "1e300"),
    "a move beyond floats": '{"camera": "zoom:%s"}' % ("9" * 80),
    "a move out of the world": '{"camera": "zoom:1e9"}',
    "a pose beyond floats": trajectory("1e999"),
    "a pose out of the world": trajectory("1e9"),
    "a pose NaN": trajectory("NaN"),
    "brackets within brackets": '{"camera": ' + "[" * 900 + "]" * 900 + "}",
}


@pytest.mark.parametrize("body", TURNS.values(), ids=TURNS.keys())
def test_turns(client: httpx.Client, upload: Upload, body: str) -> None:
    session = upload(client)["id"]
    answer = client.post(f"/v1/sessions/{session}/turns", content=body, headers=JSON)
    assert answer.status_code in (400, 422), answer.text
    assert answer.json()["error"]["code"] in (
        *("malformed_request", "invalid_request"),
        "unprocessable_turn",
    )
    assert client.get("/v1/jobs", params={"session": session}).json()["data"] == []


@pytest.mark.parametrize("number", ["-1", "1e3", str(2**63), "9" * 5000, "NaN"])
def test_numbers_elsewhere(client: httpx.Client, upload: Upload, number: str) -> None:
    session = upload(client)["id"]
    path = f"/v1/sessions/{session}"
    answers = [
        client.post(f"{path}/branches", content=f'{{"turn": {number}}}', headers=JSON),
        client.get(f"{path}/turns/{number}"),
        client.get("/v1/jobs", params={"limit": number}),
        client.get("/v1/videos", params={"limit": number}),
    ]
    assert {answer.status_code for answer in answers} <= {400, 404, 422}
    assert client.get("/healthz").status_code == 200
