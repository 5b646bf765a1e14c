"""Cameras over HTTP: what a command line takes, out of the request alone."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from mv2v_engine.camera.trajectories import named_poses
from mv2v_engine.serving.work.turn_request import kept_request, make_request
from tests.camera import written
from tests.serving.test_routes import Events, Upload, finished_turn, refused

FRAMES = 9
SIZE = (48, 64)


def sent(file: Path, options: str = "") -> dict[str, Any]:
    """A file as a request has it: text as text, other bytes as base64."""
    data = file.read_bytes()
    try:
        content: Any = data.decode()
    except UnicodeDecodeError:
        content = {"base64": base64.b64encode(data).decode()}
    return {"spec": file.name + options, "files": {file.name: content}}


def test_files_of_every_format(
    client: httpx.Client, upload: Upload, tmp_path: Path, in_words: Callable[[Any], Any]
) -> None:
    place = f"/v1/sessions/{upload(client, 'clip.mp4')['id']}/turns"
    poses = written.path(FRAMES)
    for kind, (name, write) in written.WRITERS.items():
        answer = client.post(place, json={"camera": sent(write(tmp_path / name, poses))})
        assert answer.status_code == 202, (kind, answer.text)
        job = answer.json()
        camera = job["request"]["camera"]
        # the path is kept, the file is not
        assert "files" not in camera and camera["name"] == name
        np.testing.assert_allclose(camera["poses"], poses[:, :3], atol=2e-6, err_msg=kind)
        assert (
            job["warnings"][0].startswith("it was read as ") and job["warnings"] == camera["notes"]
        )
        in_words(job)


@pytest.fixture
def in_words(client: httpx.Client, events_of: Events) -> Callable[[Any], Any]:
    """Waits for a job's end."""

    def wait(job: Any) -> Any:
        events_of(client, job["id"])
        found = client.get(f"/v1/jobs/{job['id']}").json()
        assert found["state"] == "finished", found
        return found

    return wait


def test_options_and_what_they_changed(
    client: httpx.Client, upload: Upload, events_of: Events, tmp_path: Path
) -> None:
    session = upload(client, "clip.mp4")["id"]
    poses = written.path(33)
    poses[:, :3, 3] *= 100
    world = np.eye(4)
    world[:3, :3], world[:3, 3] = written.turned((0, 1, 0), 140), (3000.0, 0, 2000.0)
    file = written.nerf(tmp_path / "t.json", world @ poses, w=64, h=48, fl_x=60)
    content = json.loads(file.read_text())
    camera = {"spec": "t.json?relative&scale=0.01&resample", "files": {"t.json": content}}
    key = {"Idempotency-Key": "once"}
    place = f"/v1/sessions/{session}/turns"
    answers = [client.post(place, json={"camera": camera}, headers=key) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [202, 200]
    job = answers[0].json()
    assert job["id"] == answers[1].json()["id"]
    words = " ".join(job["warnings"])
    for changed in ("NeRF's transforms", "multiplied by 0.01", "relative to its first", "33 poses"):
        assert changed in words
    np.testing.assert_allclose(
        job["request"]["camera"]["poses"], written.path(33)[::4, :3], atol=1e-4
    )
    events_of(client, job["id"])
    # and as OpenAI's clients see it
    assert client.get(f"/v1/videos/{job['id']}").json()["warnings"][-4:] == job["warnings"][-4:]
    finished_turn(client, session, events_of, camera="pan:30+tilt:10")


REFUSED: tuple[tuple[Any, str], ...] = (
    ({"spec": "a.txt", "files": {"b.txt": ""}}, "no file 'a.txt' among the files given: b.txt"),
    ({"spec": "/etc/passwd", "files": {"b.txt": ""}}, "among the files given"),
    ({"spec": "a.txt", "files": {"a.txt": ""}}, "a.txt is empty"),
    ({"spec": "a.npy", "files": {"a.npy": {"base64": "?"}}}, "a.npy is no base64"),
    ({"spec": "a.npy", "files": {"a.npy": {"base64": 3}}}, "a.npy is no base64"),
    ({"spec": "a.json?relativ", "files": {"a.json": []}}, "nearest: relative"),
    (
        {"spec": "a.json", "files": {"a.json": [np.eye(4).tolist()]}},
        "a.json has 1 pose, the video has 9 frames",
    ),
)


def test_files_that_are_no_camera(client: httpx.Client, upload: Upload) -> None:
    place = f"/v1/sessions/{upload(client, 'clip.mp4')['id']}/turns"
    for camera, words in REFUSED:
        answer = client.post(place, json={"camera": camera})
        assert words in refused(answer, 422, "unprocessable_turn", "camera")


MISSHAPEN: tuple[tuple[Any, str, str], ...] = (
    ({"files": {"a": ""}}, "camera.spec", "camera.spec is missing"),
    ({"spec": "a"}, "camera.files", "camera.files is missing"),
    ({"spec": "a", "files": {}}, "camera.files", "at least 1 item"),
    ({"spec": "a", "files": {str(i): "" for i in range(5)}}, "camera.files", "at most 4 items"),
    ({"spec": "a" * 1001, "files": {"a": ""}}, "camera.spec", "at most 1000 characters"),
    ({"spec": "a", "files": {"a": 3}}, "camera.files.a", "must be text or an object or a list"),
    ({"spec": "a", "files": []}, "camera.files", "must be an object, got a list"),
    ({"spec": "a", "files": {"a": ""}, "poses": []}, "camera.poses", "no field 'camera.poses'"),
    ({"spec": "a", "files": {"a": ""}, "notes": []}, "camera.notes", "no field 'camera.notes'"),
)


def test_misshapen_files(client: httpx.Client, upload: Upload) -> None:
    place = f"/v1/sessions/{upload(client, 'clip.mp4')['id']}/turns"
    for camera, param, words in MISSHAPEN:
        message = refused(
            client.post(place, json={"camera": camera}), 422, "invalid_request", param
        )
        assert words in message and "Files" not in message and "Trajectory" not in message


def test_a_trajectory_that_looks_wrong(
    client: httpx.Client, upload: Upload, events_of: Events
) -> None:
    session = upload(client, "clip.mp4")["id"]
    poses = written.path(FRAMES)
    poses[:, 2, 3] += 36
    camera = {"format": "mv2v-camera", "version": 1, "size": SIZE, "poses": poses[:, :3].tolist()}
    place = f"/v1/sessions/{session}/turns"
    message = refused(
        client.post(place, json={"camera": camera}), 422, "unprocessable_turn", "camera"
    )
    assert "its first pose lies 36 metres" in message and '"spec": "a.json?relative"' in message
    asked = {"spec": "a.json?unchecked", "files": {"a.json": camera}}
    job = finished_turn(client, session, events_of, camera=asked)
    assert job["warnings"][-1] == "whether it is plausible was not checked, as asked"


def test_what_is_kept_makes_the_same_camera(tmp_path: Path) -> None:
    """The worker makes its turn from what the door has read, to the bit."""
    sampling = {"num_frames": FRAMES, "size": list(SIZE), "fps": 8.0}
    about = {
        "engine": {"checkpoint": "tiny"},
        "kind": "views",
        "memory": "none",
        "has_text": False,
        "sampling": sampling | {"num_inference_steps": 2, "guidance_scale": 1.0, "flow_shift": 5.0},
    }
    poses = written.path(FRAMES)
    poses[:, 2, 3] += 36
    file = written.realestate(tmp_path / "r.txt", poses, (0.9, 1.2, 0.5, 0.5, 0, 0))
    asked = {"camera": sent(file, "?unchecked"), "seed": 3}
    made = make_request(asked, about)
    kept = json.loads(json.dumps(kept_request(asked, made)))
    again = make_request(kept, about)
    assert made.camera.poses.equal(again.camera.poses)  # type: ignore[union-attr]
    assert made.camera.intrinsics.equal(again.camera.intrinsics)  # type: ignore[union-attr]
    assert made.camera.name == again.camera.name == "r.txt?unchecked"  # type: ignore[union-attr]
    assert made.camera.notes == again.camera.notes  # type: ignore[union-attr]
    plain = {"camera": {"poses": named_poses("pan_right", FRAMES).tolist()}}
    assert kept_request(plain, make_request(plain, about)) is plain
