"""A session's folder: it goes on bit for bit, or says why it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mv2v_engine import Engine, EngineConfig
from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.engine.folder import SessionFolder
from mv2v_engine.errors import RequestError, StorageError
from tests.engine.old_folders import as_version_1
from tests.folders import DAMAGES, turned

CAMERAS = ("pan_right", "arc_left", "pan_right")


@pytest.fixture
def folder(tmp_path: Path, engine: Engine, source_frames: Tensor) -> Path:
    """A session of two turns."""
    session = engine.session(source_frames, store=tmp_path / "out")
    for camera in CAMERAS[:2]:
        session.render(camera)
    return tmp_path / "out"


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / "session.json").read_text())
    # as an engine of before the list had its own digest wrote it
    manifest.pop("sha256")
    edit(manifest)
    (folder / "session.json").write_text(json.dumps(manifest))


def test_a_resumed_session_goes_on_bit_for_bit(
    folder: Path, tiny_checkpoint: Path, engine: Engine, source_frames: Tensor
) -> None:
    unbroken = engine.session(source_frames)
    expected = [unbroken.render(camera) for camera in CAMERAS]
    fresh = Engine.from_pretrained(tiny_checkpoint, device="cpu")
    session = fresh.session(source_frames, store=folder, resume=True)
    assert [turn.trajectory.name for turn in session.turns] == list(CAMERAS[:2])
    session.render(CAMERAS[2])
    for turn, other in zip(session.turns, expected, strict=True):
        assert torch.equal(turn.latents, other.latents)
        assert torch.equal(turn.frames, other.frames)
        assert torch.equal(turn.trajectory.poses, other.trajectory.poses)
    reports = [turn.report["memory"]["retrieved"] for turn in session.turns]
    assert [[row["turn"] for row in report] for report in reports] == [[], [1], [1, 2]]
    session.close()
    again = fresh.session(source_frames, store=folder, resume=True)
    assert again.id == session.id and len(again.turns) == 3
    assert again.turns[2].report == session.turns[2].report


def test_a_folder_of_the_version_before_goes_on(
    folder: Path, engine: Engine, source_frames: Tensor
) -> None:
    before = SessionFolder(folder).read()
    for row in before["turns"]:
        row["settings"] = {}  # a view's turn did not keep it then
    as_version_1(folder)
    assert SessionFolder(folder).read() == {**before, "version": 1}
    session = engine.session(source_frames, store=folder, resume=True)
    turn, expected = session.render(CAMERAS[2]), engine.session(source_frames)
    for camera in CAMERAS:
        last = expected.render(camera)
    assert torch.equal(turn.latents, last.latents) and not session.lost
    after = SessionFolder(folder).read()
    assert after["version"] == 2 and after["turns"][:2] == before["turns"]


def test_a_folder_is_not_taken_over(folder: Path, engine: Engine, source_frames: Tensor) -> None:
    with pytest.raises(StorageError, match="already holds a session; resume it"):
        engine.session(source_frames, store=folder)
    with pytest.raises(StorageError, match="holds no session; start one"):
        engine.session(source_frames, store=folder / "none", resume=True)
    with pytest.raises(RequestError, match="give a store"):
        engine.session(source_frames, resume=True)


def test_other_input_does_not_go_on(
    folder: Path,
    engine: Engine,
    source_frames: Tensor,
    tmp_path: Path,
    make_checkpoint: Callable[..., Path],
) -> None:
    before = (folder / "session.json").read_bytes()
    with pytest.raises(StorageError, match=r"whose source is .* give the same input"):
        engine.session(255 - source_frames, store=folder, resume=True)
    camera = named_trajectory("zoom_in", 9, (48, 64))
    with pytest.raises(StorageError, match="source camera is 'static', this one's is 'zoom_in'"):
        engine.session(source_frames, cameras=camera, store=folder, resume=True)
    other = Engine.from_pretrained(make_checkpoint(tmp_path / "c", name="other"), device="cpu")
    with pytest.raises(StorageError, match="checkpoint is 'tiny', this one's is 'other'"):
        other.session(source_frames, store=folder, resume=True)
    vae = {"latents_std": [0.5] * 16}
    other = Engine.from_pretrained(make_checkpoint(tmp_path / "v", vae=vae), device="cpu")
    with pytest.raises(StorageError, match="whose vae is"):
        other.session(source_frames, store=folder, resume=True)
    for config, words in (
        (EngineConfig(fast="lightx2v"), "scheduler 'euler', and this engine has 'lightx2v'"),
        (EngineConfig(scheduler="unipc"), "scheduler 'euler', and this engine has 'unipc'"),
        (EngineConfig(timesteps="bfloat16"), "timesteps None, and this engine has 'bfloat16'"),
    ):
        other = engine.reconfigured(config)
        with pytest.raises(StorageError, match=words):
            other.session(source_frames, store=folder, resume=True)
        # its turns can be read all the same, and no turn goes on behind them
        session = other.session(source_frames, store=folder, resume=True, reads_any=True)
        assert len(session.turns) == 2 and session.turns[0].frames.shape[0] == 9
        with pytest.raises(RequestError, match=f"{words}; give the same"):
            session.render("pan_left")
        session.close()
    assert (folder / "session.json").read_bytes() == before


DAMAGE: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda m: m.update(format="other"), "is no session of this engine"),
    (lambda m: m.update(version=9), "has version 9, this engine reads up to 2"),
    (lambda m: m.pop("turns"), "turns must be a list"),
    (lambda m: m.update(identity=None), "identity must be a dict"),
    (lambda m: m["turns"][0].pop("camera"), "holds turns of the other task"),
    (lambda m: m["turns"][0].update(camera="pan"), "turn 1's camera must be a dict, got 'pan'"),
    (lambda m: m["turns"][0]["camera"].update(size=[48]), "turn 1's camera is none"),
    (lambda m: m["turns"][0].pop("request"), "turn 1's request must be a dict, got None"),
    (lambda m: m["turns"].append(3), "turn 3 must be a dict, got 3"),
    (lambda m: m["turns"].pop(0), "turn 1 has the number 2"),
    (lambda m: m["turns"][1].update(nulber=m["turns"][1].pop("number")), "number must be a int"),
]


@pytest.mark.parametrize(("edit", "words"), DAMAGE)
def test_a_damaged_manifest(
    folder: Path,
    engine: Engine,
    source_frames: Tensor,
    edit: Callable[[dict[str, Any]], None],
    words: str,
) -> None:
    change(folder, edit)
    with pytest.raises(StorageError, match=words):
        engine.session(source_frames, store=folder, resume=True)


DAMAGED_BYTES = DAMAGES | {
    "turned at the end": lambda content: turned(content, len(content) - 2),
    "turned at the start": lambda content: turned(content, 9),
    "another file": lambda content: b"{}",
}


@pytest.mark.parametrize("damage", DAMAGED_BYTES)
@pytest.mark.parametrize("number", [1, 2])
def test_a_damaged_turn_is_lost_alone(
    folder: Path, engine: Engine, source_frames: Tensor, damage: str, number: int
) -> None:
    path = folder / "turns" / f"turn_{number:02d}.safetensors"
    content = path.read_bytes()
    path.write_bytes(DAMAGED_BYTES[damage](content))
    session = engine.session(source_frames, store=folder, resume=True)
    (words,) = session.lost
    assert words.startswith(f"turn {number} is lost: {path} cannot be read again (")
    assert words.endswith("restore the file, or go on without it")
    lost, other = session.turns[number - 1], session.turns[2 - number]
    # what was known of it is known
    expected = named_trajectory(CAMERAS[number - 1], 9, (48, 64))
    assert lost.number == number and lost.trajectory.name == CAMERAS[number - 1]
    assert torch.equal(lost.trajectory.poses, expected.poses)
    assert lost.report["lost"] == words and lost.report["camera"] == CAMERAS[number - 1]
    for read in (lambda: lost.latents, lambda: lost.frames):
        with pytest.raises(StorageError, match=rf"turn {number} is lost"):
            read()
    assert other.frames.shape == source_frames.shape
    if number == 2:
        with pytest.raises(StorageError, match=r"turn 2 is lost"):
            session.render(CAMERAS[2], memory="previous")
    # the next turn is the third, and remembers what there is
    turn = session.render(CAMERAS[2])
    assert turn.number == 3
    assert [row["turn"] for row in turn.report["memory"]["retrieved"]] == [3 - number]
    session.close()
    # restored, it is a turn like any other
    path.write_bytes(content)
    whole = engine.session(source_frames, store=folder, resume=True)
    assert not whole.lost and torch.equal(whole.turns[2].latents, turn.latents)
    assert whole.turns[number - 1].frames.shape == source_frames.shape


@pytest.mark.parametrize("damage", DAMAGED_BYTES)
def test_a_damaged_list_is_one_clear_error_or_none(
    folder: Path, engine: Engine, source_frames: Tensor, damage: str
) -> None:
    path = folder / "session.json"
    content = path.read_bytes()
    before = json.loads(content)
    for place in (None, *range(40, len(content), 997)):
        damaged = DAMAGED_BYTES[damage](content) if place is None else turned(content, place)
        path.write_bytes(damaged)
        try:
            read = SessionFolder(folder).read()
        except StorageError as error:
            assert str(error).startswith(f"{path} ") and "choose another folder" in str(error)
            with pytest.raises(StorageError):
                engine.session(source_frames, store=folder, resume=True)
        else:
            # what was turned says nothing: white space, or the name of the digest
            assert read["turns"] == before["turns"] and read["identity"] == before["identity"]


def test_folders_of_before_digests(folder: Path, engine: Engine, source_frames: Tensor) -> None:
    def older(manifest: dict[str, Any]) -> None:
        for row in manifest["turns"]:
            del row["sha256"], row["path"]

    as_version_1(folder)
    change(folder, older)
    session = engine.session(source_frames, store=folder, resume=True)
    assert len(session.turns) == 2 and not session.lost
    session.close()
    (folder / "turns" / "turn_01.safetensors").write_bytes(b"")
    # only its file had the camera
    with pytest.raises(StorageError, match=r"^turn 1 is lost: .*turn_01\.safetensors"):
        engine.session(source_frames, store=folder, resume=True)


def test_a_branch_begins_with_the_same_memory(
    folder: Path, engine: Engine, source_frames: Tensor, tmp_path: Path
) -> None:
    store, other = SessionFolder(folder), tmp_path / "branch"
    store.branch(other, id="branch", count=1)
    session = engine.session(source_frames, store=other, resume=True)
    assert session.id == "branch" and len(session.turns) == 1
    turn = session.render("arc_left", num_inference_steps=1)
    assert turn.number == 2
    assert [row["turn"] for row in turn.report["memory"]["retrieved"]] == [1]
    assert SessionFolder(other).listed_files() == set((other / "turns").iterdir())
    before = (other / "session.json").read_bytes()
    with pytest.raises(StorageError, match="is in use"):
        store.branch(other, id="again", count=1)
    session.close()
    with pytest.raises(StorageError, match="already holds a session"):
        store.branch(other, id="again", count=1)
    assert (other / "session.json").read_bytes() == before
    # the session that it came from is as it was
    assert len(store.read()["turns"]) == 2
    with pytest.raises(StorageError, match="holds 2 turns, asked were 3"):
        store.branch(tmp_path / "more", id="more", count=3)
