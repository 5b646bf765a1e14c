"""The command: its options, its end, and a session made by the engine behind it."""

from __future__ import annotations

import argparse
import importlib.util
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from http_service import finished_job, new_session, served

from mv2v_engine import run
from mv2v_engine.errors import RequestError
from mv2v_engine.parser import Parser
from mv2v_engine.serving.command import add_serve, cluster_config, serving_config
from mv2v_engine.serving.config import Cluster, ServingConfig
from mv2v_engine.serving.server import bound_socket
from mv2v_engine.serving.store.folders import Store
from mv2v_engine.video.io import probe_video
from tests.serving.conftest import until

Events = Callable[..., list[tuple[int, str, dict[str, Any]]]]


def parsed(*words: str) -> argparse.Namespace:
    parser = Parser()
    add_serve(parser)
    return parser.parse_args(words)


def test_options_become_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert serving_config(parsed("--store", "s")) == ServingConfig(store=Path("s"))
    tokens = tmp_path / "tokens"
    tokens.write_text("# of the team\n  ada-1815 # for Ada\n\ntwo\n")
    words = ["--store", "s", "--host", "0.0.0.0", "--tokens", str(tokens)]
    words += ["--max-upload", "1MiB", "--max-frames", "9", "--cors-origin", "https://a.example"]
    config = serving_config(parsed(*words, "--keep-days", "2", "--fov-radius", "3"))
    assert config.tokens == ("ada-1815", "two")
    assert (config.limits.upload_bytes, config.limits.frames) == (1 << 20, 9)
    assert (config.keep_days, config.engine.fov_radius) == (2, 3)
    found = serving_config(parsed("--store", "s", "--descriptor", "dino", "--stall-seconds", "0"))
    assert (found.engine.descriptor, found.stall_seconds) == (Path("dino"), None)
    assert found.in_cluster().engine.descriptor == Path("dino").absolute()
    assert config.cors_origins == ("https://a.example",)
    # what is printed of it names no token
    assert "ada-1815" not in repr(config)
    assert cluster_config(parsed("--store", "s")) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    words = ["--store", "s", "--workers", "ray", "--ray-address", "auto"]
    assert cluster_config(parsed(*words)) == Cluster(address="auto")
    found = cluster_config(parsed(*words, "--replicas", "3", "--gpus-per-replica", "0.5"))
    assert found == Cluster(address="auto", replicas=3, gpus=0.5)
    assert [Cluster().num_gpus(device) for device in (None, "cpu", "cuda:0")] == [0, 0, 1]
    monkeypatch.setenv("MV2V_TOKENS", "three, four")
    assert serving_config(parsed("--store", "s")).tokens == ("three", "four")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "--no-auth"),
        (["--port", "70000"], "--port must lie in 0..65535, got 70000"),
        (["--tokens", "/nowhere/tokens"], "cannot read tokens"),
        (["--max-queue", "0"], "--max-queue must be at least 1, got 0"),
        (["--checkpoint", "tiny-nothing"], "tiny-nothing"),
        (["--replicas", "2", "--ray-address", "auto"], "add --workers ray"),
        (["--workers", "ray"], "needs --replicas"),
        (["--batch-tokens", "0"], "--batch-tokens must be at least 1, got 0"),
        (["--batch-tokens", "9", "--checkpoint", "tiny-edit"], "edits are made one after"),
        (
            ["--batch-tokens", "9", "--workers", "ray", "--replicas", "1"],
            "--batch-tokens out",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run.main(["serve", "--store", str(tmp_path / "store"), *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("library", "extra", "words"),
    [("uvicorn", "serve", ()), ("ray", "distributed", ("--workers", "ray", "--replicas", "2"))],
)
def test_without_its_libraries_it_says_what_to_install(
    library: str,
    extra: str,
    words: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == library else find(name)
    )
    assert run.main(["serve", "--store", str(tmp_path), *words]) == 2
    said = capsys.readouterr().err
    assert f"needs {library}" in said and f"pip install 'mv2v_engine[{extra}]'" in said


def test_an_address_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(RequestError, match="another --port"):
            bound_socket("127.0.0.1", other.getsockname()[1])
    with pytest.raises(RequestError, match="cannot listen on"):
        bound_socket("host.invalid", 0)


def test_a_service_that_ends_answers_until_its_turn_is_made(
    serving: Callable[..., Any],
    upload: Callable[..., Any],
    tmp_path: Path,
    events_of: Events,
) -> None:
    with serving(tmp_path / "store") as service, service.client() as client:
        session = upload(client)["id"]
        path = f"/v1/sessions/{session}/turns"
        service.backend.hold()
        job = client.post(path, json={"camera": "pan:5"}).json()["id"]
        with client.stream("GET", f"/v1/jobs/{job}/events") as answer:
            lines = answer.iter_lines()
            next(line for line in lines if line == "event: started")
            service.drain()
            with service.client() as other:
                until(lambda: other.get("/readyz").status_code != 200)
                assert other.get("/readyz").json()["reason"] == "the service is stopping"
                assert other.post(path, json={"camera": "pan:6"}).status_code == 503
                assert other.get(f"/v1/jobs/{job}").json()["state"] == "running"
                service.backend.let_go()
            # the reader still hears the end
            assert "event: finished" in list(lines)
        service.thread.join(600)
        assert not service.thread.is_alive()
    # the next one on the same store has it
    with serving(tmp_path / "store") as service, service.client() as client:
        assert client.get(f"/v1/jobs/{job}").json()["state"] == "finished"
        assert client.get(f"{path}/1/video").status_code == 200


@pytest.mark.slow
def test_the_command_makes_turns_and_ends_cleanly(
    tmp_path: Path, tiny_checkpoint: Path, source_clip: Path
) -> None:
    words = ("--device", "cpu", "--min-free", "0", "--checkpoint", str(tiny_checkpoint))
    with served(tmp_path, *words) as service, service.client() as client:
        session = new_session(client, source_clip.read_bytes())
        for camera in ("pan_right", "arc:-30"):
            finished_job(client, session, camera=camera, num_inference_steps=2)
        path = f"/v1/sessions/{session}/turns"
        first, second = client.get(path).json()["data"]
        assert first["report"]["memory"]["retrieved"] == []
        assert [row["turn"] for row in second["report"]["memory"]["retrieved"]] == [1]
        result = tmp_path / "turn.mp4"
        result.write_bytes(client.get(f"{path}/2/video").content)
        assert probe_video(result).num_frames == 9
        assert client.get(f"{path}/2/thumbnail").content.startswith(b"\xff\xd8")
        counted = client.get("/metrics").text
        assert 'mv2v_jobs_total{code="",outcome="finished"} 2.0' in counted
        branch = client.post(f"/v1/sessions/{session}/branches", json={"turn": 1}).json()["id"]
        assert finished_job(client, branch, camera="tilt_up", num_inference_steps=1)
        assert len(client.get(f"/v1/sessions/{branch}/turns").json()["data"]) == 2
    assert (service.exit_code, service.faults()) == (0, 0), service.log.read_text()


def test_settings_that_no_try_can_meet_end_it(tmp_path: Path) -> None:
    words = ["serve", "--store", str(tmp_path / "store"), "--port", "0", "--quantize-text", "int8"]
    ended = subprocess.run(
        [sys.executable, "-m", "mv2v_engine.run", *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 2 and ended.stdout.startswith("listening on http://")
    (line,) = [each for each in ended.stderr.splitlines() if each.startswith("error")]
    assert "tiny-nvs has no text encoder, got --quantize-text int8; leave it out" in line
    assert "Traceback" not in ended.stderr
    # the store is free again, and another try is not refused for its sake
    assert Store(tmp_path / "store").lock() is None
