"""Two hosts and one session's folder: whoever was told last writes, the other gives way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mv2v_engine import Engine
from mv2v_engine.engine.folder import SessionFolder
from mv2v_engine.errors import CancelledError, StorageError
from mv2v_engine.locks import WriterLock
from mv2v_engine.serving.store.claims import Claim, issue, taken
from mv2v_engine.serving.store.folders import sweep_session
from mv2v_engine.serving.work.host import Host

JOB = {"id": "job", "number": 1, "request": {"camera": "pan_right", "num_inference_steps": 3}}


def replica(engine: Engine) -> Host:
    return Host(engine, max_open=1, has_claims=True)


def made(host: Host, folder: Path, claim: Claim) -> Iterator[dict[str, Any]]:
    """A turn's events, under a claim."""
    session, events = {"id": folder.name, "frames": 9, "window": None}, list[dict[str, Any]]()
    with claim.held():
        for _ in host.run(JOB, session, folder, claim, events.append):
            host.tick()
            yield from events
            events.clear()
        yield from events


def test_an_attempt_that_is_believed_dead_gives_way(engine: Engine, sent: Path) -> None:
    folder = sent
    first = made(replica(engine), folder, Claim(folder, issue(folder), "first"))
    next(event for event in first if event["type"] == "step_done")
    # another attempt is told to make the turn; the first holds the lock, and has not noticed
    token = issue(folder)
    with (
        pytest.raises(StorageError, match=r"^first still writes into .*end that process"),
        Claim(folder, token, "second", patience=0.0).held(),
    ):
        pass
    assert [event["type"] for event in first] == ["cancelled"]
    assert SessionFolder(folder).read()["turns"] == []
    second = list(made(replica(engine), folder, Claim(folder, token, "second")))
    assert second[-1]["type"] == "done"
    assert [row["number"] for row in SessionFolder(folder).read()["turns"]] == [1]


def test_the_right_to_write_goes_to_the_newest(tmp_path: Path) -> None:
    old = Claim(tmp_path, issue(tmp_path), "old")
    with old.held() as was_last:
        assert not was_last and not old.cancelled
    with old.held() as was_last:
        assert was_last
    new = Claim(tmp_path, issue(tmp_path), "new")
    with pytest.raises(CancelledError), old.held():
        pass
    with new.held() as was_last:
        assert not was_last
    with taken(tmp_path):
        assert new.cancelled
        assert WriterLock(tmp_path).acquire() is False
    assert WriterLock(tmp_path).holder() == "the service"


def test_a_machine_without_the_store_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    with pytest.raises(StorageError, match="store at the same path"):
        Claim(folder, "token", "replica").check()
    with taken(folder):
        assert not folder.exists()
    with pytest.raises(StorageError, match="cannot write"):
        issue(folder)


def test_a_command_line_in_a_served_folder_is_left_alone(tmp_path: Path) -> None:
    """It was told no claim, and its turn is not listed before it is whole."""
    writer = WriterLock(tmp_path)
    writer.take()
    (tmp_path / "turns").mkdir()
    unlisted = tmp_path / "turns" / "turn_01.safetensors"
    unlisted.write_bytes(b"a turn that is being stored")
    with pytest.raises(StorageError, match="is in use"), taken(tmp_path):
        sweep_session(tmp_path)
    assert unlisted.exists()
    writer.release()
    with taken(tmp_path):
        assert not WriterLock(tmp_path).acquire()
        sweep_session(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["turns"]
    assert not unlisted.exists()
