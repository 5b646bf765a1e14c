"""The worker process by itself: what it is told, what it says, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mv2v_engine.engine.folder import SessionFolder
from mv2v_engine.locks import Lock
from mv2v_engine.serving.config import ServingConfig
from mv2v_engine.serving.store.folders import sweep_session, worker_lock
from mv2v_engine.serving.work.protocol import decode, encode, engine_arguments, setup_message

ROOT = Path(__file__).resolve().parents[2]


def test_a_setup_says_which_engine(tmp_path: Path) -> None:
    """What the service was told of a checkpoint comes through the pipe."""
    places: dict[str, Any] = {"components": tmp_path / "a", "rename": tmp_path / "b"}
    given = {"checkpoint": "c", "device": "cpu", "causal": True, **places}
    for place in places.values():
        place.mkdir()
    config = ServingConfig(store=tmp_path, dtype="bfloat16", **given)
    found = engine_arguments(decode(encode(setup_message(config))))
    assert found.pop("path_or_name") == "c" and found.pop("dtype") == torch.bfloat16
    assert found.pop("config").max_source_pixels == config.limits.pixels
    assert found == {"device": "cpu", "causal": True} | {k: str(v) for k, v in places.items()}


class Worker:
    """A worker and its two pipes."""

    def __init__(self, config: ServingConfig) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mv2v_engine.serving.work.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        self.tell(setup_message(config))

    def tell(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(encode(message))
        self.process.stdin.flush()

    def run(self, job: str, folder: Path, number: int | None, steps: int) -> None:
        request = {"camera": "pan_right", "num_inference_steps": steps}
        self.tell(
            {
                "type": "run",
                "job": {"id": job, "number": number, "request": request},
                "session": {"id": folder.name, "frames": 9, "window": None},
                "folder": str(folder),
            }
        )

    def said(self) -> Iterator[dict[str, Any]]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield decode(line)

    def events(self, job: str) -> Iterator[dict[str, Any]]:
        for message in self.said():
            assert message["job"] == job
            yield message["event"]
            if message["event"]["type"] in ("done", "failed", "cancelled"):
                return

    def end(self) -> int:
        """Its exit code, once its stdin has ended it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        # what it says comes to an end with it
        self.process.stdout.read()
        self.process.stdout.close()
        return self.process.wait()

    def reach(self, job: str, kind: str) -> None:
        assert any(event["type"] == kind for event in self.events(job))


@pytest.fixture
def worker(tmp_path: Path, tiny_checkpoint: Path) -> Iterator[Worker]:
    worker = Worker(ServingConfig(store=tmp_path, checkpoint=str(tiny_checkpoint), device="cpu"))
    yield worker
    worker.end()


def test_a_worker_from_its_setup_to_the_end_of_its_server(
    worker: Worker, tmp_path: Path, sent: Path
) -> None:
    folder = sent
    ready = next(worker.said())
    assert ready["type"] == "ready" and ready["about"]["sampling"]["num_frames"] == 9
    assert not Lock(worker_lock(tmp_path)).acquire()
    assert Lock(worker_lock(tmp_path)).holder() == str(worker.process.pid)
    assert os.getpriority(os.PRIO_PROCESS, worker.process.pid) >= 5

    # a cancellation that follows at once, one in the middle, and one of nothing
    worker.run("first", folder, 1, steps=900)
    worker.tell({"type": "cancel", "job": "first"})
    *_, last = worker.events("first")
    assert last == {"type": "cancelled"}
    worker.run("second", folder, 1, steps=900)
    worker.reach("second", "step_done")
    worker.tell({"type": "cancel", "job": "second"})
    *_, last = worker.events("second")
    assert last == {"type": "cancelled"}
    worker.tell({"type": "cancel", "job": "second"})

    worker.tell(
        {
            "type": "run",
            "job": {"id": "bad", "number": 1, "request": {"camera": "?"}},
            "session": {"id": folder.name, "frames": 9, "window": None},
            "folder": str(folder),
        }
    )
    (last,) = worker.events("bad")
    assert last["code"] == "unprocessable_turn"
    worker.run("third", folder, 1, steps=2)
    # what is asked of a session waits for its turn, which needs it open
    worker.tell({"type": "release", "session": folder.name})
    *_, last = worker.events("third")
    assert last["type"] == "done" and last["published"]
    worker.tell({"type": "release", "session": folder.name})
    publish = {
        "type": "publish",
        "call": 7,
        "session": {"id": folder.name, "frames": 9, "window": None},
    }
    worker.tell(publish | {"folder": str(folder), "number": 1})
    answer = next(worker.said())
    assert (answer["call"], answer["answer"]["type"]) == (7, "published")

    # the server is gone: the turn under way ends at its next step, and leaves nothing
    worker.run("fourth", folder, 2, steps=900)
    worker.reach("fourth", "step_done")
    assert worker.process.stdin is not None
    worker.process.stdin.close()
    *_, last = worker.events("fourth")
    assert last == {"type": "cancelled"}
    assert worker.process.wait() == 0
    before = sorted(folder.rglob("*"))
    sweep_session(folder)
    assert sorted(folder.rglob("*")) == before
    assert [row["number"] for row in SessionFolder(folder).read()["turns"]] == [1]
    assert Lock(worker_lock(tmp_path)).acquire()


def test_what_nobody_foresaw_fails_a_turn_and_not_the_worker(worker: Worker, sent: Path) -> None:
    folder = sent
    assert next(worker.said())["type"] == "ready"
    worker.run("strange", folder, None, steps=2)  # a turn of views has a number
    *_, last = worker.events("strange")
    assert last["code"] == "internal" and "TypeError" in last["message"]
    worker.run("next", folder, 1, steps=2)
    *_, last = worker.events("next")
    assert last["type"] == "done"
    # an order that is none ends it, by an exit code: Python itself would abort
    worker.tell({"type": "publish"})
    assert list(worker.said()) == [] and worker.process.wait() == 1


def test_a_worker_that_cannot_load_says_why(tmp_path: Path) -> None:
    worker = Worker(ServingConfig(store=tmp_path, checkpoint=str(tmp_path / "nothing")))
    (message,) = worker.said()
    assert message["type"] == "broken" and "nothing" in message["message"]
    assert worker.end() == 1
