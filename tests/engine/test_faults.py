"""Disks that fill up and turns that are cut off: nothing is lost, half-written or left behind."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine import CancelToken, Engine, EngineConfig, Session, run
from mv2v_engine.engine.results import ViewResults
from mv2v_engine.errors import CancelledError, StorageError
from mv2v_engine.progress import Event, TurnNotStored
from mv2v_engine.testing import largest_file
from tests.folders import contents
from tests.launched import script

CAMERAS = ("pan_right", "arc_left", "pan:8", "tilt_up", "pan:-8")


def stored(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "session.json").read_text())["turns"]
    return rows


@contextmanager
def broken_disk(name: str) -> Iterator[None]:
    """A file of that name is written and cannot be put in its place."""
    replace = Path.replace

    def broken(self: Path, target: Path) -> Path:
        if Path(target).name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return replace(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", broken)
        yield


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (largest_file(500), r"turn_03\.safetensors: .*File too large"),
        (broken_disk("turn_03.safetensors"), r"turn_03\.safetensors: Input/output error"),
        (broken_disk("session.json"), r"session\.json: Input/output error"),
    ],
)
def test_a_disk_that_fails_keeps_the_turn_in_this_process(
    engine: Engine,
    source_frames: Tensor,
    tmp_path: Path,
    trouble: AbstractContextManager[None],
    words: str,
) -> None:
    unbroken = engine.session(source_frames)
    folder = tmp_path / "out"
    session = engine.session(source_frames, store=folder)
    for camera in CAMERAS[:2]:
        session.render(camera, num_inference_steps=1)
    before = contents(folder)
    events: list[Event] = []
    with trouble:
        third = session.render(CAMERAS[2], num_inference_steps=1, on_progress=events.append)
        fourth = session.render(CAMERAS[3], num_inference_steps=1)
        with pytest.raises(StorageError, match=f"cannot write .*{words}"):
            session.store_missing()
    assert contents(folder) == before
    assert isinstance(events[-1], TurnNotStored) and events[-1].turn == 3
    assert session.unstored == (third, fourth)
    for turn in session.unstored:
        assert re.search(words, turn.report["storage_error"])
    assert {row["turn"] for row in fourth.report["memory"]["retrieved"]} == {1, 2, 3}
    # room again: in order, and without a trace of the trouble
    session.render(CAMERAS[4], num_inference_steps=1)
    assert not session.unstored and [row["number"] for row in stored(folder)] == [1, 2, 3, 4, 5]
    assert not any("storage_error" in row["report"] for row in stored(folder))
    session.close()
    resumed = engine.session(source_frames, store=folder, resume=True)
    for turn, other, camera in zip(session.turns, resumed.turns, CAMERAS, strict=True):
        expected = unbroken.render(camera, num_inference_steps=1)
        assert torch.equal(turn.latents, expected.latents)
        assert torch.equal(other.frames, expected.frames)
        assert other.report == turn.report and "storage_error" not in turn.report


def test_what_could_not_be_stored_is_forgotten_only_for_want_of_memory(
    tiny_checkpoint: Path, source_frames: Tensor, tmp_path: Path
) -> None:
    config = EngineConfig(cache_bytes=16 * 3 * 6 * 8 * 4)
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu", config=config)
    session = engine.session(source_frames, store=tmp_path)
    with largest_file(500):
        for camera in CAMERAS[:2]:
            session.render(camera, num_inference_steps=1)
        # one fits, and no disk has the other
        assert session.render(CAMERAS[2]).report["memory"]["num_candidates"] == 1
    session.store_missing()
    report = session.render(CAMERAS[3], num_inference_steps=1).report
    assert {row["turn"] for row in report["memory"]["retrieved"]} == {1, 2, 3}


def test_an_adopted_turn_waits_for_room_too(
    engine: Engine, source_frames: Tensor, tmp_path: Path
) -> None:
    turn = engine.session(source_frames).render("pan_right")
    session = engine.session(source_frames, store=tmp_path)
    with largest_file(500):
        session.adopt(turn)
    assert session.unstored == (turn,) and session.turns == [turn]
    session.store_missing()
    assert len(stored(tmp_path)) == 1 and "storage_error" not in turn.report


def test_publishing_writes_what_it_can(
    engine: Engine, source_frames: Tensor, tmp_path: Path
) -> None:
    results = ViewResults(tmp_path)
    session = engine.session(source_frames, store=tmp_path)
    session.render("pan_right")
    session.render("arc_left")
    # the picture is larger than that, the videos and the report are not
    with largest_file(60_000), pytest.raises(StorageError, match=r"overview\.png: File too large"):
        results.publish(session, version="0")
    videos = {path.name for path in results.videos(session)}
    assert set(contents(tmp_path)) == {
        *videos,
        "report.json",
        "session.json",
        "turns/turn_01.safetensors",
        "turns/turn_02.safetensors",
    }
    results.publish(session, version="0")
    assert "overview.png" in contents(tmp_path)
    # a turn whose tensors find no room and whose video does is cleared with the others
    with broken_disk("turn_03.safetensors"), pytest.raises(StorageError):
        session.render("pan:8", num_inference_steps=1)
        results.publish(session, version="0")
    assert "turn_03_pan_8.mp4" in contents(tmp_path) and len(stored(tmp_path)) == 2
    results.clear()
    assert not contents(tmp_path)


SMALL_DISK = """
import json, subprocess, sys
from pathlib import Path
from mv2v_engine import run
from mv2v_engine.errors import StorageError

clip, checkpoint, disk = sys.argv[1:]
def mount(options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", disk], check=True)
def render(*more):
    cameras = [word for name in ("pan_right", "arc_left", "static") for word in ("--camera", name)]
    return run.main(["novel-view", clip, *cameras, "--out", disk + "/out", "--checkpoint",
                     checkpoint, "--device", "cpu", "--quiet", *more])
def files():
    return sorted(path.name for path in Path(disk).rglob("*") if path.is_file())

mount("size=52k")
first = render()
small = files()
mount("remount,ro")
print(json.dumps([first, small, render("--resume"), files() == small]), flush=True)
mount("remount,rw,size=8m")
print(json.dumps([render("--resume"), files()]))
"""


@pytest.mark.skipif(
    sys.platform != "linux"
    or shutil.which("unshare") is None
    or subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
    ).returncode
    != 0,
    reason="no file system of one's own can be mounted here",
)
def test_a_small_disk(tmp_path: Path, source_clip: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "disk").mkdir()
    arguments = (source_clip, tiny_checkpoint, tmp_path / "disk")
    done = script(SMALL_DISK, *arguments, within=("unshare", "-rm"))
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    (first, small, read_only, is_same), (last, whole) = map(json.loads, lines)
    full, refused = done.stderr.splitlines()
    assert first == run.PARTIAL and full.startswith("error: cannot write ")
    assert "No space left on device" in full
    assert "--resume" in full and "Read-only file system" in refused
    assert not [name for name in small if name.startswith(".")]
    assert "turn_01_pan_right.mp4" in small and "session.json" in small
    assert read_only == run.REFUSED and is_same
    assert last == 0 and len(whole) == 9 and "turn_03_static.mp4" in whole


class Countdown(CancelToken):
    """Cancels at its n-th check."""

    def __init__(self, checks: int) -> None:
        super().__init__()
        self.left = checks

    def check(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.cancel()
        super().check()


def live_tensor_bytes() -> int:
    gc.collect()
    found = [one for one in gc.get_objects() if issubclass(type(one), Tensor) and not one.is_meta]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in found}
    return sum(storages.values())


@pytest.fixture
def new_objects_alone() -> Iterator[None]:
    """The collector looks at what is made from here on, which is quick."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_cancelling_anywhere_leaves_nothing(
    tiny_checkpoint: Path, source_frames: Tensor, tmp_path: Path, new_objects_alone: None
) -> None:
    config = EngineConfig(conditioning="static")
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu", config=config)
    undisturbed = engine.session(source_frames)
    expected = [undisturbed.render(camera, num_inference_steps=2) for camera in CAMERAS[:2]]
    latents = engine.vae.encode(source_frames)

    def begun(folder: Path) -> Session:
        session = engine.session(source_frames, store=folder, source_latents=latents)
        session.adopt(expected[0])
        session._runner.source_latents = None  # so that the turn begins with encoding
        return session

    checks = 0
    while True:
        checks += 1
        folder = tmp_path / str(checks)
        session = begun(folder)
        before = (contents(folder), engine.cache.ids(), threading.active_count())
        # the source's latents are kept once they are there, whatever comes after
        had = live_tensor_bytes()
        token = Countdown(checks)
        seen: list[Event] = []
        try:
            turn = session.render(
                CAMERAS[1], num_inference_steps=2, on_progress=seen.append, cancel=token
            )
            break
        except CancelledError:
            pass
        is_encoded = session._runner.source_latents is not None
        assert live_tensor_bytes() - had == (latents.nbytes if is_encoded else 0)
        assert (contents(folder), engine.cache.ids(), threading.active_count()) == before
        assert not engine.cache._pins and len(session.turns) == 1
        session = weakref.ref(session)
        assert session() is None
    # 3 chunks to encode and 3 to decode, 2 steps, and a few in between
    assert checks >= 3 + 3 + 2
    assert torch.equal(turn.latents, expected[1].latents)


def test_a_turn_that_is_let_go_of_between_events_leaves_nothing(
    engine: Engine, source_frames: Tensor
) -> None:
    session = engine.session(source_frames)
    for count in range(1, 9):
        events = session.events(session.request("pan_right", num_inference_steps=2))
        for _ in range(count):
            next(events)
        del events
        assert not engine.cache._pins and not engine.cache.ids() and not session.turns


def test_publishing_is_cancelled_between_its_files(
    engine: Engine, source_frames: Tensor, tmp_path: Path
) -> None:
    session = engine.session(source_frames, store=tmp_path)
    session.render("pan_right", num_inference_steps=1)
    results, written = ViewResults(tmp_path), []
    # the folder, the video, the picture; the video is there already; the report
    for checks in (1, 2, 3, 3):
        with pytest.raises(CancelledError):
            results.publish(session, version="0", check=Countdown(checks).check)
        written.append(set(contents(tmp_path)))
    assert [len(files) for files in written] == [2, 2, 3, 4]
    results.publish(session, version="0", check=Countdown(9).check)
    assert len(contents(tmp_path)) == 5
