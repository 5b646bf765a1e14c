"""Jobs done with a real engine in this process: turns, edits, files, and doing a job twice."""

from __future__ import annotations

import base64
import errno
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mv2v_engine import Engine, EngineConfig
from mv2v_engine.engine.folder import SessionFolder
from mv2v_engine.errors import CancelledError, StorageError
from mv2v_engine.locks import WriterLock
from mv2v_engine.progress import CancelToken
from mv2v_engine.serving.store.folders import manifest_row, result_path
from mv2v_engine.serving.work.host import Host
from mv2v_engine.video.io import probe_video

TURN = {"camera": "pan_right", "num_inference_steps": 2}
CANCELLED = {"type": "cancelled"}


@pytest.fixture
def host(engine: Engine) -> Host:
    return Host(engine, max_open=2)


@pytest.fixture
def folder(tmp_path: Path, source_clip: Path) -> Path:
    return _folder(tmp_path / "session", source_clip)


def _folder(path: Path, clip: Path) -> Path:
    path.mkdir()
    (path / "source").write_bytes(clip.read_bytes())
    return path


def run(
    host: Host,
    folder: Path,
    number: int | None,
    request: dict[str, Any],
    *,
    frames: int = 9,
    cancel: CancelToken | None = None,
) -> Iterator[dict[str, Any]]:
    session = {"id": folder.name, "frames": frames, "window": None}
    job = {"id": "job", "number": number, "request": request}
    events: list[dict[str, Any]] = []
    for _ in host.run(job, session, folder, cancel or CancelToken(), events.append):
        host.tick()
        yield from events
        events.clear()
    for event in events:
        json.dumps(event, allow_nan=False)
        yield event


def test_a_fault_in_a_turn_fails_it_and_leaves_the_session(host: Host, folder: Path) -> None:
    *_, first = run(host, folder, 1, TURN)
    assert first["type"] == "done"
    weights = next(host.engine.transformer.parameters())
    whole, weights.data = weights.data, weights.data.flatten()[:1]
    try:
        *_, last = run(host, folder, 2, TURN)
        assert (last["type"], last["code"]) == ("failed", "internal")
        assert "ValueError" in last["message"] and str(folder) not in last["message"]
    finally:
        weights.data = whole
    *_, last = run(host, folder, 2, TURN)
    assert (last["type"], last["number"]) == ("done", 2)
    assert [row["number"] for row in SessionFolder(folder).read()["turns"]] == [1, 2]


def test_a_process_whose_arithmetic_stays_broken_ends(
    host: Host, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN fails for good for a shape whose code it once had no memory for."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(host.engine.transformer, "forward_samples", fail)
    with pytest.raises(RuntimeError, match="this process cannot go on"):
        list(run(host, folder, 1, TURN))


def test_a_turn_is_cancelled_while_its_video_is_read(host: Host, folder: Path) -> None:
    cancel = CancelToken()
    events = run(host, folder, 1, TURN, cancel=cancel)
    # not a step is made: the check between packets is the first one that it meets
    cancel.cancel()
    with pytest.raises(CancelledError):
        host._session({"id": folder.name, "frames": 9, "window": None}, folder, cancel)
    assert list(events) == [CANCELLED]
    assert not (folder / "session.json").exists()


def test_a_turn_is_made_once_whatever_is_asked(host: Host, folder: Path) -> None:
    host.warm_up()
    assert len(host.engine.cache) == 0
    events = list(run(host, folder, 1, TURN))
    assert events[0] == {"type": "started", "number": 1}
    steps = [event["step"] for event in events if event["type"] == "step_done"]
    assert steps == [1, 2]
    done = events[-1]
    assert (done["type"], done["number"], done["published"]) == ("done", 1, True)
    assert done["memory"]["bytes"] == host.engine.video_bytes
    assert done["memory"]["next_turn_tokens"]["memory"] > 0
    video = result_path(folder, 1, "video")
    assert probe_video(video).num_frames == 9
    with Image.open(result_path(folder, 1, "thumbnail")) as picture:
        assert (picture.format, picture.size) == ("JPEG", (64, 48))
    assert done["bytes"] == sum(
        path.stat().st_size for path in folder.rglob("turn_*") if path.is_file()
    )
    # the same job again, in this process and in one that opens the folder anew
    before = video.read_bytes()
    video.unlink()
    other = Host(host.engine, max_open=1)
    assert list(run(other, folder, 1, TURN))[-1]["code"] == "busy"
    for each in (host, other):
        kinds = [event["type"] for event in run(each, folder, 1, TURN)]
        assert kinds == ["started", "done"]
        assert video.read_bytes() == before
        each.close()
    assert len(SessionFolder(folder).read()["turns"]) == 1
    assert (manifest_row(folder, 1) or {})["report"] == done["report"]
    assert manifest_row(folder, 2) is None
    # another request under the same number is nobody's turn
    last = list(run(host, folder, 1, TURN | {"seed": 3}))[-1]
    assert last["code"] == "internal" and "another turn 1: seed 0 instead of 3" in last["message"]
    last = list(run(host, folder, 3, TURN))[-1]
    assert last["code"] == "internal" and "has 1 turns, and turn 3" in last["message"]


def test_cancelling_takes_one_step(host: Host, folder: Path) -> None:
    cancel, steps = CancelToken(), 0
    request = TURN | {"num_inference_steps": 6}
    for event in run(host, folder, 1, request, cancel=cancel):
        if event["type"] == "step_done":
            steps += 1
            if steps == 2:
                cancel.cancel()
    assert event == {"type": "cancelled"}
    assert steps == 2
    assert SessionFolder(folder).read()["turns"] == []
    assert [path.name for path in folder.iterdir()] != [] and not (folder / "results").exists()
    assert list(run(host, folder, 1, TURN))[-1]["type"] == "done"


def test_clips_of_other_lengths(host: Host, tmp_path: Path, long_clip: Path) -> None:
    folder = _folder(tmp_path / "long", long_clip)
    assert list(run(host, folder, 1, TURN, frames=23))[-1]["type"] == "done"


def test_sessions_are_closed_and_opened_again(
    host: Host, tmp_path: Path, source_clip: Path
) -> None:
    folders = [_folder(tmp_path / name, source_clip) for name in "abc"]
    for folder in folders:
        assert list(run(host, folder, 1, TURN))[-1]["type"] == "done"
    assert len(host.engine.cache) == 2
    second = list(run(host, folders[0], 2, TURN | {"camera": "arc_left"}))[-1]
    retrieved = second["report"]["memory"]["retrieved"]
    assert [row["turn"] for row in retrieved] == [1]
    host.release("a")
    host.release("unknown")
    assert not any(id.startswith("a/") for id in host.engine.cache.ids())
    host.close()
    assert len(host.engine.cache) == 0


def test_a_full_disk_costs_the_turn_or_its_files_for_now(
    host: Host, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(run(host, folder, 1, TURN))[-1]["type"] == "done"

    def full(*_: object, **__: object) -> None:
        raise StorageError("cannot write") from OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(SessionFolder, "append", full)
        last = list(run(host, folder, 2, TURN))[-1]
        assert (last["type"], last["code"]) == ("failed", "disk_full")
    with monkeypatch.context() as patch:
        patch.setattr("mv2v_engine.serving.work.host._save_thumbnail", full)
        last = list(run(host, folder, 2, TURN))[-1]
        assert (last["type"], last["number"], last["published"]) == ("done", 2, False)
    session = {"id": folder.name, "frames": 9, "window": None}
    answer = host.publish(session, folder, 2)
    assert answer["type"] == "published" and result_path(folder, 2, "thumbnail").exists()
    assert host.publish(session, folder, 3)["code"] == "internal"


def test_a_folder_that_a_command_line_writes_into_is_busy(host: Host, folder: Path) -> None:
    writer = WriterLock(folder, "process 7 on render-1")
    writer.take()
    last = list(run(host, folder, 1, TURN))[-1]
    assert (last["type"], last["code"]) == ("failed", "busy")
    assert "process 7 on render-1 writes into its folder; ask again once" in last["message"]
    assert "choose another folder" not in last["message"]
    writer.release()
    assert list(run(host, folder, 1, TURN))[-1]["type"] == "done"


def test_a_turn_that_is_not_finite_fails_by_its_name(host: Host, folder: Path) -> None:
    """No more than that turn fails: the next one is made as if there had been none."""
    assert list(run(host, folder, 1, TURN))[-1]["type"] == "done"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    weight = host.engine.transformer.proj_out.weight.data
    whole = weight.clone()
    weight.view(-1)[0] = float("nan")
    last = list(run(host, folder, 2, TURN))[-1]
    assert (last["type"], last["code"]) == ("failed", "not_finite")
    assert last["message"].startswith("step 1 of 2 gave") and "turn 2 is dro" in last["message"]
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    weight.copy_(whole)
    done = list(run(host, folder, 2, TURN))[-1]
    assert (done["type"], done["number"]) == ("done", 2)
    assert [row["turn"] for row in done["report"]["memory"]["retrieved"]] == [1]


def test_a_session_of_other_steps_is_read_and_not_gone_on_with(host: Host, folder: Path) -> None:
    *_, first = run(host, folder, 1, TURN)
    assert first["type"] == "done"
    host.close()
    result_path(folder, 1, "video").unlink()
    other = Host(host.engine.reconfigured(EngineConfig(fast="turbo")), max_open=1)
    *_, last = run(other, folder, 2, {"camera": "pan_left", "num_inference_steps": 4})
    assert (last["type"], last["code"]) == ("failed", "unprocessable_turn")
    assert "was made with scheduler 'euler', and this engine has 'rcm'" in last["message"]
    session = {"id": folder.name, "frames": 9, "window": None}
    assert other.publish(session, folder, 1)["type"] == "published"
    assert result_path(folder, 1, "video").exists()


class _Late(CancelToken):
    """Cancelled when some frames have been looked at."""

    num_checks = 0

    def check(self) -> None:
        self.num_checks += 1
        if self.num_checks == 9:
            self.cancel()
        super().check()


def test_edits_go_on_behind_their_windows(
    editor_folder: Path, tmp_path: Path, long_clip: Path
) -> None:
    host = Host(Engine.from_pretrained(editor_folder, device="cpu"), max_open=1)
    assert host.about["kind"] == "edits" and host.about["has_text"]
    folder, request = _folder(tmp_path / "edits", long_clip), {"prompt": "a red ball"}
    # while cuts are looked for there is nothing to take up yet
    assert list(run(host, folder, None, request, frames=23, cancel=_Late())) == [CANCELLED]
    assert not (folder / "session.json").exists()
    cancel, windows = CancelToken(), []
    for event in run(host, folder, None, request, frames=23, cancel=cancel):
        if event["type"] == "window_done":
            windows.append(event["number"])
            cancel.cancel()
    assert event == CANCELLED and windows == [1]
    assert manifest_row(folder, 1) is None
    host.close()
    again = Host(host.engine, max_open=1)
    events = list(run(again, folder, None, request, frames=23))
    assert [e["number"] for e in events if e["type"] == "window_done"] == [2, 3, 4, 5]
    assert (events[-1]["type"], events[-1]["number"]) == ("done", 1)
    assert probe_video(result_path(folder, 1, "video")).num_frames == 23
    # what a start finds of it is the whole report, its windows' rows included
    assert (manifest_row(folder, 1) or {})["report"] == json.loads(json.dumps(events[-1]["report"]))
    assert len(events[-1]["report"]["windows"]) == 5
    # asked for again it is the same turn
    events = list(run(again, folder, None, request, frames=23))
    assert (events[-1]["type"], events[-1]["number"]) == ("done", 1)
    last = list(run(host, folder, None, TURN, frames=23))[-1]
    assert last["code"] == "unprocessable_turn"


def test_a_turn_has_previews_for_who_asks(host: Host, folder: Path) -> None:
    *events, done = run(host, folder, 1, TURN | {"previews": True})
    assert done["type"] == "done"
    previews = [event for event in events if event["type"] == "preview"]
    assert [(event["step"], event["total"]) for event in previews] == [(1, 2), (2, 2)]
    for event in previews:
        kind, encoded = event["image"].split(",")
        assert kind == "data:image/jpeg;base64" and len(encoded) < 10_000
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
            assert (picture.format, picture.size) == ("JPEG", (8, 6))
    kinds = [event["type"] for event in run(host, folder, 2, TURN | {"previews": False})]
    assert kinds[-1] == "done" and "preview" not in kinds
