"""A session's folder has one writer: whoever comes second is told who the first is."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from mv2v_engine import Engine, run
from mv2v_engine.engine.folder import SessionFolder
from mv2v_engine.errors import RequestError, StorageError
from tests.folders import contents
from tests.launched import script

IN_USE = "is in use: another session of this process writes into it"


@pytest.fixture
def editor(editor_folder: Path) -> Engine:
    return Engine.from_pretrained(editor_folder, device="cpu")


@pytest.fixture
def folder(tmp_path: Path, engine: Engine, source_clip: Path) -> Path:
    """A finished session of one turn, which nobody has open."""
    session = engine.session(source_clip, store=tmp_path / "out")
    session.render("pan_right", num_inference_steps=1)
    session.close()
    return tmp_path / "out"


def test_two_sessions_on_one_folder(folder: Path, engine: Engine, source_clip: Path) -> None:
    assert not (folder / "writer.lock").exists()
    first = engine.session(source_clip, store=folder, resume=True)
    before = contents(folder)
    other = engine.session(source_clip).render("pan_right", num_inference_steps=1)
    told: list[str] = []

    def second(**how: object) -> None:
        with pytest.raises(StorageError, match=IN_USE) as caught:
            session = engine.session(source_clip, store=folder, **how)  # type: ignore[arg-type]
            session.adopt(other)
        told.append(str(caught.value))

    second(resume=True)
    second(resume=False)
    thread = threading.Thread(target=second, kwargs={"resume": True})
    thread.start()
    thread.join(600)
    assert len(told) == 3 and contents(folder) == before
    # each turn of the first is there, under a number of its own
    assert first.render("arc_left", num_inference_steps=1).number == 2
    assert [row["number"] for row in SessionFolder(folder).read()["turns"]] == [1, 2]


@pytest.mark.parametrize("ending", ["closed", "dropped", "failed"])
def test_the_folder_is_free_when_its_session_has_ended(
    folder: Path, engine: Engine, source_clip: Path, source_frames: Tensor, ending: str
) -> None:
    if ending == "failed":
        with pytest.raises(StorageError, match="whose source is"):
            engine.session(255 - source_frames, store=folder, resume=True)
    else:
        session = engine.session(source_clip, store=folder, resume=True)
        # a turn outlives its session, and reads on
        turn = session.turns[0]
        if ending == "closed":
            session.close()
        else:
            del session
        assert turn.latents.isfinite().all()
    assert not (folder / "writer.lock").exists()
    again = engine.session(source_clip, store=folder, resume=True)
    assert again.render("arc_left", num_inference_steps=1).number == 2


def test_a_closed_session_writes_no_more(folder: Path, engine: Engine, source_clip: Path) -> None:
    session = engine.session(source_clip, store=folder, resume=True)
    under_way = session.events(session.request("arc_left", num_inference_steps=1))
    next(under_way)
    session.close()
    engine.session(source_clip, store=folder, resume=True).render("tilt_up", num_inference_steps=1)
    before = contents(folder)
    other = engine.session(source_clip)
    turns = [other.render("static", num_inference_steps=1) for _ in range(2)]
    writes: tuple[Callable[[], object], ...] = (
        lambda: list(under_way),
        lambda: session.render("arc_left", num_inference_steps=1),
        lambda: session.adopt(turns[1]),
        session.store_missing,
    )
    for write in writes:
        with pytest.raises(RequestError, match=r"is closed; open it again from its folder"):
            write()
    assert contents(folder) == before


def test_a_session_that_is_refused_leaves_nothing(
    tmp_path: Path, engine: Engine, editor: Engine, source_clip: Path, long_clip: Path
) -> None:
    with pytest.raises(StorageError, match="holds no session; start one"):
        engine.session(source_clip, store=tmp_path / "a" / "b", resume=True)
    session = editor.session(long_clip, cuts=(), store=tmp_path / "edits")
    assert [path.name for path in tmp_path.iterdir()] == ["edits"]
    with pytest.raises(StorageError, match=IN_USE):
        editor.session(long_clip, cuts=(), store=tmp_path / "edits", resume=True)
    with pytest.raises(StorageError, match=IN_USE):
        editor.session(long_clip, cuts=(), store=tmp_path / "edits")
    session.close()
    with pytest.raises(RequestError, match="is closed"):
        session.edit("a red ball")
    editor.session(long_clip, store=tmp_path / "edits", resume=True)


def test_the_command_line_refuses_what_is_in_use(
    folder: Path,
    engine: Engine,
    editor: Engine,
    source_clip: Path,
    tiny_checkpoint: Path,
    editor_folder: Path,
    long_clip: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "edited.mp4"
    views = engine.session(source_clip, store=folder, resume=True)
    edits = editor.session(long_clip, cuts=(), store=tmp_path / "edited.edit")
    before = contents(tmp_path)
    asked = {
        folder: ["novel-view", str(source_clip), "--camera", "pan_right", "--out", str(folder)],
        tmp_path / "edited.edit": ["edit", str(long_clip), "--prompt", "x", "--out", str(out)],
    }
    checkpoints = iter((tiny_checkpoint, editor_folder))
    for place, words in asked.items():
        where = ["--checkpoint", str(next(checkpoints)), "--device", "cpu"]
        for how in ("--resume", "--overwrite", None):
            assert run.main([*words, *where, *([how] if how else [])]) == run.REFUSED
            errors = capsys.readouterr().err
            assert errors.startswith(f"error: {place} {IN_USE}") and errors.count("\n") == 1
    assert contents(tmp_path) == before
    views.close()
    edits.close()


TWO = """
import os, sys
import torch
from mv2v_engine import Engine, run
out, clip, checkpoint = sys.argv[1:]
# a turn loads and counts what is the same for all
frames = torch.zeros(9, 48, 64, 3, dtype=torch.uint8)
Engine.from_pretrained(checkpoint, device="cpu").session(frames).render("static")
def resume():
    pid = os.fork()
    if pid == 0:
        where = ["--out", out, "--checkpoint", checkpoint, "--device", "cpu", "--quiet"]
        cameras = ["--camera", "pan_right", "--camera", "arc_left", "--steps", "1"]
        os._exit(run.main(["novel-view", clip, *cameras, *where, "--resume"]))
    return pid
pids = [resume() for _ in range(3)]
print(sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_resumes_at_once_lose_no_turn(
    folder: Path, source_clip: Path, tiny_checkpoint: Path
) -> None:
    done = script(TWO, folder, source_clip, tiny_checkpoint)
    # whoever came while another was at work was refused; a later one found all done
    codes = eval(done.stdout.splitlines()[-1])
    assert set(codes) <= {0, run.REFUSED} and 0 in codes, done.stderr
    refusals = [line for line in done.stderr.splitlines() if "is in use: process" in line]
    assert len(refusals) == codes.count(run.REFUSED), done.stderr
    rows = SessionFolder(folder).read()["turns"]
    assert [row["number"] for row in rows] == [1, 2]
    assert len(list(SessionFolder(folder).drafts())) == 2


READ_ONLY = """
import subprocess, sys
from mv2v_engine import Engine
from mv2v_engine.video.io import read_video
clip, checkpoint, folder = sys.argv[1:]
engine = Engine.from_pretrained(checkpoint, device="cpu")
subprocess.run(["mount", "--bind", folder, folder], check=True)
subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
session = engine.session(clip, store=folder, resume=True)
print(session.turns[0].frames.shape[0], session.lost)
turn = session.render("arc_left", num_inference_steps=1)
print(turn.number, turn.report["storage_error"])
"""


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="no file system of one's own can be mounted here",
)
def test_a_read_only_folder_is_looked_at(
    folder: Path, source_clip: Path, tiny_checkpoint: Path
) -> None:
    before = contents(folder)
    arguments = (source_clip, tiny_checkpoint, folder)
    done = script(READ_ONLY, *arguments, within=("unshare", "-rm"))
    looked, made = done.stdout.splitlines()
    assert looked == "9 ()" and made.startswith("2 cannot write")
    assert "Read-only file system" in made and contents(folder) == before
