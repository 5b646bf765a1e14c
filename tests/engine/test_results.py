"""The folder that a user opens: complete after every turn, and cleared of its own files alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from mv2v_engine import Engine, Session
from mv2v_engine.config import SamplingConfig
from mv2v_engine.engine.request import Request
from mv2v_engine.engine.results import ViewResults
from mv2v_engine.errors import StorageError
from tests.folders import contents

SAMPLING = SamplingConfig(num_frames=9, size=(48, 64), num_inference_steps=3, guidance_scale=1.0)


def request(camera: str, **changes: object) -> Request:
    return Request.view(camera, SAMPLING, **{"memory": "retrieved"} | changes)


@pytest.fixture
def results(tmp_path: Path) -> ViewResults:
    return ViewResults(tmp_path / "out")


@pytest.fixture
def session(results: ViewResults, engine: Engine, source_frames: Tensor) -> Session:
    session = engine.session(source_frames, store=results.folder)
    session.render("pan_right")
    session.render("arc:-20,3.5")
    return session


def test_everything_is_written(results: ViewResults, session: Session) -> None:
    written = results.publish(session, version="1.2.3")
    assert [path.name for path in written] == [
        "turn_01_pan_right.mp4",
        "turn_02_arc_-20_3.5.mp4",
        "overview.png",
        "report.json",
    ]
    assert all(path.stat().st_size for path in written)
    # three rows of five frames of 48x64, five times as large, under a label each
    assert Image.open(results.overview).size == (5 * (320 + 4) + 4, 3 * (26 + 240 + 4))
    report = json.loads(results.report.read_text())
    assert report["format"] == "mv2v-report" and report["version"] == 1
    assert report["engine"] == {"version": "1.2.3", **session.parts.describe()}
    assert report["source"]["window"] == "all 9 frames"
    assert [turn["file"] for turn in report["turns"]] == [path.name for path in written[:2]]
    assert report["turns"][1]["memory"]["retrieved"][0]["turn"] == 1
    assert report["seconds"] > 0 and report["peak_host_bytes"] > 1 << 20


def test_the_overview_shows_the_newest_turns(
    results: ViewResults, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    results.publish(session, version="0")
    both = np.asarray(Image.open(results.overview))
    monkeypatch.setattr("mv2v_engine.engine.results.MAX_ROWS", 1)
    results.publish(session, version="0")
    newest = np.asarray(Image.open(results.overview))
    row = 26 + 240 + 4
    assert len(newest) == 2 * row and (newest[row:] == both[2 * row :]).all()
    # the source's label says what is missing
    assert (newest[:26] != both[:26]).any() and (newest[26:row] == both[26:row]).all()


def test_missing_videos_are_made_again(results: ViewResults, session: Session) -> None:
    first, second, *_ = results.publish(session, version="0")
    content, kept = first.read_bytes(), second.stat().st_mtime_ns
    first.unlink()
    results.publish(session, version="0")
    assert first.read_bytes() == content and second.stat().st_mtime_ns == kept


def test_clearing_takes_its_own_files_alone(results: ViewResults, session: Session) -> None:
    results.publish(session, version="0")
    mine = {"holiday.mp4", "turn_03_mine.mp4", "turns/notes.txt", "turn_01_pan_left.mp4"}
    for name in mine:
        (results.folder / name).write_text("mine")
    # left like this by a kill between a turn's tensors and the manifest
    (results.store.window_path({"number": 3, "camera": {}}, 1)).write_text("cut off")
    results.clear()
    assert set(contents(results.folder)) == mine
    (results.folder / "turns" / "notes.txt").unlink()
    results.clear()
    assert not (results.folder / "turns").exists()


def test_another_programs_session_is_not_cleared(results: ViewResults) -> None:
    results.folder.mkdir()
    results.store.manifest.write_text('{"format": "browser"}')
    with pytest.raises(StorageError, match="no session of this engine"):
        results.clear()
    assert set(contents(results.folder)) == {"session.json"}


def test_what_a_kill_left_is_swept(results: ViewResults, session: Session) -> None:
    before = set(contents(results.folder))
    left = [".session-ab_12xyz.json", ".turn_01_arc_-20_3.5-abcdefgh.mp4", ".overview-12345678.png"]
    for name in [*left, "turns/.turn_02-abcdefgh.safetensors", ".session-mine.json", ".notes"]:
        (results.folder / name).touch()
    results.remove_unfinished()
    assert set(contents(results.folder)) == before | {".session-mine.json", ".notes"}


def test_a_taken_folder(results: ViewResults, session: Session) -> None:
    with pytest.raises(StorageError, match="already holds a session of 2 turns; continue it with"):
        results.check_free()
    results.publish(session, version="0")
    results.store.manifest.unlink()
    with pytest.raises(StorageError, match=r"overview\.png exists and belongs to no session"):
        results.check_free()


def test_a_source_that_would_be_removed(results: ViewResults, session: Session) -> None:
    video, *_ = results.publish(session, version="0")
    with pytest.raises(StorageError, match="belongs to the session that --overwrite would remove"):
        results.check_replaceable(video)
    results.check_replaceable(results.folder / "holiday.mp4")


def test_only_the_same_turns_are_resumed(
    results: ViewResults, session: Session, tmp_path: Path
) -> None:
    identity = {"checkpoint": "tiny"}
    first, second = request("pan_right"), request("arc:-20,3.5")
    results.check_resumable([first, second], identity)
    results.check_resumable([first, second, request("static", seed=9)], identity)
    with pytest.raises(StorageError, match="checkpoint is 'tiny', this one's is 'big'"):
        results.check_resumable([first, second], {"checkpoint": "big"})
    with pytest.raises(StorageError, match=r"2 finished turns \(pan_right, arc:-20,3\.5\), only 1"):
        results.check_resumable([first], identity)
    others = {
        "camera 'arc:-20,3.5' instead of 'static'": request("static"),
        "seed 0 instead of 1": request("arc:-20,3.5", seed=1),
        "num_inference_steps 3 instead of 4": request("arc:-20,3.5", num_inference_steps=4),
        "memory 'retrieved' instead of 'none'": request("arc:-20,3.5", memory="none"),
        "guidance_scale 1.0 instead of 2.0": request("arc:-20,3.5", guidance_scale=2.0),
        "prompt '' instead of 'a ball'": request("arc:-20,3.5", prompt="a ball"),
    }
    for words, other in others.items():
        with pytest.raises(StorageError, match=f"its turn 2 has {words}"):
            results.check_resumable([first, other], identity)


def test_a_renamed_camera_file_with_other_poses(
    results: ViewResults, engine: Engine, source_frames: Tensor
) -> None:
    session = engine.session(source_frames, store=results.folder)
    turn = session.render("pan_right")
    other = request("pan:5")
    object.__setattr__(other.camera, "name", "pan_right")
    assert (
        other.difference(turn.report, turn.trajectory) == "other poses under the name 'pan_right'"
    )
    same = request("pan_right")
    lens = turn.trajectory.intrinsics.repeat(9, 1, 1)
    assert same.difference(turn.report, replace(turn.trajectory, intrinsics=lens)) is None
    lens[3, 0, 0] *= 1.1
    assert (
        same.difference(turn.report, replace(turn.trajectory, intrinsics=lens))
        == "another lens under the name 'pan_right'"
    )


def test_checking_leaves_nothing(tmp_path: Path) -> None:
    ViewResults(tmp_path / "a" / "b").check_writable()
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / ("x" * 300)):
        with pytest.raises(StorageError, match=r"cannot write into .*; choose another folder"):
            ViewResults(folder).check_writable()
