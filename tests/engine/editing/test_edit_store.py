"""A folder of edits: killed at any window it goes on bit for bit, and nothing finished is lost."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mv2v_engine import Engine, EngineConfig
from mv2v_engine.engine.folder import SessionFolder
from mv2v_engine.errors import StorageError
from mv2v_engine.progress import Event, WindowDone
from mv2v_engine.testing import largest_file
from mv2v_engine.video.io import write_video
from tests.engine.editing.conftest import long_clip
from tests.engine.old_folders import as_version_1
from tests.folders import DAMAGES, contents
from tests.launched import script

PROMPT = "a red ball"


def without_times(report: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on the process that made it."""
    spent = (
        "seconds",
        "process_peak_bytes",
        "cache_counters",
        "cache_bytes",
        "cache_bytes_by_tier",
    )
    kept = {name: value for name, value in report.items() if name not in spent}
    if "windows" in kept:
        kept["windows"] = [without_times(row) for row in kept["windows"]]
    return kept


KILLED = """
import os, signal, sys
from pathlib import Path
from mv2v_engine import Engine
from mv2v_engine.progress import StepDone, WindowDone

clip, checkpoint, store, out, prompt = sys.argv[1:]
engine = Engine.from_pretrained(checkpoint, device="cpu")
# a process for every kill: each forks from one that has loaded everything
for number, last in enumerate((1, 3)):
    pid = os.fork()
    if pid == 0:
        session = engine.session(clip, store=store, resume=number > 0)
        done = 0
        for event in session.events(session.request(prompt=prompt), out=out):
            done += isinstance(event, WindowDone)
            # in the midst of the window after
            if isinstance(event, StepDone) and done == last - number:
                os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    # as a kill leaves it that comes while a file is written
    Path(store, "turns", "turn_01", ".window_00009-abcdefgh.safetensors").write_bytes(b"half")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_killed_in_any_window_it_goes_on_to_the_same_bits(
    editor: Engine, editor_folder: Path, tmp_path: Path
) -> None:
    clip = tmp_path / "clip.mp4"
    write_video(clip, long_clip(23), 12)
    folder, outs = tmp_path / "out", [tmp_path / "one.mp4", tmp_path / "two.mp4"]
    unbroken = editor.session(clip, id="s", store=tmp_path / "whole")
    expected = unbroken.edit(PROMPT, out=outs[0])
    script(KILLED, clip, editor_folder, folder, outs[1], PROMPT)
    session = editor.session(clip, store=folder, resume=True)
    ((request, num_done),) = session.unfinished
    assert request.prompt == PROMPT and num_done == 3 and not session.turns
    assert not outs[1].exists()
    events: list[Event] = []
    turn = session.edit(PROMPT, out=outs[1], on_progress=events.append)
    assert [event.number for event in events if isinstance(event, WindowDone)] == [4, 5]
    assert torch.equal(turn.latents, expected.latents)
    assert outs[1].read_bytes() == outs[0].read_bytes()
    own, other = (
        json.loads(json.dumps(without_times(each.report)).replace(f'"{each_session.id}/', '"'))
        for each, each_session in ((turn, session), (expected, unbroken))
    )
    assert own == other
    made = {name for name in contents(folder) if not name.startswith(".")}
    assert made == set(contents(tmp_path / "whole"))
    assert not list(folder.rglob(".*"))


def test_a_session_is_resumed_with_all_its_edits(editor: Engine, tmp_path: Path) -> None:
    frames = long_clip(8)
    session = editor.session(frames, store=tmp_path)
    first = session.edit(PROMPT, num_inference_steps=1)
    events = session.events(session.request(prompt="the floor", num_inference_steps=1))
    while not isinstance(next(events), WindowDone):
        pass
    events.close()
    # the folder has the latents, memory does not
    assert all(kept.latents is None for edit in session._kept.drafts for kept in edit.windows)
    session.close()
    # the version before wrote it like this
    as_version_1(tmp_path)
    again = editor.session(frames, store=tmp_path, resume=True)
    assert again.id == session.id and len(again.turns) == 1
    assert [(request.prompt, done) for request, done in again.unfinished] == [("the floor", 1)]
    restored = again.turns[0]
    assert torch.equal(restored.latents, first.latents) and restored.report == first.report
    assert torch.equal(restored.frames, first.frames)
    # finished, it is given again; the other goes on; a third has windows of its own
    assert again.edit(PROMPT, num_inference_steps=1) is restored
    assert again.edit("the ball", num_inference_steps=1).number == 3
    second = again.edit("the floor", num_inference_steps=1)
    assert [turn.number for turn in again.turns] == [1, 2, 3]
    alone = editor.session(frames).edit("the floor", num_inference_steps=1)
    assert torch.equal(second.latents, alone.latents)
    # with other settings it is another edit, not half of this one
    config = EngineConfig(max_memory=0)
    again.close()
    other = editor.reconfigured(config).session(frames, store=tmp_path, resume=True)
    assert other.edit(PROMPT, num_inference_steps=1).number == 4
    other.close()
    # and by other steps it is refused
    fast = editor.reconfigured(EngineConfig(fast="fastwan"))
    with pytest.raises(StorageError, match="this engine has 'dmd'; give the same fast"):
        fast.session(frames, store=tmp_path, resume=True)


def test_only_what_was_begun_is_resumed(editor: Engine, engine: Engine, tmp_path: Path) -> None:
    frames, folder = long_clip(6), tmp_path / "edits"
    editor.session(frames, cuts=(3,), store=folder).edit(PROMPT, num_inference_steps=1)
    before = contents(folder)
    with pytest.raises(StorageError, match="already holds a session; resume it"):
        editor.session(frames, store=folder)
    with pytest.raises(StorageError, match="holds a session whose source is"):
        editor.session(long_clip(6, seed=1), store=folder, resume=True)
    with pytest.raises(StorageError, match=r"holds a session whose cuts is \[3\], this one's"):
        editor.session(frames, cuts=(), store=folder, resume=True)
    assert editor.session(frames, store=folder, resume=True).cuts == (3,)
    views = tmp_path / "views"
    engine.session(long_clip(9, size=(48, 64)), store=views)
    with pytest.raises(StorageError, match="holds a session whose source is"):
        editor.session(frames, store=views, resume=True)
    with pytest.raises(StorageError, match="holds a session whose source is"):
        engine.session(long_clip(9, size=(48, 64)), store=folder, resume=True)
    assert contents(folder) == before
    manifest = json.loads((folder / "session.json").read_text())
    manifest["turns"][0]["request"]["sead"] = manifest["turns"][0]["request"].pop("seed")
    for digest, words in ((True, "other words than were stored"), (False, "lacks or misnames")):
        if not digest:
            # as an engine of before the list had its own digest wrote it
            manifest.pop("sha256")
        (folder / "session.json").write_text(json.dumps(manifest))
        with pytest.raises(StorageError, match=f"is damaged: .*{words}"):
            editor.session(frames, store=folder, resume=True)


OTHER_WORDS = {"other words": lambda content: content.replace(b'"memory', b'"mamory')}


@pytest.mark.parametrize("damage", DAMAGES | OTHER_WORDS)
@pytest.mark.parametrize("window", [1, 2, 3])
def test_from_a_damaged_window_on_the_edit_is_made_again(
    editor: Engine, tmp_path: Path, damage: str, window: int
) -> None:
    frames, store = long_clip(13), SessionFolder(tmp_path)
    session = editor.session(frames, cuts=(), store=tmp_path)
    expected = session.edit(PROMPT, num_inference_steps=1).latents
    session.close()
    path = store.window_path({"number": 1, "camera": None}, window)
    path.write_bytes((DAMAGES | OTHER_WORDS)[damage](path.read_bytes()))
    again = editor.session(frames, store=tmp_path, resume=True)
    (words,) = again.lost
    assert words.startswith(f"{path} cannot be read again (") and "behind it again" in words
    assert not again.turns and [done for _, done in again.unfinished] == [window - 1]
    made: list[Event] = []
    turn = again.edit(PROMPT, num_inference_steps=1, on_progress=made.append)
    numbers = [event.number for event in made if isinstance(event, WindowDone)]
    assert numbers == list(range(window, 4)) and torch.equal(turn.latents, expected)
    again.close()
    whole = editor.session(frames, store=tmp_path, resume=True)
    assert not whole.lost and torch.equal(whole.turns[0].latents, expected)


def test_a_full_disk_ends_the_edit_and_keeps_its_windows(editor: Engine, tmp_path: Path) -> None:
    frames = long_clip(13)
    expected = editor.session(frames).edit(PROMPT, num_inference_steps=1)
    session = editor.session(frames, store=tmp_path)
    events = session.events(session.request(prompt=PROMPT, num_inference_steps=1))
    while not isinstance(next(events), WindowDone):
        pass
    before = contents(tmp_path)
    with largest_file(500), pytest.raises(StorageError, match=r"window_00002.*File too large"):
        list(events)
    # the second one waits in this process
    assert contents(tmp_path) == before and session.unfinished[0][1] == 2
    done = []
    turn = session.edit(
        PROMPT,
        num_inference_steps=1,
        on_progress=lambda event: done.append(event) if isinstance(event, WindowDone) else None,
    )
    assert [event.number for event in done] == [3]
    assert torch.equal(turn.latents, expected.latents)
    session.close()
    resumed = editor.session(frames, store=tmp_path, resume=True)
    assert torch.equal(resumed.turns[0].latents, expected.latents)


def test_an_edit_without_room_is_stored_before_the_next(editor: Engine, tmp_path: Path) -> None:
    session = editor.session(long_clip(5), cuts=(), store=tmp_path)
    with largest_file(500), pytest.raises(StorageError, match="File too large"):
        session.edit(PROMPT, num_inference_steps=1)
    session.edit("the floor", num_inference_steps=1)
    rows = SessionFolder(tmp_path).read()["turns"]
    assert [(row["request"]["prompt"], len(row["windows"])) for row in rows] == [
        (PROMPT, 1),
        ("the floor", 1),
    ]


def test_a_video_that_finds_no_room_leaves_nothing_but_the_windows(
    editor: Engine, tmp_path: Path
) -> None:
    noise = torch.randint(0, 255, (10, 32, 48, 3), dtype=torch.uint8)
    session = editor.session(noise, cuts=())
    with largest_file(300), pytest.raises(StorageError, match=r"cannot write .*out\.mp4"):
        session.edit(PROMPT, num_inference_steps=1, out=tmp_path / "out.mp4")
    assert not list(tmp_path.iterdir())
    session.edit(PROMPT, num_inference_steps=1, out=tmp_path / "out.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
